"""The memory that a KV cache asks for, told from a config or a manifest alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvslim.types import Frozen, KVLayout, Manifest, ModelSpec, Plan

PRECISIONS = {"fp32": 4, "fp16": 2, "int8": 1}
AS_IS = "as it is"


class LayerMemory(Frozen):
    """The cache of one layer.

    `key_dim` and `value_dim` are cached numbers per head and token; `bytes_per_token` is keyed by precision.
    """

    layer: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: str
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
    rows = {tokens: {tensor.layer: tensor.rows(tokens) for tensor in layout.tensors} for tokens in contexts}
    return CacheMemory(
        model_type=spec.model_type,
        max_context=spec.max_context,
        layers=layers,
        kv_bytes_per_token=total,
        mib={
            str(tokens): {
                name: sum(layer.bytes_per_token[name] * rows[tokens][layer.layer] for layer in layers) / 2**20
                for name in precisions
            }
            for tokens in contexts
        },
    )


def _layer(layout: KVLayout, index: int, precisions: Mapping[str, int | None]) -> LayerMemory:
    tensors = {tensor.kind: tensor for tensor in layout.tensors if tensor.layer == index}
    numbers = sum(tensor.heads * tensor.dim for tensor in tensors.values())
    stored = sum(tensor.bytes_per_token for tensor in tensors.values())
    key, value = tensors["key"], tensors["value"]
    return LayerMemory(
        layer=index,
        heads=key.heads,
        key_dim=key.dim,
        value_dim=value.dim,
        dtype=key.dtype,
        bytes_per_token={name: stored if width is None else numbers * width for name, width in precisions.items()},
    )
