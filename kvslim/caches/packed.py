"""The packed cache: a ring of exact sinks and recent tokens, and packed codes of all that left it.

Codes are uint8 [batch, rows, heads, dim * bits / 8], so that a row can be appended in place. No runtime but KVSlim's
appends them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

from pydantic import Field

from kvslim.caches.base import Place
from kvslim.caches.coded import check_rank
from kvslim.caches.full import check_rotation
from kvslim.caches.window import RingCache, RingNote, RingTensor, read_rings, ring_tensors
from kvslim.contract import BATCH, BITS, Axes, CacheType, Kind, KVTensor, Layout, ModelSpec

if TYPE_CHECKING:
    import onnxruntime as ort

    from kvslim.caches.attention.base import CacheAttention
    from kvslim.caches.buffers import LayerBuffers
    from kvslim.transform.edits import LayerEdit

CODES: dict[int, CacheType] = {3: "codes3", 2: "codes2", 1: "codes1"}
PAST_CODES, NEW_CODES = "past_code_length", "new_code_length"


class PackedTensor(KVTensor):
    """Packed codes, uint8 [batch, rows, heads, dim * bits / 8], of the tokens that left the window."""

    cache: str = "packed"

    @property
    def present(self) -> str:
        """Name of the graph output: the new rows alone, which a client must not take for all."""
        return f"appended.{self.layer}.{self.kind}"

    def rows(self, context: int) -> int:
        """Rows to allocate for a context of that many tokens."""
        return max(0, context - (self.kept or 0))

    def past_axes(self, layout: Layout) -> Axes:
        """Axes of the graph input."""
        return (BATCH, PAST_CODES, self.heads, self.columns)

    def present_axes(self, layout: Layout) -> Axes:
        """Axes of the graph output."""
        return (BATCH, NEW_CODES, self.heads, self.columns)


class PackedCache(RingCache):
    """Sinks and a window exact; all other tokens in 3, 2 or 1 bits."""

    kind: Literal["packed"] = "packed"
    bits: Literal[3, 2, 1] = Field(description="of a packed number")

    @property
    def dtype(self) -> CacheType:
        """How most of its numbers are stored."""
        return CODES[self.bits]

    def check(self, spec: ModelSpec, layer: int, layout: Layout, where: str) -> None:
        """Refuses ranks that have no code."""
        super().check(spec, layer, layout, where)
        ranks = self.ranks(spec.head_dim)
        for rank in ranks:
            check_rank(rank, spec, None, where)
        check_rotation(self.rotation, self.rank, ranks, where)

    def describe(self, spec: ModelSpec) -> str:
        """Ranks and bits, and the tokens kept exact."""
        return f"{super().describe(spec)} in {self.bits} bits, {self.sinks} sinks and {self.window} recent tokens exact"

    def tensors(self, spec: ModelSpec, place: Place) -> tuple[KVTensor, ...]:
        """Key and value of the ring, then their codes."""
        dims = self.widths(spec.head_dim)
        rings = ring_tensors("packed", place, dims, self.window, self.sinks, stored="float32")
        codes = (
            PackedTensor(
                layer=place.layer,
                kind=cast("Kind", f"{side}_codes"),
                heads=place.kv_heads,
                dim=dim,
                dtype=self.dtype,
                window=self.window,
                sinks=self.sinks,
            )
            for side, dim in zip(("key", "value"), dims, strict=True)
        )
        return (*rings, *codes)

    def attention(self, edit: LayerEdit) -> CacheAttention:
        """Stock operators over codes, ring and new tokens."""
        from kvslim.caches.attention.packed import PackedAttention
        from kvslim.caches.attention.window import Ring

        return PackedAttention(Ring(self.window, self.sinks))

    @classmethod
    def claims(cls, note: RingNote) -> bool:
        """Whether there are codes behind the ring."""
        return note.cache in CODES.values()

    @classmethod
    def tensor_class(cls, kind: str) -> type[KVTensor]:
        """Codes, or the ring before them."""
        return PackedTensor if kind.endswith("_codes") else RingTensor

    @classmethod
    def read_tensors(cls, nodes: Sequence[ort.NodeArg], note: RingNote) -> tuple[KVTensor, ...] | None:
        """Two rings, and two tensors of codes behind them."""
        rings = read_rings("packed", nodes[:2], note.sinks)
        if rings is None or len(nodes) != 4:
            return None
        codes = [_read_codes(node, rings[0].window, note) for node in nodes[2:]]
        return None if None in codes else (*rings, *(tensor for tensor in codes if tensor is not None))

    @classmethod
    def buffers(cls) -> type[LayerBuffers]:
        """Rings, and codes that are appended."""
        from kvslim.caches.buffers import PackedBuffers

        return PackedBuffers


def _read_codes(node: ort.NodeArg, window: int | None, note: RingNote) -> KVTensor | None:
    _, layer, kind = node.name.split(".")
    if node.type != "tensor(uint8)" or len(node.shape) != 4 or not kind.endswith("_codes"):
        return None
    _, _, heads, columns = node.shape
    if not isinstance(heads, int) or not isinstance(columns, int):
        return None
    return PackedTensor(
        layer=int(layer),
        kind=cast("Kind", kind),
        heads=heads,
        dim=columns * 8 // BITS[note.cache],
        dtype=note.cache,
        window=window,
        sinks=note.sinks,
    )
