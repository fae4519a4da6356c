"""What a kind of cache is, and the registry that plans, graphs and sessions read.

A kind is one class: its fields are what a plan says of a layer's cache, its methods the tensors that this puts into the
graph, and how a session holds and binds them. None of it imports torch. What the kind computes in torch, and the
operators that it becomes in a graph, is the `CacheAttention` that `attention()` gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from kvslim.contract import CacheType, Frozen, KVTensor, Layout, ModelSpec
from kvslim.errors import UsageError

if TYPE_CHECKING:
    import onnxruntime as ort

    from kvslim.caches.attention.base import CacheAttention
    from kvslim.caches.buffers import LayerBuffers
    from kvslim.contract import Axes
    from kvslim.transform.edits import LayerEdit

CACHES: dict[str, type[Cache]] = {}


class Place(Frozen):
    """The layer that a cache belongs to.

    Attributes:
        layer: Its index.
        kv_heads: Kv heads that are kept.
        window: Tokens that the model's own sliding window keeps, or None.
    """

    layer: int
    kv_heads: int
    window: int | None


class Cache(Frozen):
    """How a layer keeps its keys and values; a plan names it by `kind`.

    Attributes:
        kind: The name; a subclass gives it a default, under which it is registered.
        has_tensors: Whether the layer has a cache of its own.
        replaces_attention: Whether the kind alone, without any numbers fitted to it, changes what the layer computes.
        layouts: Operator sets that can express it.
        metadata: Key of the graph's metadata under which layers of this kind note what no shape tells, or None.
        note_type: Type of such a note, for pydantic.
    """

    kind: str
    has_tensors: ClassVar[bool] = True
    replaces_attention: ClassVar[bool] = False
    layouts: ClassVar[tuple[Layout, ...]] = ("gqa", "attention24")
    metadata: ClassVar[str | None] = None
    note_type: ClassVar[Any] = object

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if isinstance(name := cls.model_fields["kind"].default, str):
            CACHES[name] = cls

    @property
    def dtype(self) -> CacheType:
        """How most of its numbers are stored."""
        return "float32"

    @property
    def kept(self) -> tuple[int, int] | None:
        """Recent tokens and sinks that are kept as they are, where not all tokens are; None where they are."""
        return None

    def widths(self, head_dim: int) -> tuple[int, int]:
        """Numbers that a head of the cache holds of a token's key, and of its value."""
        return head_dim, head_dim

    def check(self, spec: ModelSpec, layer: int, layout: Layout, where: str) -> None:
        """Refuses what no graph can hold.

        Raises:
            UsageError: Naming `where` it was asked for.
        """
        if layout not in self.layouts:
            message = f"layout {layout} has no {self.kind} cache"
            raise UsageError(message, where=where, fix=f"use layout {self.layouts[0]}")

    def check_storage(self, spec: ModelSpec, layer: int, where: str) -> None:
        """Refuses numbers per head that the kernel cannot read.

        Raises:
            UsageError: Naming `where` they were asked for.
        """

    def describe(self, spec: ModelSpec) -> str:
        """The cache in a few words, for reasons and reports."""
        raise NotImplementedError

    def tensors(self, spec: ModelSpec, place: Place) -> tuple[KVTensor, ...]:
        """The KV inputs of the layer, in the order of the graph."""
        raise NotImplementedError

    def attention(self, edit: LayerEdit) -> CacheAttention:
        """What a layer with this cache computes, in torch and in a graph.

        Args:
            edit: All that is fitted to the layer; the numbers lie in the layer's module already.
        """
        raise NotImplementedError

    @classmethod
    def tensor_class(cls, kind: str) -> type[KVTensor]:
        """The class of the tensors of one kind ("key", "value", ...)."""
        return KVTensor

    @classmethod
    def note(cls, tensors: Sequence[KVTensor], attention: CacheAttention) -> object:
        """What the graph's metadata are to say of a layer."""
        return None

    @classmethod
    def claims(cls, note: Any) -> bool:
        """Whether a note under the key `metadata` is of this kind."""
        return True

    @classmethod
    def read_tensors(cls, nodes: Sequence[ort.NodeArg], note: Any) -> tuple[KVTensor, ...] | None:
        """The tensors that a layer's graph inputs are; None where they are not of this kind.

        Args:
            nodes: The layer's inputs, in the graph's order.
            note: What the graph's metadata say of the layer.
        """
        raise NotImplementedError

    @classmethod
    def buffers(cls) -> type[LayerBuffers]:
        """How a session holds the tensors of one layer."""
        from kvslim.caches.buffers import LayerBuffers

        return LayerBuffers

    @classmethod
    def inputs(cls, tensors: Sequence[KVTensor]) -> dict[str, Axes]:
        """Integer inputs of the graph, besides the cache, that a layer needs; by name."""
        return {}

    @classmethod
    def outputs(cls, tensors: Sequence[KVTensor]) -> dict[str, Axes]:
        """Outputs of the graph, besides the cache, that a layer gives; by name."""
        return {}


def read_cache(value: object) -> object:
    """A cache from JSON: its kind says which class reads the rest."""
    if not isinstance(value, dict):
        return value
    return known_cache(value.get("kind", "full")).model_validate(value)


def known_cache(kind: object) -> type[Cache]:
    """The registered kind of that name, which JSON gives.

    Raises:
        ValueError: There is none.
    """
    if not isinstance(kind, str) or kind not in CACHES:
        raise ValueError(f"unknown kind of cache {kind!r}; known are {', '.join(CACHES)}")
    return CACHES[kind]
