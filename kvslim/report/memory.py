"""The memory that a KV cache asks for, told from a config or a manifest alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvslim.types import Frozen, KVLayout, KVTensor, Manifest, ModelSpec, Plan

PRECISIONS = {"fp32": 4, "fp16": 2, "int8": 1}
AS_IS = "as it is"


class LayerMemory(Frozen):
    """The cache of one layer.

    `key_dim` and `value_dim` are cached numbers per head and token; `bytes_per_token` is keyed by precision, and with
    packed codes it is theirs. `window` and `sinks` are the tokens kept, or with packed codes kept exact.
    """

    layer: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: str
    window: int | None
    sinks: int | None
    bytes_per_token: dict[str, int]


class CacheMemory(Frozen):
    """The cache of a whole model or artifact; `mib` is keyed by context length in tokens, then by precision."""

    model_type: str
    max_context: int
    layers: tuple[LayerMemory, ...]
    kv_bytes_per_token: dict[str, int]
    mib: dict[str, dict[str, float]]


def model_memory(spec: ModelSpec, contexts: Sequence[int]) -> CacheMemory:
    """What a model's own cache takes in each precision, at each context length in tokens."""
    layout = KVLayout.of(spec, Plan.identity(spec))
    return _memory(spec, layout, dict(PRECISIONS), contexts)


def artifact_memory(manifest: Manifest, contexts: Sequence[int]) -> CacheMemory:
    """What an artifact's cache takes as it is, at each context length in tokens."""
    return _memory(manifest.spec, manifest.kv_layout, {AS_IS: None}, contexts)


def _memory(
    spec: ModelSpec, layout: KVLayout, precisions: Mapping[str, int | None], contexts: Sequence[int]
) -> CacheMemory:
    layers = tuple(_layer(layout, index, precisions) for index in sorted({tensor.layer for tensor in layout.tensors}))
    total = {name: sum(layer.bytes_per_token[name] for layer in layers) for name in precisions}
    return CacheMemory(
        model_type=spec.model_type,
        max_context=spec.max_context,
        layers=layers,
        kv_bytes_per_token=total,
        mib={
            str(tokens): {name: _bytes_at(layout, tokens, width) / 2**20 for name, width in precisions.items()}
            for tokens in contexts
        },
    )


def _bytes_at(layout: KVLayout, tokens: int, width: int | None) -> int:
    """Bytes of the cache at a context, with numbers of so many bytes or as they are."""
    return sum(_row_bytes(tensor, width) * tensor.rows(tokens) for tensor in layout.tensors)


def _row_bytes(tensor: KVTensor, width: int | None) -> int:
    return tensor.bytes_per_token if width is None else tensor.heads * tensor.dim * width


def _layer(layout: KVLayout, index: int, precisions: Mapping[str, int | None]) -> LayerMemory:
    tensors = [tensor for tensor in layout.tensors if tensor.layer == index]
    key, value = tensors[-2:]  # with packed codes, these
    return LayerMemory(
        layer=index,
        heads=key.heads,
        key_dim=key.dim,
        value_dim=value.dim,
        dtype=key.dtype,
        window=key.window,
        sinks=key.sinks,
        bytes_per_token={name: _row_bytes(key, width) + _row_bytes(value, width) for name, width in precisions.items()},
    )
