"""The linear cache: a ring of sinks and recent tokens, and a state of constant size of all that left the ring.

Katharopoulos et al., "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention", 2020, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from kvslim.caches.base import Place
from kvslim.caches.window import RecentCache, read_rings, ring_tensors
from kvslim.contract import Frozen, KVTensor, Layout, ModelSpec
from kvslim.errors import UsageError

if TYPE_CHECKING:
    import onnxruntime as ort

    from kvslim.caches.attention.base import CacheAttention
    from kvslim.caches.buffers import LayerBuffers
    from kvslim.transform.edits import LayerEdit


class StateNote(Frozen):
    """What no shape tells of a layer with a state: the sinks of its ring."""

    sinks: int


class StateTensor(KVTensor):
    """A row for each feature: the sum of the values that it weighs, and behind it the sum of the weights."""

    cache: str = "linear"
    features: int

    @property
    def kept(self) -> int | None:
        """Rows, however long the context is."""
        return self.features


class LinearCache(RecentCache):
    """Sinks and a window exact; all other tokens as sums of their values, weighed by features of their keys."""

    kind: Literal["linear"] = "linear"
    features: int = Field(description="rows of the state: what all other tokens are summed up in")
    replaces_attention: ClassVar[bool] = True
    metadata: ClassVar[str | None] = "kvslim.states"
    note_type: ClassVar[Any] = StateNote

    def check(self, spec: ModelSpec, layer: int, layout: Layout, where: str) -> None:
        """Refuses states without a feature, and layers that forget by themselves."""
        super().check(spec, layer, layout, where)
        if self.features < 1:
            raise UsageError(f"a state of {self.features} features", where=where, fix="use features >= 1")
        if spec.windows[layer] is not None:
            raise UsageError(
                f"layer {layer} forgets what leaves its own window, and a state would keep it",
                where=where,
                fix="use kind window, or another layer",
            )

    def describe(self, spec: ModelSpec) -> str:
        """The tokens kept, and the state."""
        return f"{self.sinks} sinks and {self.window} recent tokens, all others in a state of {self.features} features"

    def tensors(self, spec: ModelSpec, place: Place) -> tuple[KVTensor, ...]:
        """Key and value of the ring, then the state."""
        dims = self.widths(spec.head_dim)
        rings = ring_tensors("linear", place, dims, self.window, self.sinks, stored="float32")
        return (*rings, _state(rings, self.features))

    def attention(self, edit: LayerEdit) -> CacheAttention:
        """One softmax over ring, new tokens and state."""
        from kvslim.caches.attention.linear import StateAttention
        from kvslim.caches.attention.window import Ring

        return StateAttention(Ring(self.window, self.sinks))

    @classmethod
    def tensor_class(cls, kind: str) -> type[KVTensor]:
        """The state, or the ring before it."""
        from kvslim.caches.window import RingTensor

        return StateTensor if kind == "state" else RingTensor

    @classmethod
    def note(cls, tensors: Sequence[KVTensor], attention: CacheAttention) -> object:
        """The sinks."""
        return {"sinks": tensors[0].sinks}

    @classmethod
    def read_tensors(cls, nodes: Sequence[ort.NodeArg], note: StateNote) -> tuple[KVTensor, ...] | None:
        """Two rings, and a state behind them."""
        rings = read_rings("linear", nodes[:2], note.sinks)
        if rings is None or len(nodes) != 3 or not nodes[2].name.endswith(".state"):
            return None
        features = nodes[2].shape[2]
        return (*rings, _state(rings, features)) if isinstance(features, int) else None

    @classmethod
    def buffers(cls) -> type[LayerBuffers]:
        """Rings, and sums that cannot be taken back."""
        from kvslim.caches.buffers import StateBuffers

        return StateBuffers


def _state(rings: Sequence[KVTensor], features: int) -> StateTensor:
    """The state behind a ring."""
    value = rings[1]
    shared = value.model_dump(include={"layer", "heads", "dtype", "window", "sinks"})
    return StateTensor(kind="state", dim=value.dim + 1, features=features, **shared)
