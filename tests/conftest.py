"""Fixtures that several test files share: tiny random models, and the folder beside the checkout."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("golden") is None)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Statistics go where the tests' other files go, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVSLIM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the checkout, with a trained model and prose."""
    if not SHARED.is_dir():
        if os.environ.get("KVSLIM_REQUIRE_SHARED") == "1":
            pytest.fail("../shared is missing, and KVSLIM_REQUIRE_SHARED=1 asks for it")
        pytest.skip("needs ../shared beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random model of a family: 2 layers, hidden 64, head_dim 16."""
    made: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in made:
            made[family] = _save(family, tmp_path_factory.mktemp("models") / family)
        return made[family]

    return folder_of


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="session", params=("llama", "qwen2", "qwen3", "gpt2"))
def tiny_family(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Path:
    """Each family in turn."""
    return tiny_model(request.param)


def _save(family: str, folder: Path) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = _byte_tokenizer()
    settings = {"model_type": family, **CONFIGS[family]}
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


def _byte_tokenizer() -> Any:
    """A tokenizer with one token per byte and an end token: it reads any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="session")
def demo_artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The demo model's artifact of a shipped recipe, made once; latency is measured as briefly as can be."""
    made: dict[str, Path] = {}

    def folder_of(recipe: str) -> Path:
        from kvslim.pipeline import compress
        from kvslim.recipe import load_recipe

        if recipe not in made:
            made[recipe] = tmp_path_factory.mktemp("demo") / recipe
            brief = (
                "validation.samples=8",
                "validation.repeats=3",
                "validation.prompts=[16]",
                "validation.contexts=[16]",
            )
            compress("demo", load_recipe(recipe, brief), made[recipe])
        return made[recipe]

    return folder_of
