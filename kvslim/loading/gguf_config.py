"""The config that the metadata of a GGUF describes. To add an architecture of GGUF, add a row.

llama.cpp has names of its own for what transformers keeps in config.json, and it stores some tensors in another form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

# Names in a GGUF after the architecture's own, and in config.json.
NAMES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_count": "num_local_experts",
}
TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
LARGEST_GEMMAS = {"gemma2": 46, "gemma3": 62}  # layers of the models that do not scale queries by their head_dim
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
Restore = Callable[[str, "np.ndarray", Mapping[str, Any]], "np.ndarray"]


def _as_stored(name: str, weights: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    return weights


def _unpermuted(name: str, weights: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Rows of queries and keys as transformers rotates them: halves of a head, which llama.cpp interleaves."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(name.split(".")[-2])
    if heads is None:
        return weights
    return weights.reshape(heads, -1, 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def _centred_norms(name: str, weights: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Gemma's norms multiply by one more than what transformers stores."""
    return weights - 1 if name.endswith("norm.weight") else weights


def _transposed(name: str, weights: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """GPT-2's projections, which transformers stores with inputs as rows."""
    parts = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    return weights.T if name.endswith(parts) else weights


@dataclass(frozen=True)
class GgufArchitecture:
    """How the files of an architecture say what transformers wants to know.

    Attributes:
        family: The `model_type` in transformers.
        names: Names in the metadata and in config.json, beside `NAMES` or in their place.
        restore: A tensor in the form of transformers, from its name, its values and the config.
    """

    family: str
    names: Mapping[str, str] = field(default_factory=dict)
    restore: Restore = _as_stored


WINDOW = {"attention.sliding_window": "sliding_window"}
GEMMA = WINDOW | {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
GGUF_ARCHITECTURES = {
    "gemma2": GgufArchitecture("gemma2", GEMMA, _centred_norms),
    "gemma3": GgufArchitecture("gemma3_text", GEMMA, _centred_norms),
    "gpt2": GgufArchitecture(
        "gpt2", {"attention.layer_norm_epsilon": "layer_norm_epsilon", "feed_forward_length": "n_inner"}, _transposed
    ),
    "llama": GgufArchitecture("llama", restore=_unpermuted),
    "phi3": GgufArchitecture("phi3", WINDOW),
    "qwen2": GgufArchitecture("qwen2"),
    "qwen3": GgufArchitecture("qwen3"),
    "stablelm": GgufArchitecture(
        "stablelm",
        {"attention.layer_norm_epsilon": "layer_norm_eps", "use_parallel_residual": "use_parallel_residual"},
    ),
    "starcoder2": GgufArchitecture("starcoder2", {"attention.layer_norm_epsilon": "norm_epsilon"}),
}


def gguf_config(
    metadata: Mapping[str, Any], tensors: Collection[str], factors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """config.json as transformers would write it.

    Args:
        metadata: The values of the file, of an architecture that is in the table; lists of strings as their length.
        tensors: The names of its tensors.
        factors: Those of `ROPE_TENSORS` that it has.

    Raises:
        Exception: A value is missing or wrong; transformers' config classes raise many types.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = metadata["general.architecture"]
    row = GGUF_ARCHITECTURES[name]
    own = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    config = {to: own[key] for key, to in (NAMES | dict(row.names)).items() if key in own}
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config |= {
        to: metadata.get(f"tokenizer.ggml.{key}") for key, to in TOKENS.items() if f"tokenizer.ggml.{key}" in metadata
    }
    config |= {
        "vocab_size": metadata["tokenizer.ggml.tokens"],
        "tie_word_embeddings": "output.weight" not in tensors,
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[row.family]],
    }
    if config.get("sliding_window") == 0:  # a file of a model without windows may say so
        del config["sliding_window"]
    config |= _biases(row.family, tensors) | _rope(row.family, own, config, factors) | _scale_of_queries(name, config)
    written = AutoConfig.for_model(row.family, **config).to_json_string()
    found: dict[str, Any] = json.loads(written)
    return found


def _biases(family: str, tensors: Collection[str]) -> dict[str, bool]:
    """Whether projections have biases, where the family has both kinds."""
    attention, mlp = ("blk.0.attn_q.bias" in tensors, "blk.0.ffn_up.bias" in tensors)
    return {
        "llama": {"attention_bias": attention, "mlp_bias": mlp},
        "stablelm": {"use_qkv_bias": attention, "qk_layernorm": "blk.0.attn_q_norm.weight" in tensors},
    }.get(family, {})


def _scale_of_queries(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma's files do not tell it; llama.cpp goes by the number of layers too."""
    if name not in LARGEST_GEMMAS:
        return {}
    largest = config["num_hidden_layers"] == LARGEST_GEMMAS[name]
    width = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    return {"query_pre_attn_scalar": width}


def _rope(
    family: str, own: Mapping[str, Any], config: dict[str, Any], factors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The RoPE of all layers, or for Gemma 3 of both kinds of layers; nothing for learned positions."""
    if family == "gpt2":
        return {}
    width = config.setdefault("head_dim", _head_dim(family, own, config))
    rope = {"rope_theta": own.get("rope.freq_base", 10000.0), **_scaling(own)}
    if "rope_freqs.weight" in factors:
        rope |= _llama3(factors["rope_freqs.weight"], rope["rope_theta"], width)
    if "rope_factors_long.weight" in factors:
        rope |= _longrope(factors)
        config["original_max_position_embeddings"] = own["rope.scaling.original_context_length"]
    if family == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": own.get("rope.freq_base_swa", 10000.0)}
        return {"rope_parameters": {"full_attention": rope, "sliding_attention": local}}
    if family in {"phi3", "stablelm"}:
        rope["partial_rotary_factor"] = own.get("rope.dimension_count", width) / width
    return {"rope_parameters": rope}


def _head_dim(family: str, own: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """For files that do not tell it; old ones of Llamas tell only how many dimensions are rotated, which is all."""
    divided = config["hidden_size"] // config["num_attention_heads"]
    return int(own.get("rope.dimension_count", divided)) if family == "llama" else int(divided)


def _scaling(own: Mapping[str, Any]) -> dict[str, Any]:
    """What scales the frequencies by a rule."""
    kind = own.get("rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default"}
    rope = {"rope_type": kind, "factor": own.get("rope.scaling.factor", 1.0)}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = own["rope.scaling.original_context_length"]
    return rope | {to: own[f"rope.scaling.{key}"] for key, to in YARN.items() if f"rope.scaling.{key}" in own}


def _longrope(factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Phi-3's scaling, whose factors a file has as tensors."""
    kinds = ("short", "long")
    lists = {f"{kind}_factor": factors[f"rope_factors_{kind}.weight"].tolist() for kind in kinds}
    return {"rope_type": "longrope", **lists}


def _llama3(found: np.ndarray, theta: float, width: int) -> dict[str, Any]:
    """Llama 3's scaling, of which a file has only the resulting divisors, one for each frequency.

    Raises:
        ValueError: The divisors are others than those of the released models.
    """
    import numpy as np

    rope = {"factor": float(found.max()), **LLAMA3}
    wavelengths = 2 * np.pi * theta ** (np.arange(0, width, 2) / width)
    smooth = (rope["original_max_position_embeddings"] / wavelengths - rope["low_freq_factor"]) / (
        rope["high_freq_factor"] - rope["low_freq_factor"]
    )
    expected = 1 / ((1 - smooth.clip(0, 1)) / rope["factor"] + smooth.clip(0, 1))
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3):
        raise ValueError("rope_freqs.weight divides the frequencies by other factors than those of Llama 3")
    return {"rope_type": "llama3", **rope}
