"""Where the parts of each model family live: architectures as data. Adding a family is adding a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvslim.errors import UnsupportedError, suggestion

Packing = Literal["blocks", "heads"]


@dataclass(frozen=True)
class Architecture:
    """Module paths of a family in transformers.

    Attributes:
        layers: The list of decoder layers, from the model.
        attention: The attention module, from a layer.
        query, key, value, output: Its projections, from the attention module.
        packing: Order of the rows where query, key and value are one projection: all query heads, all key heads, all
            value heads ("blocks"), or query, key and value of one head after the other ("heads").
        direct: Whether the modelling code slices and joins projections with no effect but RoPE's; they are then
            computed straight from the hidden states.
        rotary: The rotary embedding, from the model; None for learned positions.
        scaled_query: Whether the family scales queries after their projection.
    """

    layers: str = "model.layers"
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    packing: Packing | None = None
    direct: bool = False
    rotary: str | None = "model.rotary_emb"
    scaled_query: bool = False


def _packed(name: str, packing: Packing, **paths: str | None) -> Architecture:
    """The row of a family with one projection for query, key and value."""
    return Architecture(query=name, key=name, value=name, packing=packing, direct=True, **paths)  # type: ignore[arg-type]


ARCHITECTURES: dict[str, Architecture] = {
    "gemma": Architecture(),
    "gemma2": Architecture(),
    "gemma3_text": Architecture(),
    "gpt2": _packed("c_attn", "blocks", layers="transformer.h", attention="attn", output="c_proj", rotary=None),
    "gpt_neox": _packed(
        "query_key_value",
        "heads",
        layers="gpt_neox.layers",
        attention="attention",
        output="dense",
        rotary="gpt_neox.rotary_emb",
    ),
    "granite": Architecture(),
    "llama": Architecture(),
    "mistral": Architecture(),
    "olmo2": Architecture(),
    "opt": Architecture(layers="model.decoder.layers", output="out_proj", rotary=None, scaled_query=True),
    "phi": Architecture(output="dense", direct=True),
    "phi3": _packed("qkv_proj", "blocks"),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "smollm3": Architecture(),
    "stablelm": Architecture(direct=True),
    "starcoder2": Architecture(),
}


def architecture_of(model_type: str) -> Architecture:
    """The architecture of a family.

    Raises:
        UnsupportedError: The family has no row in the table.
    """
    if model_type not in ARCHITECTURES:
        raise UnsupportedError(
            f"model family {model_type!r} is not supported",
            where="config.json: model_type",
            fix=suggestion(model_type, ARCHITECTURES),
        )
    return ARCHITECTURES[model_type]
