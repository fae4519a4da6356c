"""Tiny random decoders of every family, with a byte tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
HEADS = {**SIZES, "head_dim": 16}
WINDOW = 16
WINDOWED = {**SIZES, "head_dim": 32, "sliding_window": WINDOW}


def _rope(kind: str = "default", **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


# What a family is called here, its model_type where that differs, and its config. The first sizes are the smallest that
# show what the family has of its own: windows shorter than the tests' texts, partial rotation, scales other than one.
LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256)
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": HEADS,
    "llama-3-rope": {**HEADS, **LLAMA3, "model_type": "llama"},
    "llama-yarn": {
        **HEADS,
        **_rope("yarn", factor=4.0, original_max_position_embeddings=512),
        "model_type": "llama",
    },
    "mistral": WINDOWED,
    "qwen2": SIZES,
    "qwen3": {**HEADS, "tie_word_embeddings": True},
    "gemma": HEADS,
    "gemma2": {**WINDOWED, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0},
    "gemma3_text": {
        **WINDOWED,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 24,
    },
    "phi": {**SIZES, "hidden_size": 128, **_rope(partial_rotary_factor=0.5)},
    "phi3": {**SIZES, "sliding_window": None},
    "phi3-partial": {**SIZES, "hidden_size": 128, **_rope(partial_rotary_factor=0.5), "model_type": "phi3"},
    "phi3-long": {
        **SIZES,
        "sliding_window": None,
        **_rope(
            "longrope",
            short_factor=[1.0 + 0.1 * index for index in range(8)],
            long_factor=[4.0] * 8,
            original_max_position_embeddings=1024,
        ),
        "model_type": "phi3",
    },
    "smollm3": {**HEADS, "no_rope_layers": [1, 0]},
    "olmo2": SIZES,
    "granite": {
        **SIZES,
        "embedding_multiplier": 2.0,
        "logits_scaling": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 2048},
    "opt": {
        "hidden_size": 64,
        "ffn_dim": 96,
        "word_embed_proj_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
    },
    "gpt_neox": {
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.5,
    },
    "stablelm": {**SIZES, **_rope(partial_rotary_factor=0.25)},
    "starcoder2": {**SIZES, "hidden_size": 128, "sliding_window": WINDOW},
}
FAMILIES = tuple(CONFIGS)


def save_decoder(family: str, folder: Path, **sizes: int) -> Path:
    """Writes model and tokenizer; weights are large enough that every part of the graph shows in the output."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    settings = {"model_type": family, **CONFIGS[family], **sizes}
    config = AutoConfig.for_model(
        **settings,
        vocab_size=len(tokenizer),
        initializer_range=0.1,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer() -> Any:
    """A tokenizer with one token per byte and an end token: it reads any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
