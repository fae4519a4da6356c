"""Writes a tiny model's folder as a GGUF file, in the names and forms of llama.cpp's converter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURES = {"gemma3_text": "gemma3"}
TURN_END = 7
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_gguf(
    folder: Path,
    path: Path,
    tensor_type: str | Callable[[str], str] = "F32",
    more: Mapping[str, np.ndarray] | None = None,
    **metadata: Any,
) -> Path:
    """Writes weights, config and tokenizer of a folder to `path`.

    Args:
        folder: A model as `save_decoder` writes it.
        path: The file to be.
        tensor_type: How matrices whose rows fill the blocks are stored, one or by their name; all else is float32.
        more: Tensors beside those of the model.
        metadata: Values to write beside those of the config or in their place, by their name with __ for dots.
    """
    import gguf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    _write_sizes(writer, config)
    _write_rope(writer, config)
    _write_tokenizer(writer, folder, config)
    for key, value in metadata.items():
        writer.add_key_value(key.replace("__", "."), value, gguf.GGUFValueType.get_type(value))
    for name, values in (_tensors(model, architecture) | dict(more or {})).items():
        kind = gguf.GGMLQuantizationType[tensor_type if isinstance(tensor_type, str) else tensor_type(name)]
        if values.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_sizes(writer: Any, config: Any) -> None:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 4 * config.hidden_size))
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    if eps := getattr(config, "rms_norm_eps", None):
        writer.add_layer_norm_rms_eps(eps)
    epsilons = ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon")
    if eps := next((getattr(config, name) for name in epsilons if hasattr(config, name)), None):
        writer.add_layer_norm_eps(eps)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.model_type in {"gemma2", "gemma3_text", "phi3"}:
        writer.add_sliding_window(config.sliding_window or 0)
    if softcap := getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(softcap)
    if softcap := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(softcap)
    if config.model_type == "stablelm":
        writer.add_parallel_residual(config.use_parallel_residual)


def _write_rope(writer: Any, config: Any) -> None:
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return
    rope = rope.get("full_attention", rope)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(int(width * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
    if original := rope.get("original_max_position_embeddings"):
        writer.add_rope_scaling_orig_ctx_len(original)
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, width).astype(np.float32))
    if rope["rope_type"] == "longrope":
        for kind in ("short", "long"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], np.float32))


def _llama3_factors(rope: dict[str, Any], width: int) -> np.ndarray:
    """As llama.cpp's converter computes them, one frequency after the other."""
    factors = []
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    for index in range(0, width, 2):
        length = 2 * np.pi * rope["rope_theta"] ** (index / width)
        smooth = (rope["original_max_position_embeddings"] / length - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors.append(1.0 if length < high else rope["factor"] if length > low else between)
    return np.array(factors)


def _write_tokenizer(writer: Any, folder: Path, config: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in tokens])
    writer.add_token_scores([0.0] * len(tokens))  # in place of merges, of which there are none
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_eot_token_id(TURN_END)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def _tensors(model: Any, architecture: str) -> dict[str, np.ndarray]:
    import gguf

    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    found = {}
    for own, tensor in model.state_dict().items():
        name = names.get_name(own, try_suffixes=(".weight", ".bias"))
        if name is not None and not (name == "output.weight" and model.config.tie_word_embeddings):
            found[name] = np.ascontiguousarray(_in_llama_cpp(name, tensor.numpy(), model.config))
    return found


def _in_llama_cpp(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    """A tensor in llama.cpp's form: interleaved for Llama, norms plus one for Gemma, turned for GPT-2."""
    if config.model_type == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return split.swapaxes(1, 2).reshape(values.shape)
    if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
        return values + 1
    if config.model_type == "gpt2" and values.ndim == 2 and name.startswith("blk."):
        return values.T
    return values
