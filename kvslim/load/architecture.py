"""Where the parts of each model family live: architectures as data. Adding a family is adding a row."""

from __future__ import annotations

from dataclasses import dataclass

from kvslim.errors import UnsupportedError, suggestion


@dataclass(frozen=True)
class Architecture:
    """Module paths of a family in transformers.

    Attributes:
        layers: The list of decoder layers, from the model.
        attention: The attention module, from a layer.
        query, key, value, output: Its projections, from the attention module.
        packed: Whether query, key and value are the thirds of one projection.
        rotary: The rotary embedding, from the model; None for learned positions.
    """

    layers: str = "model.layers"
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    packed: bool = False
    rotary: str | None = "model.rotary_emb"


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "gpt2": Architecture(
        layers="transformer.h",
        attention="attn",
        query="c_attn",
        key="c_attn",
        value="c_attn",
        output="c_proj",
        packed=True,
        rotary=None,
    ),
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
