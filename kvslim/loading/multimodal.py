"""The language part of models that also see: its config and the names of its weights.

For text alone these models compute what the language model inside them does. The three position streams of Qwen's mrope
(time, height, width; Wang et al., 2024, Qwen2-VL) are then equal, so it rotates as plain RoPE does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kvslim.loading.config import TOKENS, model_config
from kvslim.loading.snapshot import Unread

# Others are not here because their text part differs for text too: prefixes that are read both ways, cross-attention.
MULTIMODAL = ("gemma3", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FAMILIES = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
PREFIXES = {"model.language_model.": "model.", "language_model.": ""}
SEEING = ("visual.", "vision_tower.", "multi_modal_projector.")
MROPE = ("mrope_section", "mrope_interleaved", "type")  # the last is an older name of rope_type


def is_multimodal(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a model with a language part that can be used alone."""
    return raw.get("model_type") in MULTIMODAL


def language_config(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The config of the language model inside, as a config.json of its own.

    Args:
        raw: The config.json of the whole.
        where: Its path, for errors.

    Raises:
        ModelError: The config is broken.
    """
    whole = model_config(raw, where)
    text = whole.get_text_config()
    found = _as_json(text)
    found["model_type"] = FAMILIES.get(text.model_type, text.model_type)
    found["tie_word_embeddings"] = whole.tie_word_embeddings
    found |= {name: raw[name] for name in TOKENS if raw.get(name) is not None}
    if rope := found.get("rope_parameters"):
        found["rope_parameters"] = {name: value for name, value in rope.items() if name not in MROPE}
    return found | _class_of(found["model_type"])


def language_tensors(stored: Mapping[str, Unread]) -> dict[str, Unread]:
    """The weights of the language model alone, under its names."""
    seeing = (*SEEING, *(f"model.{part}" for part in SEEING))
    return {_plain(name): tensor for name, tensor in stored.items() if not name.startswith(seeing)}


def _plain(name: str) -> str:
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    return name if prefix is None else PREFIXES[prefix] + name.removeprefix(prefix)


def _as_json(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return found


def _class_of(family: str) -> dict[str, list[str]]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family)
    return {} if name is None else {"architectures": [name]}
