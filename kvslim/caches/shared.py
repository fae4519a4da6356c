"""The shared cache: a layer that reads an earlier layer's cache through a fitted map, and has none of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from kvslim.caches.base import Cache, Place
from kvslim.contract import KVTensor, ModelSpec

if TYPE_CHECKING:
    from kvslim.caches.attention.base import CacheAttention
    from kvslim.transform.edits import LayerEdit

SHARED = "shared_"  # then kind.source.layer: outputs of a layer that shares, to lie where its source's cache lies


class SharedCache(Cache):
    """The cache of another layer."""

    kind: Literal["shared"] = "shared"
    source: int = Field(description="earlier layer whose cache this one reads")
    has_tensors: ClassVar[bool] = False
    replaces_attention: ClassVar[bool] = True

    def describe(self, spec: ModelSpec) -> str:
        """Whose cache it is."""
        return f"reads the cache of layer {self.source}"

    def tensors(self, spec: ModelSpec, place: Place) -> tuple[KVTensor, ...]:
        """None: those of the source layer are read."""
        return ()

    def attention(self, edit: LayerEdit) -> CacheAttention:
        """Queries alone, over what the source layer caches."""
        from kvslim.caches.attention.shared import SharedAttention

        return SharedAttention(self.source)
