"""The clustered cache: heads that attend alike share one head's attention, and its keys.

Agarwal et al., "CHAI: Clustered Head Attention for Efficient LLM Inference", 2024. Clusters are fixed at export, or
formed by the runtime from each prompt's first tokens; no other runtime does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field, model_validator

from kvslim.caches.base import Cache, Place
from kvslim.contract import BATCH, CAPACITY, LENGTH, Axes, Clusters, Frozen, Kind, KVTensor, Layout, ModelSpec
from kvslim.errors import UsageError

if TYPE_CHECKING:
    import onnxruntime as ort

    from kvslim.caches.attention.base import CacheAttention
    from kvslim.caches.buffers import LayerBuffers
    from kvslim.transform.edits import LayerEdit

CLUSTERS = "kvslim.clusters"  # the graph's metadata: how many heads attend, by layer
# Inputs of the graph for a layer's dynamic clusters: the query heads that attend [clusters], and for each query head
# the place among them of the one whose attention it takes [q_heads]. The output: the weights of those that attend.
CLUSTER_INPUTS, ATTENTIONS = ("clusters.{}.representatives", "clusters.{}.membership"), "attentions.{}"


class ClustersNote(Frozen):
    """How a layer forms clusters of its heads for each prompt."""

    count: int
    calibrated: list[list[float]]


class ClusteredTensor(KVTensor):
    """Keys or values of a layer whose heads share attention; past and present lie in one buffer of full length."""

    cache: str = "clustered"
    clusters: Clusters

    @property
    def has_dynamic_heads(self) -> bool:
        """Whether the runtime says how many heads there are."""
        return self.clusters == "dynamic" and self.kind == "key"

    def _axes(self, rows: str) -> Axes:
        heads = count_axis(self.layer) if self.has_dynamic_heads else self.heads
        return (BATCH, heads, CAPACITY, self.columns)


class ClusteredCache(Cache):
    """Clusters of query heads: given, or so many that the runtime forms for each prompt."""

    kind: Literal["clustered"] = "clustered"
    clusters: tuple[int, ...] | None = Field(
        None, description="for each query head the one whose attention it takes; None: the runtime forms them"
    )
    count: int | None = Field(None, description="clusters that the runtime forms from each prompt's first tokens")
    replaces_attention: ClassVar[bool] = True
    layouts: ClassVar[tuple[Layout, ...]] = ("gqa",)
    metadata: ClassVar[str | None] = CLUSTERS
    note_type: ClassVar[Any] = ClustersNote | None

    @model_validator(mode="after")
    def _one_way(self) -> ClusteredCache:
        if (self.clusters is None) == (self.count is None):
            raise ValueError("give clusters, or the count of them that the runtime forms")
        return self

    @property
    def mode(self) -> Clusters:
        """When clusters are formed: before export, or for each prompt."""
        return "dynamic" if self.clusters is None else "static"

    @property
    def attending(self) -> int:
        """Query heads with attention of their own, one of each cluster."""
        return len(set(self.clusters)) if self.clusters is not None else self.count or 0

    def check(self, spec: ModelSpec, layer: int, layout: Layout, where: str) -> None:
        """Refuses clusters that the heads cannot form."""
        super().check(spec, layer, layout, where)
        if self.clusters is not None:
            _check_members(self.clusters, spec, where)
            return
        if spec.group_size > 1:
            raise UsageError("dynamic clusters need a kv head for every query head", where=where, fix="use clusters")
        check_number(self.count or 0, spec, where)

    def describe(self, spec: ModelSpec) -> str:
        """How many heads attend."""
        return f"{self.attending} of {spec.q_heads} heads attend"

    def tensors(self, spec: ModelSpec, place: Place) -> tuple[KVTensor, ...]:
        """Keys, of representatives alone where each query head has a kv head; and values of all heads."""
        keys = self.attending if spec.group_size == 1 else place.kv_heads
        return tuple(
            ClusteredTensor(
                layer=place.layer,
                kind=cast("Kind", kind),
                heads=heads,
                dim=spec.head_dim,
                dtype="float32",
                clusters=self.mode,
            )
            for kind, heads in (("key", keys), ("value", place.kv_heads))
        )

    def attention(self, edit: LayerEdit) -> CacheAttention:
        """Stock operators; one softmax per cluster."""
        from kvslim.caches.attention.clustered import ClusteredAttention

        return ClusteredAttention(edit.formed)

    @classmethod
    def note(cls, tensors: Sequence[KVTensor], attention: CacheAttention) -> object:
        """How clusters are formed; None where they are fixed."""
        return attention.note()

    @classmethod
    def tensor_class(cls, kind: str) -> type[KVTensor]:
        """A buffer of full length."""
        return ClusteredTensor

    @classmethod
    def read_tensors(cls, nodes: Sequence[ort.NodeArg], note: ClustersNote | None) -> tuple[KVTensor, ...] | None:
        """Float32 keys and values; the note of dynamic clusters says how many heads have keys."""
        found = []
        for node in nodes:
            _, layer, kind = node.name.split(".")
            if node.type != "tensor(float)" or len(node.shape) != 4:
                return None
            heads, dim = node.shape[1], node.shape[3]
            if note is not None and kind == "key":
                heads = note.count
            if not isinstance(heads, int) or not isinstance(dim, int):
                return None
            found.append(
                ClusteredTensor(
                    layer=int(layer),
                    kind=cast("Kind", kind),
                    heads=heads,
                    dim=dim,
                    dtype="float32",
                    clusters="static" if note is None else "dynamic",
                )
            )
        return tuple(found)

    @classmethod
    def buffers(cls) -> type[LayerBuffers]:
        """Buffers that grow, and clusters formed from the first tokens."""
        from kvslim.caches.prompt_clusters import ClusteredBuffers

        return ClusteredBuffers

    @classmethod
    def inputs(cls, tensors: Sequence[KVTensor]) -> dict[str, Axes]:
        """Which heads attend, where each prompt decides it."""
        key, value = tensors
        if not isinstance(key, ClusteredTensor) or not key.has_dynamic_heads:
            return {}
        representatives, membership = (name.format(key.layer) for name in CLUSTER_INPUTS)
        return {representatives: (count_axis(key.layer),), membership: (value.heads,)}

    @classmethod
    def outputs(cls, tensors: Sequence[KVTensor]) -> dict[str, Axes]:
        """The weights of the heads that attend, where clusters are formed from them."""
        key = tensors[0]
        if not isinstance(key, ClusteredTensor) or not key.has_dynamic_heads:
            return {}
        return {ATTENTIONS.format(key.layer): (BATCH, count_axis(key.layer), LENGTH, CAPACITY)}


def count_axis(layer: int) -> str:
    """Name of the axis of the heads that attend in a layer."""
    return f"clusters_{layer}"


def pools(spec: ModelSpec) -> int:
    """Runs of heads that share among themselves alone: those of one kv head, or all where each has one of its own."""
    return 1 if spec.group_size == 1 else spec.kv_heads


def check_number(number: int, spec: ModelSpec, where: str) -> None:
    """Refuses a number of clusters that the heads cannot form.

    Raises:
        UsageError: Naming `where` it stands.
    """
    step = pools(spec)
    if not step <= number <= spec.q_heads or number % step:
        choice = f"from 1 to {spec.q_heads}" if step == 1 else f"a multiple of {step}, as many for every kv head"
        raise UsageError(
            f"{number} clusters do not fit {spec.q_heads} query heads on {spec.kv_heads} kv heads",
            where=where,
            fix=f"use {choice}",
        )


def _check_members(clusters: tuple[int, ...], spec: ModelSpec, where: str) -> None:
    heads, size = range(spec.q_heads), spec.q_heads // pools(spec)
    members = dict(zip(heads, clusters, strict=False))
    fits = len(clusters) == spec.q_heads and all(members.get(head) == head for head in clusters)
    if not fits or any(head // size != other // size for head, other in members.items()):
        raise UsageError(
            f"clusters {list(clusters)} do not name for each of {spec.q_heads} heads one whose attention it takes",
            where=where,
            fix="name a head of the same kv head that names itself" if size < spec.q_heads else "name heads that do so",
        )
    counts = [len({head for head in clusters if head // size == pool}) for pool in range(pools(spec))]
    if len(set(counts)) > 1:
        fix = "form as many clusters of each kv head's readers"
        raise UsageError(f"kv heads have {min(counts)} to {max(counts)} clusters", where=where, fix=fix)
