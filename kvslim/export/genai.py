"""`genai_config.json`, with which onnxruntime-genai opens an artifact unmodified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvslim.contract import WINDOW_SLACK, ModelSpec
from kvslim.types import KVLayout

GENAI_MAX_LENGTH = 2048
SAMPLING = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}


def end_tokens(generation: int | Sequence[int] | None, tokenizer: int | None, vocab_size: int) -> list[int]:
    """The tokens that end a text, each once and all of them in the vocabulary.

    Args:
        generation: What the model's generation config names.
        tokenizer: The tokenizer's own end token. Chat models end a turn with it, and many name only the end of a
            document in their configs; a client that reads those would let the model speak for the user.
        vocab_size: onnxruntime-genai refuses an end token beyond it.
    """
    named = [generation] if isinstance(generation, int) else list(generation or ())
    found = dict.fromkeys([*named, *([] if tokenizer is None else [tokenizer])])
    return [token for token in found if 0 <= token < vocab_size]


def genai_config(
    spec: ModelSpec, layout: KVLayout, generation: Mapping[str, Any], *, inputs: tuple[str, ...]
) -> dict[str, Any]:
    """`genai_config.json` for onnxruntime-genai 0.18, with past and present in one buffer.

    Without an end token genai stops at the padding token, and without that at token 0: it knows no endless text.

    Args:
        spec: The model's shape.
        layout: The graph's KV inputs; genai takes each layer's own shape from the graph, the widest stands here.
        generation: The model's generation config; tokens it does not name, or that the vocabulary lacks, are left out.
        inputs: Graph inputs other than the cache.
    """
    model = {
        "type": "decoder",
        "vocab_size": spec.vocab_size,
        "context_length": spec.max_context,
        **_special_tokens(generation, spec.vocab_size),
        "decoder": _genai_decoder(spec, layout, inputs),
    }
    return {"model": model, "search": _genai_search(min(GENAI_MAX_LENGTH, spec.max_context), generation)}


def _special_tokens(generation: Mapping[str, Any], vocab_size: int) -> dict[str, int | list[int]]:
    ends = end_tokens(generation.get("eos_token_id"), None, vocab_size)
    tokens: dict[str, int | list[int]] = {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    for name, default in {"bos_token_id": None, "pad_token_id": next(iter(ends), None)}.items():
        token = generation.get(name)
        usable = token if isinstance(token, int) and 0 <= token < vocab_size else default
        if usable is not None:
            tokens[name] = usable
    return tokens


def _genai_decoder(spec: ModelSpec, layout: KVLayout, inputs: tuple[str, ...]) -> dict[str, Any]:
    return {
        "filename": "model.onnx",
        "session_options": {"provider_options": []},
        "hidden_size": spec.hidden_size,
        "head_size": max(tensor.dim for tensor in layout.tensors),
        "num_attention_heads": spec.q_heads,
        "num_key_value_heads": max(tensor.heads for tensor in layout.tensors),
        "num_hidden_layers": spec.layers,
        **_sliding_window(layout),
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


def _sliding_window(layout: KVLayout) -> dict[str, Any]:
    """The layers whose cache has a fixed number of rows, where others have not; genai then gives those their rows.

    It knows one number for all, and allocates the operator's slack beside the window that it is told.
    """
    kept = {tensor.layer: tensor.kept for tensor in layout.tensors}
    fixed = {layer: rows for layer, rows in kept.items() if rows is not None}
    rows = next(iter(fixed.values()), 0)
    if len(fixed) == len(kept) or set(fixed.values()) != {rows} or rows <= WINDOW_SLACK:
        return {}
    window = {"window_size": rows - WINDOW_SLACK, "layers": sorted(fixed)}
    return {"sliding_window": {**window, "slide_key_value_cache": False, "slide_inputs": False}}


def _genai_search(max_length: int, generation: Mapping[str, Any]) -> dict[str, Any]:
    # genai allocates the cache for all of max_length at the start, so the model's whole context would cost memory.
    return {
        "max_length": max_length,
        "min_length": 0,
        "num_beams": 1,
        "past_present_share_buffer": True,
        **{name: default if generation.get(name) is None else generation[name] for name, default in SAMPLING.items()},
    }
