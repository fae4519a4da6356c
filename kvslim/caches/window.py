"""The window cache: attention sinks and recent tokens, in a ring of constant size.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field

from kvslim.caches.base import Cache, Place
from kvslim.caches.coded import CodedCache, IntegerCache, check_widths, rank_step
from kvslim.caches.full import STORED, check_codes
from kvslim.contract import BATCH, BITS, Axes, CacheType, Frozen, Kind, KVTensor, Layout, ModelSpec
from kvslim.errors import UsageError

if TYPE_CHECKING:
    import onnxruntime as ort

    from kvslim.caches.attention.base import CacheAttention
    from kvslim.caches.buffers import LayerBuffers
    from kvslim.transform.edits import LayerEdit

RINGS = "kvslim.rings"  # the graph's metadata: sinks of each ring, and how its layer stores, by layer


class RingNote(Frozen):
    """What no shape tells of a layer with a ring: its sinks, and how it stores what is not in the ring."""

    sinks: int
    cache: CacheType


class RingTensor(KVTensor):
    """Rows for sinks and for recent tokens; past and present have the same."""

    cache: str = "window"

    def _axes(self, rows: str) -> Axes:
        return (BATCH, self.heads, self.rows(0), self.columns)


class RecentCache(Cache):
    """A cache that keeps sinks and recent tokens as they are."""

    window: int = Field(description="recent tokens kept as they are")
    sinks: int = Field(0, description="first tokens kept beside the window")
    layouts: ClassVar[tuple[Layout, ...]] = ("gqa",)

    @property
    def kept(self) -> tuple[int, int] | None:
        """Recent tokens and sinks that are kept as they are."""
        return self.window, self.sinks

    def check(self, spec: ModelSpec, layer: int, layout: Layout, where: str) -> None:
        """Refuses windows without a token."""
        super().check(spec, layer, layout, where)
        if self.window < 1 or self.sinks < 0:
            message = f"a window of {self.window} tokens with {self.sinks} sinks"
            raise UsageError(message, where=where, fix="use window >= 1, sinks >= 0")


class RingCache(RecentCache, CodedCache):
    """A cache of coordinates with a ring of sinks and recent tokens."""

    metadata: ClassVar[str | None] = RINGS
    note_type: ClassVar[Any] = RingNote

    @classmethod
    def note(cls, tensors: Sequence[KVTensor], attention: CacheAttention) -> object:
        """Sinks, and how what is not in the ring is stored, or the ring itself."""
        return {"sinks": tensors[0].sinks, "cache": tensors[-1].dtype}


class WindowCache(RingCache, IntegerCache):
    """Sinks and a window; all other tokens are forgotten."""

    kind: Literal["window"] = "window"
    replaces_attention: ClassVar[bool] = True

    def check(self, spec: ModelSpec, layer: int, layout: Layout, where: str) -> None:
        """Refuses codes that the ring cannot hold."""
        super().check(spec, layer, layout, where)
        check_codes(self, spec, layout, where)
        self.check_storage(spec, layer, where)

    def check_storage(self, spec: ModelSpec, layer: int, where: str) -> None:
        """A ring takes any width that the ranks allow."""
        check_widths(self, spec, layer, rank_step(spec.windows[layer]), where)

    def describe(self, spec: ModelSpec) -> str:
        """Ranks, and the tokens kept."""
        return f"{super().describe(spec)}, of {self.sinks} sinks and {self.window} recent tokens"

    def tensors(self, spec: ModelSpec, place: Place) -> tuple[KVTensor, ...]:
        """Key and value."""
        return ring_tensors("window", place, self.widths(spec.head_dim), self.window, self.sinks, stored=self.stored)

    def attention(self, edit: LayerEdit) -> CacheAttention:
        """One fused operator over the ring and the new tokens."""
        from kvslim.caches.attention.window import Ring, WindowAttention

        return WindowAttention(Ring(self.window, self.sinks))

    @classmethod
    def claims(cls, note: RingNote) -> bool:
        """Whether nothing but the ring is kept."""
        return BITS[note.cache] > 3

    @classmethod
    def tensor_class(cls, kind: str) -> type[KVTensor]:
        """A ring."""
        return RingTensor

    @classmethod
    def read_tensors(cls, nodes: Sequence[ort.NodeArg], note: RingNote) -> tuple[KVTensor, ...] | None:
        """Key and value with a fixed number of rows, more than there are sinks."""
        if len(nodes) != 2:
            return None
        return read_rings("window", nodes, note.sinks)

    @classmethod
    def buffers(cls) -> type[LayerBuffers]:
        """Rings."""
        from kvslim.caches.buffers import RingBuffers

        return RingBuffers


def ring_tensors(
    cache: str, place: Place, dims: tuple[int, int], window: int, sinks: int, *, stored: Any
) -> tuple[KVTensor, ...]:
    """Key and value in a ring each."""
    common: dict[str, Any] = {"cache": cache, "layer": place.layer, "heads": place.kv_heads, "dtype": stored}
    key, value = dims
    return tuple(
        RingTensor(kind=cast("Kind", kind), dim=dim, window=window, sinks=sinks, **common)
        for kind, dim in (("key", key), ("value", value))
    )


def read_rings(cache: str, nodes: Sequence[ort.NodeArg], sinks: int) -> tuple[KVTensor, ...] | None:
    """The rings that graph inputs are; None where they are none."""
    found = []
    for node in nodes:
        _, layer, kind = node.name.split(".")
        if node.type not in STORED or len(node.shape) != 4 or kind not in ("key", "value"):
            return None
        _, heads, rows, columns = node.shape
        if not all(isinstance(length, int) for length in (heads, rows, columns)) or rows <= sinks:
            return None
        stored = STORED[node.type]
        found.append(
            RingTensor(
                cache=cache,
                layer=int(layer),
                kind=cast("Kind", kind),
                heads=heads,
                dim=columns * 2 if stored == "int4" else columns,
                dtype=stored,
                window=rows - sinks,
                sinks=sinks,
            )
        )
    return tuple(found)
