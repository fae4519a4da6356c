"""A picture of a cache: how many dimensions and bits each layer keeps of each head's keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from kvslim.contract import BITS, KVTensor, ModelSpec
from kvslim.types import LayerPlan, Manifest

WIDTH, ROW, TOP = 360, 16, 22
KEYS, VALUES, SIDE, NOTE = 28, 134, 100, 242  # left edges of the columns, and the width of a side
GAP = 2


def layer_map(manifest: Manifest) -> str:
    """The picture's SVG: a row per layer, a box per kv head, filled by the share of its dimensions that is kept.

    Args:
        manifest: The manifest of a decoder. Its spec sets the boxes, its KV layout how full they are.
    """
    spec, height = manifest.spec, TOP + ROW * manifest.spec.layers + 4
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="What each layer caches">',
        "<title>What each layer caches</title>",
        f'<text class="label" x="{KEYS}" y="12">keys</text><text class="label" x="{VALUES}" y="12">values</text>',
    ]
    for layer in manifest.plan.layers:
        tensors = manifest.kv_layout.sides(layer.layer)
        parts.extend(_row(spec, layer, tensors, TOP + ROW * layer.layer))
    return "\n".join([*parts, "</svg>"])


def stored_bits(manifest: Manifest) -> tuple[int, ...]:
    """The bit widths in the picture, the largest first."""
    return tuple(sorted({BITS[tensor.dtype] for tensor in manifest.kv_layout.tensors}, reverse=True))


def _row(spec: ModelSpec, layer: LayerPlan, tensors: Sequence[KVTensor], top: int) -> Iterator[str]:
    note = _note(tensors)
    yield f"<g><title>{escape(f'layer {layer.layer}: {note}; {layer.reason}')}</title>"
    yield f'<text x="{KEYS - 6}" y="{top + 11}" text-anchor="end">{layer.layer}</text>'
    for index, left in enumerate((KEYS, VALUES)):
        yield from _side(spec, layer, tensors[index] if tensors else None, left, top)
    yield f'<text x="{NOTE}" y="{top + 11}">{escape(note)}</text></g>'


def _side(spec: ModelSpec, layer: LayerPlan, tensor: KVTensor | None, left: int, top: int) -> Iterator[str]:
    """The boxes of one side of a layer; those of removed heads stay empty."""
    pitch = SIDE / spec.kv_heads
    width = pitch - min(GAP, pitch / 4)
    kept = layer.kv_heads(spec)[: tensor.heads] if tensor else ()
    for head in range(spec.kv_heads):
        place = f'x="{left + pitch * head:.1f}" y="{top}" height="{ROW - 4}"'
        yield f'<rect class="box" {place} width="{width:.1f}"/>'
        if tensor is not None and head in kept:
            share = min(1.0, tensor.dim / spec.head_dim)
            yield f'<rect class="b{BITS[tensor.dtype]}" {place} width="{width * share:.1f}"/>'


def _note(tensors: Sequence[KVTensor]) -> str:
    """Dimensions, type and window of a layer's cache, in short."""
    if not tensors:
        return "no cache"
    key, value = tensors
    dims = str(key.dim) if key.dim == value.dim else f"{key.dim}/{value.dim}"
    window = "" if key.window is None else f", {f'{key.sinks}+' if key.sinks else ''}{key.window}"
    return f"{dims} {_SHORT.get(key.dtype, key.dtype)}{window}"


_SHORT = {"float32": "fp32", "codes3": "3 bits", "codes2": "2 bits", "codes1": "1 bit"}
