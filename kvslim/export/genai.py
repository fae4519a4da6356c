"""`genai_config.json`, with which onnxruntime-genai opens an artifact unmodified."""

from __future__ import annotations

from typing import Any

from kvslim.types import KVLayout, ModelSpec

GENAI_MAX_LENGTH = 2048


def genai_config(
    spec: ModelSpec,
    layout: KVLayout,
    *,
    bos: int | None,
    eos: int | list[int] | None,
    pad: int | None,
    context_length: int,
    inputs: tuple[str, ...],
) -> dict[str, Any]:
    """`genai_config.json` for onnxruntime-genai 0.18, with past and present in one buffer.

    Args:
        spec: The model's shape.
        layout: The graph's KV inputs; genai takes each layer's own shape from the graph, the widest stands here.
        bos: First token of a text, if the model has one.
        eos: Token or tokens that end a text.
        pad: Filling token; the first end token where the model has none.
        context_length: Positions the model can take, in tokens.
        inputs: Graph inputs other than the cache.
    """
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    tokens = {
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad if pad is not None else next(iter(ends), None),
    }
    model = {
        "type": "decoder",
        "vocab_size": spec.vocab_size,
        "context_length": context_length,
        **{name: value for name, value in tokens.items() if value is not None},
        "decoder": _genai_decoder(spec, layout, inputs),
    }
    return {"model": model, "search": _genai_search(min(GENAI_MAX_LENGTH, context_length))}


def _genai_decoder(spec: ModelSpec, layout: KVLayout, inputs: tuple[str, ...]) -> dict[str, Any]:
    return {
        "filename": "model.onnx",
        "session_options": {"provider_options": []},
        "hidden_size": spec.hidden_size,
        "head_size": max(tensor.dim for tensor in layout.tensors),
        "num_attention_heads": spec.q_heads,
        "num_key_value_heads": max(tensor.heads for tensor in layout.tensors),
        "num_hidden_layers": spec.layers,
        "inputs": {
            **{name: name for name in inputs},
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }


def _genai_search(max_length: int) -> dict[str, Any]:
    # genai allocates the cache for all of max_length at the start, so the model's whole context would cost memory.
    return {
        "max_length": max_length,
        "min_length": 0,
        "do_sample": False,
        "num_beams": 1,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "past_present_share_buffer": True,
    }
