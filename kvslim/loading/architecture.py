"""Where the parts of each model family are, as a table. To add a family, add a row."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from kvslim.errors import UnsupportedError, suggestion

DIGITS = re.compile(r"\d+")
Packing = Literal["blocks", "heads"]


@dataclass(frozen=True)
class Architecture:
    """Module paths of a family in transformers.

    Attributes:
        title: The name of the family, with its best known models.
        note: What is special about its graphs.
        layers: The list of decoder layers, from the model.
        attention: The attention module, from a layer.
        query, key, value, output: Its projections, from the attention module.
        packing: Order of the rows if query, key and value are one projection: all query heads, all key heads, all
            value heads ("blocks"), or query, key and value of one head after the other ("heads").
        direct: Whether the modelling code only slices and joins projections around RoPE; they can then be computed
            directly from the hidden states.
        rotary: The rotary embedding, from the model; None for learned positions.
        scaled_query: Whether the family scales queries after their projection.
        query_norm: The norm of queries after their projection, from the attention module; None for families without.
        optional_query_norm: Whether the config's `qk_layernorm` decides if that norm is there.
        residual_multiplier: The config's name of what attention and feed-forward part are multiplied by before they
            are added to the hidden states; None for families that add them as they are.
        mlp: The modules of the feed-forward part, from a layer, in order; nothing else in it has weights.
        down: Its last projection, from a layer.
        post_norms: The norms on the outputs of attention and of the feed-forward part, before these are added to the
            hidden states, from a layer; None if the family has none.
    """

    title: str
    note: str
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
    query_norm: str | None = None
    optional_query_norm: bool = False
    residual_multiplier: str | None = None
    mlp: tuple[str, ...] = ("mlp",)
    down: str = "mlp.down_proj"
    post_norms: tuple[str, str] | None = None

    @property
    def added(self) -> tuple[str, str]:
        """The modules whose outputs, of attention and of the feed-forward part, are added to the hidden states."""
        return self.post_norms or (f"{self.attention}.{self.output}", self.mlp[-1])

    def norms_query(self, config: Any) -> bool:
        """Whether a model with that transformers config norms queries and keys after their projections."""
        return self.query_norm is not None and (not self.optional_query_norm or bool(config.qk_layernorm))

    def multiplier(self, config: Any) -> float:
        """What a model with that transformers config multiplies by before it adds to the hidden states."""
        return 1.0 if self.residual_multiplier is None else float(getattr(config, self.residual_multiplier))

    @property
    def edited(self) -> tuple[str, ...]:
        """The modules of a layer that surgery may replace, a parent before its child."""
        return (f"{self.attention}.{self.output}", *self.mlp, self.down, *(self.post_norms or ()))


POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")


def _packed(title: str, note: str, name: str, packing: Packing, **paths: str | None) -> Architecture:
    """The row of a family with one projection for query, key and value."""
    sides = {"query": name, "key": name, "value": name}
    return Architecture(title, note, packing=packing, direct=True, **sides, **paths)  # type: ignore[arg-type]


ARCHITECTURES: dict[str, Architecture] = {
    "gemma": Architecture("Gemma", "scaled embeddings"),
    "gemma2": Architecture("Gemma 2", "softcaps, windows in every other layer", post_norms=POST_NORMS),
    "gemma3_text": Architecture(
        "Gemma 3 (text)",
        "q and k norms, windows in most layers, two RoPEs",
        query_norm="q_norm",
        post_norms=POST_NORMS,
    ),
    "gpt2": _packed(
        "GPT-2",
        "learned positions, packed projection",
        "c_attn",
        "blocks",
        layers="transformer.h",
        attention="attn",
        output="c_proj",
        rotary=None,
        down="mlp.c_proj",
    ),
    "gpt_neox": _packed(
        "GPT-NeoX, Pythia",
        "partial RoPE, parallel residual, packed projection",
        "query_key_value",
        "heads",
        layers="gpt_neox.layers",
        attention="attention",
        output="dense",
        rotary="gpt_neox.rotary_emb",
        down="mlp.dense_4h_to_h",
    ),
    "granite": Architecture(
        "Granite", "scaled embeddings, residuals and logits", residual_multiplier="residual_multiplier"
    ),
    "llama": Architecture("Llama, SmolLM, TinyLlama", "RoPE scaling: linear, llama3, yarn"),
    "mistral": Architecture("Mistral", "sliding window"),
    "olmo2": Architecture(
        "OLMo 2", "q and k norms over all heads, norms after blocks", query_norm="q_norm", post_norms=POST_NORMS
    ),
    "opt": Architecture(
        "OPT",
        "learned positions",
        layers="model.decoder.layers",
        output="out_proj",
        rotary=None,
        scaled_query=True,
        mlp=("fc1", "activation_fn", "fc2"),
        down="fc2",
    ),
    "phi": Architecture(
        "Phi-1.5, Phi-2",
        "partial RoPE, parallel residual",
        output="dense",
        direct=True,
        query_norm="q_layernorm",
        optional_query_norm=True,
        down="mlp.fc2",
    ),
    "phi3": _packed("Phi-3, Phi-4", "packed projection, partial RoPE, LongRoPE, window", "qkv_proj", "blocks"),
    "qwen2": Architecture("Qwen2, Qwen2.5", "biases on q, k and v"),
    "qwen3": Architecture("Qwen3", "q and k norms", query_norm="q_norm"),
    "smollm3": Architecture("SmolLM3", "layers without RoPE"),
    "stablelm": Architecture(
        "StableLM", "partial RoPE", direct=True, query_norm="q_layernorm", optional_query_norm=True
    ),
    "starcoder2": Architecture("StarCoder2", "biases, sliding window", down="mlp.c_proj"),
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
            fix=_fix(model_type),
        )
    return ARCHITECTURES[model_type]


def _fix(model_type: str) -> str:
    """The family that was meant, where the name looks like a slip; a name that transformers knows is none."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    supported = f"supported: {', '.join(sorted(ARCHITECTURES))}"
    if model_type in CONFIG_MAPPING_NAMES:
        return supported
    alike = [name for name in ARCHITECTURES if DIGITS.findall(name) == DIGITS.findall(model_type)]
    return suggestion(model_type, alike, supported)
