"""Kinds of models that KVSlim cannot express, told from config.json alone, each with what helps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kvslim.errors import UnsupportedError
from kvslim.loading.architecture import ARCHITECTURES
from kvslim.loading.multimodal import MULTIMODAL

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
PARTS = ("text_config", "llm_config", "language_config", "thinker_config", "vision_config", "audio_config")
RECURRENT = ("rwkv", "xlstm")  # whose configs have no key that tells
STATES = re.compile(
    r"^(n_|use_)?(mamba|ssm_|linear_(conv|key|value|num)|conv_(kernel|L_)|state_size|lru_width|hybrid_)"
)
STATE_LAYERS = re.compile("mamba|linear|recurrent|conv|ssm|delta|hybrid|retention|rwkv")


def refuse_kind(raw: Mapping[str, Any], where: str) -> None:
    """Refuses what is no decoder whose layers all have attention and one feed-forward part.

    Args:
        raw: config.json of a model that is no encoder.
        where: Its path, for errors.

    Raises:
        UnsupportedError: Naming the kind.
    """
    family, described = raw["model_type"], _described(raw)
    if any(isinstance(described.get(part), Mapping) for part in PARTS):
        kind, fix = "has parts that see or hear, and its language part is not read", _whole_fix(described)
    elif described.get("is_encoder_decoder"):
        kind, fix = "reads with an encoder and writes with a decoder", "use a model that is a decoder alone"
    elif family in RECURRENT or _keeps_states(described):
        kind, fix = (
            "has layers that keep a state in place of keys and values",
            "use one whose layers all have attention",
        )
    elif any(described.get(key) for key in EXPERTS):
        kind, fix = "is a mixture of experts, which KVSlim does not support", "use a dense model"
    else:
        return
    raise UnsupportedError(f"{family!r} {kind}", where=where, fix=fix)


def _described(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with the defaults of its family, where transformers knows it and it is not one of ours."""
    from transformers import AutoConfig

    if raw["model_type"] in ARCHITECTURES:
        return raw
    try:
        return {**AutoConfig.for_model(raw["model_type"]).to_dict(), **raw}
    except Exception:  # an unknown family, or one whose config class has no defaults
        return raw


def _keeps_states(described: Mapping[str, Any]) -> bool:
    kinds = f"{described.get('layer_types')} {described.get('layers_block_type')}"
    return STATE_LAYERS.search(kinds) is not None or any(STATES.match(key) for key in described)


def _whole_fix(described: Mapping[str, Any]) -> str:
    text = next((part for name in PARTS if isinstance(part := described.get(name), Mapping)), {})
    read = f"language parts are read of {', '.join(MULTIMODAL)}"
    if text.get("model_type") in ARCHITECTURES:
        return f"save its language model alone, a {text['model_type']} (model.language_model.save_pretrained); {read}"
    return f"use a model that only reads text; {read}"
