"""The encoder families: the inputs of their graphs, and their shape from config.json."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from kvslim.contract import ModelSpec, Task
from kvslim.errors import UnsupportedError
from kvslim.loading.architecture import Architecture
from kvslim.loading.config import broken_config, model_config, wrong_value

# Parts on top of an encoder, which its hidden states do not need.
HEADS = re.compile(r"^(?:\w+\.)?(?:pooler|cls|lm_head|classifier|pre_classifier|qa_outputs|vocab_\w+)\.")


@dataclass(frozen=True)
class Encoder(Architecture):
    """A family of encoders in transformers; module paths start at the model without its head.

    Attributes:
        token_types: Whether the model takes `token_type_ids`, which mark the sentences of a pair.
        pooler: Whether the bare model has a pooler, which mean-pooled embeddings do not use.
        offset_positions: Whether positions count only attended tokens, starting one after the padding token's id.
    """

    token_types: bool = False
    pooler: bool = False
    offset_positions: bool = False


def _encoder(title: str, note: str, *, token_types: bool = False, offset_positions: bool = False) -> Encoder:
    """The row of a family whose layers have the same names as BERT's."""
    return Encoder(
        title,
        note,
        layers="encoder.layer",
        attention="attention",
        query="self.query",
        key="self.key",
        value="self.value",
        output="output.dense",
        rotary=None,
        mlp=("intermediate", "output.dense"),
        down="output.dense",
        token_types=token_types,
        pooler=True,
        offset_positions=offset_positions,
    )


ENCODERS: dict[str, Encoder] = {
    "bert": _encoder("BERT, MiniLM, BGE, E5", "encoder; sentence pairs", token_types=True),
    "distilbert": Encoder(
        "DistilBERT",
        "encoder",
        layers="transformer.layer",
        attention="attention",
        query="q_lin",
        key="k_lin",
        value="v_lin",
        output="out_lin",
        rotary=None,
        mlp=("ffn",),
        down="ffn.lin2",
    ),
    "roberta": _encoder("RoBERTa", "encoder; positions from the mask", offset_positions=True),
}


def encoder_inputs(spec: ModelSpec) -> tuple[str, ...]:
    """The inputs of an encoder's graph, in order."""
    types = ("token_type_ids",) if ENCODERS[spec.model_type].token_types else ()
    return ("input_ids", "attention_mask", *types)


def encoder_spec(raw: dict[str, Any], where: str) -> ModelSpec:
    """The shape of an encoder, from its config alone.

    Args:
        raw: config.json.
        where: Its path, for errors.

    Raises:
        ModelError: The config is broken or contradicts itself.
        UnsupportedError: The config makes the model a decoder, or its positions are relative.
    """
    config = model_config(raw, where)
    if ENCODERS[config.model_type].offset_positions and config.pad_token_id is None:
        fault = "positions are counted from the padding token, which the vocabulary lacks"
        raise wrong_value("pad_token_id", raw.get("pad_token_id"), fault, where)
    try:
        spec = _spec(config)
    except Exception as error:  # values of another type or size than arithmetic can take
        raise broken_config(error, raw, where) from error
    _refuse_unsupported(raw, where)
    return spec


def _spec(config: Any) -> ModelSpec:
    heads, hidden = config.num_attention_heads, config.hidden_size
    if min(heads, hidden, config.num_hidden_layers) < 1 or hidden % heads:
        raise ValueError(f"{heads} heads do not divide the hidden size {hidden}")
    offset = config.pad_token_id + 1 if ENCODERS[config.model_type].offset_positions else 0
    return ModelSpec(
        model_type=config.model_type,
        layers=config.num_hidden_layers,
        hidden_size=hidden,
        q_heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocab_size=config.vocab_size,
        max_context=config.max_position_embeddings - offset,
        windows=(None,) * config.num_hidden_layers,
        task=_task(config.architectures),
    )


def _task(architectures: list[str] | None) -> Task:
    return "fill-mask" if any(name.endswith("ForMaskedLM") for name in architectures or ()) else "feature-extraction"


def _refuse_unsupported(raw: dict[str, Any], where: str) -> None:
    if raw.get("is_decoder"):
        raise UnsupportedError(
            f"a {raw['model_type']} used as a decoder is not supported",
            where=where,
            fix="use an encoder, or a causal model",
        )
    positions = raw.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise UnsupportedError(
            f"position embeddings {positions!r} are not supported",
            where=where,
            fix="use a model with absolute position embeddings",
        )
