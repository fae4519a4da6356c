"""The values that pass between the stages: plain, frozen, JSON in and out, and free of torch."""

from __future__ import annotations

from itertools import groupby
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, SerializeAsAny
from pydantic_core import CoreSchema

from kvslim.caches import CACHES, Cache, FullCache, Place, SharedCache
from kvslim.caches.base import known_cache, read_cache
from kvslim.contract import (
    Axes,
    CacheType,
    Frozen,
    KVTensor,
    Layout,
    ModelSpec,
)
from kvslim.measures import DraftKind, Report
from kvslim.weight_format import Weights

DraftChoice = Literal["auto", "lookup", "window", "none"]


class Draft(Frozen):
    """What proposes tokens for the model to verify."""

    kind: DraftKind = Field(
        description="lookup: n-grams of the text so far; window: also the model itself over sinks and recent tokens"
    )
    window: int = Field(256, ge=1, description="recent tokens that the window draft reads")
    sinks: int = Field(4, ge=0, description="first tokens that it reads")


class _OneOfCaches:
    """The JSON Schema of a cache: that of one of the registered kinds."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [handler(kind.__pydantic_core_schema__) for kind in CACHES.values()]}


AnyCache = Annotated[SerializeAsAny[Cache], BeforeValidator(read_cache), _OneOfCaches()]


class LayerPlan(Frozen):
    """What happens to one layer, and why: its heads, its feed-forward part, its cache."""

    layer: int
    heads: tuple[int, ...] | None = Field(
        None, description="query heads kept, and with them the kv heads that they read; none: no attention, no cache"
    )
    mlp: bool = Field(True, description="whether the feed-forward part stays; without it and heads the block is gone")
    mlp_width: int | None = Field(
        None, gt=0, multiple_of=32, description="channels of the feed-forward part that stay; null: all"
    )
    cache: AnyCache = Field(default_factory=FullCache, description="how keys and values are kept")
    refit: bool = Field(False, description="whether its projections are fitted again to what is compressed or gone")
    score: float | None = Field(
        None,
        description="of methods: the share that they keep of what they reduce, the worse of K and V; of the planner: "
        "what the layer is expected to lose, nats per token",
    )
    reason: str = "kept"

    @property
    def has_cache(self) -> bool:
        """Whether the layer keeps keys and values of its own."""
        return self.heads != () and self.cache.has_tensors

    @property
    def source(self) -> int | None:
        """The earlier layer whose cache this one reads; None where it has its own."""
        return self.cache.source if isinstance(self.cache, SharedCache) else None

    def kv_heads(self, spec: ModelSpec) -> tuple[int, ...]:
        """The kv heads that are kept: those that a kept query head reads."""
        heads = range(spec.q_heads) if self.heads is None else self.heads
        return tuple(sorted({head // spec.group_size for head in heads}))

    def place(self, spec: ModelSpec, window: int | None) -> Place:
        """What a cache needs to know of the layer; `window` is the model's own."""
        return Place(layer=self.layer, kv_heads=len(self.kv_heads(spec)), window=window)

    def with_cache(self, **update: object) -> LayerPlan:
        """The layer with some fields of its cache changed."""
        return self.model_copy(update={"cache": self.cache.model_copy(update=update)})


class Plan(Frozen):
    """One decision per layer: plain JSON, made to be read and edited by hand."""

    layout: Layout = Field("gqa", description="attention operators of the graph")
    window_cache: bool = Field(True, description="whether a sliding-window layer's cache has the window's size")
    layers: tuple[LayerPlan, ...]

    @classmethod
    def identity(cls, spec: ModelSpec, layout: Layout = "gqa", window_cache: bool = True) -> Plan:
        """The plan that changes nothing."""
        layers = tuple(LayerPlan(layer=index) for index in range(spec.layers))
        return cls(layout=layout, window_cache=window_cache, layers=layers)

    @property
    def changes_nothing(self) -> bool:
        """Whether every layer stays as it is."""
        return all(layer == LayerPlan(layer=layer.layer, reason=layer.reason) for layer in self.layers)


class Watched(Frozen):
    """One look at the held-out text while a model heals."""

    step: int
    seconds: float = Field(description="from the first step on, looks included")
    kl: float = Field(description="mean KL to the model as it is, nats per token")


class Healing(Frozen):
    """What a training of a model with its codes did; see `docs/healing.md`."""

    steps: int
    tokens: int = Field(description="tokens of text that it read, some of them several times")
    seconds: float
    kl_before: float = Field(description="on text that the training never saw, before it; nats per token")
    kl_after: float = Field(description="the same after it")
    kept: bool = Field(description="whether the trained weights are used: they are if they lose less on that text")
    watched: tuple[Watched, ...] = Field(description="KL on other text as it went on; the best weights were taken")


class PlanPoint(Frozen):
    """A plan that was measured in torch on calibration text, before any graph was made."""

    cache: CacheType
    kv_bytes_per_token: float = Field(description="of a cache at the target context")
    kv_ratio: float = Field(description="plain fp32 cache over this one")
    time_ratio: float = Field(description="expected time of a token at that context, over the plain model's")
    kl: float = Field(description="mean KL to the model as it is, nats per token")
    recall_drop: float | None = Field(None, description="recall lost, as a share; None where no limit asks for it")


class PeerPoint(Frozen):
    """What another tool's cache type costs on the same model, measured in torch on the same calibration text."""

    name: str
    kv_bytes_per_token: float
    kl: float = Field(description="mean KL to the model as it is, nats per token")


class Survey(NamedTuple):
    """What else a model's cache could be.

    Attributes:
        frontier: Sizes that the planner measured for a budget, the largest first.
        alike: Without a budget all layers alike in a few sizes, the largest first.
        peers: Cache types of other tools.
    """

    frontier: tuple[PlanPoint, ...] = ()
    alike: tuple[PlanPoint, ...] = ()
    peers: tuple[PeerPoint, ...] = ()


def _read_tensor(value: object) -> object:
    """A tensor from JSON: its kind of cache says which class reads the rest."""
    if not isinstance(value, dict):
        return value
    cache = known_cache(value.get("cache", "full"))
    return cache.tensor_class(str(value.get("kind"))).model_validate(value)


AnyTensor = Annotated[SerializeAsAny[KVTensor], BeforeValidator(_read_tensor)]


class KVLayout(Frozen):
    """The input/output contract of a graph: what exporter, runtime, genai_config and report agree on."""

    layout: Layout = "gqa"
    tensors: tuple[AnyTensor, ...]

    def bytes_at(self, context: int) -> int:
        """Bytes that the cache takes at a context of that many tokens."""
        return sum(tensor.bytes_per_token * tensor.rows(context) for tensor in self.tensors)

    @property
    def layers(self) -> tuple[tuple[KVTensor, ...], ...]:
        """The KV inputs of each layer that has any, in order."""
        return tuple(tuple(tensors) for _, tensors in groupby(self.tensors, key=lambda tensor: tensor.layer))

    def sides(self, layer: int) -> tuple[KVTensor, ...]:
        """Keys and values of a layer as reports show them: packed codes rather than the ring before them, no state."""
        return tuple(tensor for tensor in self.tensors if tensor.layer == layer and tensor.kind != "state")[-2:]

    @property
    def extra_inputs(self) -> dict[str, Axes]:
        """Integer inputs besides the cache that layers need, by name."""
        return {name: axes for t in self.layers for name, axes in CACHES[t[0].cache].inputs(t).items()}

    @property
    def extra_outputs(self) -> dict[str, Axes]:
        """Outputs besides the cache that layers give, by name."""
        return {name: axes for t in self.layers for name, axes in CACHES[t[0].cache].outputs(t).items()}

    @property
    def needs_own_runtime(self) -> bool:
        """Whether a layer's cache asks more of a runtime than to hand on present keys and values, as KVSlim's does."""
        others = (tensor.present.startswith("appended.") or tensor.kind == "state" for tensor in self.tensors)
        return bool(self.extra_inputs) or any(others)

    @property
    def is_even(self) -> bool:
        """Whether keys and values of each layer have equally many heads, as onnxruntime-genai takes them to have."""
        heads = {(tensor.layer, tensor.heads) for tensor in self.tensors}
        return len(heads) == len({layer for layer, _ in heads})

    def bytes_per_token(self, context: int) -> float:
        """Bytes of a cache that holds `context` tokens, per token."""
        return self.bytes_at(context) / context

    @classmethod
    def of(cls, spec: ModelSpec, plan: Plan) -> KVLayout:
        """The layout that `plan` gives a model of this `spec`; empty for an encoder."""
        if spec.is_encoder:
            return cls(tensors=())
        windowed = plan.window_cache and plan.layout == "gqa"
        windows = spec.windows if windowed else (None,) * spec.layers
        cached = (layer for layer in plan.layers if layer.has_cache)
        places = ((layer, layer.place(spec, windows[layer.layer])) for layer in cached)
        tensors = (tensor for layer, place in places for tensor in layer.cache.tensors(spec, place))
        return cls(layout=plan.layout, tensors=tuple(tensors))


def _known(description: str) -> Any:
    """A field that is left out where it is not known, so that older manifests keep their digest."""
    return Field(None, exclude_if=lambda value: value is None, description=description)


class Source(Frozen):
    """Where the model came from: the id the user gave, the hub revision if any, the digest of its weights."""

    model: str
    revision: str | None
    sha256: str
    base_model: str | None = _known("the hub's id of the model, or of the one that a GGUF file was made from")
    blocks: tuple[str, ...] = Field(
        (),
        exclude_if=lambda blocks: not blocks,
        description="types of the blocks that a GGUF has its matrices in, what most numbers have first",
    )
    license: str | None = _known("of the model, as its card or its GGUF file names it; so are the next two")
    license_name: str | None = _known("where the license is `other`")
    license_link: str | None = _known("where the license is `other`")


class Manifest(Frozen):
    """`kvslim.json`: what an artifact is made of, from what, and what was measured."""

    format: Literal[1] = 1
    source: Source
    spec: ModelSpec
    context: int = Field(description="tokens of the cache that bytes per token are counted in")
    recipe: dict[str, object]
    plan: Plan
    frontier: tuple[PlanPoint, ...] = Field((), description="with a budget: what the planner saw at other sizes")
    alike: tuple[PlanPoint, ...] = Field((), description="without a budget: what all layers alike cost in a few sizes")
    peers: tuple[PeerPoint, ...] = Field((), description="what cache types of other tools cost")
    healing: Healing | None = _known("with `heal`: how the weights were trained")
    kv_layout: KVLayout
    weights: Weights
    matrices: dict[str, str] | None = _known("format of each matrix in blocks, by its name; of packed ones the first")
    inputs: tuple[str, ...] = Field(description="graph inputs that have no default, other than the cache, in order")
    versions: dict[str, str]
    draft: Draft | None = Field(
        None, exclude_if=lambda draft: draft is None, description="what proposes tokens for the model to verify"
    )
    least_onnxruntime: str | None = Field(  # left out where it is not known, as in `Source`
        None,
        pattern=r"^\d+(\.\d+)*$",
        exclude_if=lambda version: version is None,
        description="the oldest version that runs the graph",
    )
    files: dict[str, str] = Field(description="SHA-256 of every other file of the folder, by name")
    report: Report | None = None
    passed: bool | None = None
