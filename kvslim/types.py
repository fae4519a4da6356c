"""The values that pass between the stages: plain, frozen, JSON in and out, and free of torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

WeightType = Literal["fp32", "int8", "int4"]
WeightMethod = Literal["k_quant", "rtn"]
CacheType = Literal["float32", "int8", "int4", "codes3", "codes2", "codes1"]
Granularity = Literal["per_channel", "per_tensor"]
Clip = Literal["error", "minmax"]
Kind = Literal["key", "value", "key_codes", "value_codes"]
Layout = Literal["gqa", "attention24"]
Objective = Literal["balanced", "key"]
Part = Literal["attention", "mlp", "block"]
Clusters = Literal["static", "dynamic"]
Task = Literal["text-generation", "fill-mask", "feature-extraction"]
INPUTS = ("input_ids", "attention_mask", "position_ids")  # before the cache; not every graph needs positions
LAST_POSITION = "last_position"  # the node that hands the head the last position alone
BITS: dict[CacheType, int] = {"float32": 32, "int8": 8, "int4": 4, "codes3": 3, "codes2": 2, "codes1": 1}
CODES: tuple[CacheType, ...] = ("codes3", "codes2", "codes1")  # packed, decoded by table in the graph
RINGS = "kvslim.rings"  # the graph's metadata: sinks of each ring and how its layer stores, by layer
SHARED = "shared_"  # then kind.donor.layer: outputs of layers without a cache, to lie where their donor's lies
CLUSTERS = "kvslim.clusters"  # the same of layers whose heads share attention: how many attend, by layer
# Inputs of the graph for a layer's dynamic clusters: the query heads that attend [clusters], and for each query head
# the place among them of the one whose attention it takes [q_heads]. The output: the weights of those that attend.
CLUSTER_INPUTS, ATTENTIONS = ("clusters.{}.representatives", "clusters.{}.membership"), "attentions.{}"
FIRST_TOKENS = 5  # of a prompt, from which dynamic clusters are formed (Agarwal et al., "CHAI", 2024)
WINDOW_SLACK = 16  # rows of a window's cache beyond the window: eviction then moves it once in so many tokens


class Frozen(BaseModel):
    """A frozen value that refuses unknown fields and numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class WeightFormat(Frozen):
    """How a graph stores its large matrices and its embedding table."""

    type: WeightType = Field("fp32", description="of all matrices; int8 and int4 in blocks of 32")
    method: WeightMethod = Field("k_quant", description="k_quant searches scales and zero points; rtn rounds")
    mixed: bool = Field(False, description="with int4: the most sensitive matrices in int8")

    @model_validator(mode="after")
    def _check_mixed(self) -> WeightFormat:
        if self.mixed and self.type != "int4":
            raise ValueError(f"mixed goes with type int4, not {self.type}")
        return self

    @property
    def bits(self) -> int | None:
        """Bits of a number; None for float."""
        return {"fp32": None, "int8": 8, "int4": 4}[self.type]

    def __str__(self) -> str:
        return self.type if self.bits is None else f"{self.type} ({self.method}{', mixed' if self.mixed else ''})"


def _weight_format(value: object) -> object:
    """A plain word is a format's type."""
    return {"type": value} if isinstance(value, str) else value


Weights = Annotated[WeightFormat, BeforeValidator(_weight_format)]


class ModelSpec(Frozen):
    """What `config.json` alone says of a model."""

    model_type: str
    layers: int
    hidden_size: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int = Field(description="positions the model was trained or scaled for, in tokens")
    windows: tuple[int | None, ...] = Field(description="tokens that each layer's queries see; None for all")
    task: Task = Field("text-generation", description="the hub's name; the other two are encoders, without a cache")

    @property
    def is_encoder(self) -> bool:
        """Whether the model reads a whole text at once, and so has no KV cache."""
        return self.task != "text-generation"

    @property
    def group_size(self) -> int:
        """Query heads that read one kv head."""
        return self.q_heads // self.kv_heads


class LayerPlan(Frozen):
    """What happens to the KV cache of one layer, and why."""

    layer: int
    heads: tuple[int, ...] | None = Field(
        None, description="query heads kept, and with them the kv heads that they read; none: no attention, no cache"
    )
    mlp: bool = Field(True, description="whether the feed-forward part stays; without it and heads the block is gone")
    donor: int | None = Field(None, description="earlier layer whose cache this one reads; None: it has its own")
    clusters: tuple[int, ...] | None = Field(
        None, description="for each query head the one whose attention it takes; None: every head its own"
    )
    dynamic_clusters: int | None = Field(
        None, description="number of clusters that the runtime makes of the query heads from each prompt's first tokens"
    )
    rank: int | None = Field(None, description="cached dimensions per kv head; None keeps head_dim untouched")
    value_rank: int | None = Field(None, description="the same for values, where it differs (layout attention24)")
    objective: Objective = "balanced"
    refined: int = Field(0, description="leading coordinates stored twice: rounded, and what rounding left of them")
    value_refined: int | None = Field(None, description="the same for values, where it differs")
    roles: int | None = Field(None, description="seed of the role hypervectors that spread the coordinates; None: none")
    cache: CacheType = Field("float32", description="codes3, codes2 and codes1 are packed levels of a fitted codebook")
    granularity: Granularity = "per_channel"
    clip: Clip = "error"
    centred: bool = Field(False, description="whether the mean key is taken from all keys before rounding")
    window: int | None = Field(None, description="recent tokens kept, or with packed codes kept exact; None for all")
    sinks: int = Field(0, description="first tokens kept beside the window")
    refit: bool = Field(False, description="whether its projections are fitted again to what is compressed or gone")
    score: float | None = Field(None, description="share of the score energy that the rank keeps, the worse of K and V")
    reason: str = "kept"

    @property
    def has_cache(self) -> bool:
        """Whether the layer keeps keys and values of its own."""
        return self.heads != () and self.donor is None

    def kv_heads(self, spec: ModelSpec) -> tuple[int, ...]:
        """The kv heads that are kept: those that a kept query head reads."""
        heads = range(spec.q_heads) if self.heads is None else self.heads
        return tuple(sorted({head // spec.group_size for head in heads}))

    @property
    def clustering(self) -> Clusters | None:
        """When clusters of heads are formed: before export, or for each prompt; None where there are none."""
        if self.dynamic_clusters is not None:
            return "dynamic"
        return None if self.clusters is None else "static"

    @property
    def attending(self) -> int | None:
        """Query heads with attention of their own where the heads are clustered, one of each cluster."""
        return self.dynamic_clusters if self.clusters is None else len(set(self.clusters))

    def key_heads(self, spec: ModelSpec) -> int:
        """Heads of the key cache: with a kv head for every query head, representatives of clusters alone have one."""
        if self.attending is not None and spec.group_size == 1:
            return self.attending
        return len(self.kv_heads(spec))

    def ranks(self, head_dim: int) -> tuple[int, int]:
        """Dimensions that are kept of a key, and of a value."""
        rank = self.rank or head_dim
        return rank, self.value_rank or rank

    @property
    def twice(self) -> tuple[int, int]:
        """Coordinates of a key that are stored twice, and of a value."""
        return self.refined, self.refined if self.value_refined is None else self.value_refined

    def widths(self, head_dim: int) -> tuple[int, int]:
        """Numbers that a head of the cache holds of a token's key, and of its value."""
        (key, value), (more_key, more_value) = self.ranks(head_dim), self.twice
        return key + more_key, value + more_value


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


class PlanPoint(Frozen):
    """A plan that was measured in torch on calibration text, before any graph was made."""

    cache: CacheType
    kv_bytes_per_token: float = Field(description="of a cache at the target context")
    kv_ratio: float = Field(description="plain fp32 cache over this one")
    time_ratio: float = Field(description="expected time of a token at that context, over the plain model's")
    kl: float = Field(description="mean KL to the model as it is, nats per token")
    recall_drop: float | None = Field(None, description="recall lost, as a share; None where no limit asks for it")


class KVTensor(Frozen):
    """One KV input of the graph.

    Exact and integer caches are [batch, heads, rows, dim]; int4 packs two numbers into a uint8, which halves the last
    axis. Packed codes are uint8 [batch, rows, heads, dim * bits / 8], so that a row can be appended in place.
    """

    layer: int
    kind: Kind
    heads: int
    dim: int
    dtype: CacheType
    window: int | None = Field(None, description="recent tokens that the cache must keep; None for all")
    sinks: int | None = Field(
        None, description="first tokens kept beside the window, in a ring; None: the operator keeps the window"
    )
    clusters: Clusters | None = Field(
        None, description="whether heads share attention; the rows of past and present are then those of one buffer"
    )

    @property
    def past(self) -> str:
        """Name of the graph input."""
        return f"past_key_values.{self.layer}.{self.kind}"

    @property
    def present(self) -> str:
        """Name of the graph output; of packed codes it has the new rows alone, which a client must not take for all."""
        return f"{'appended' if self.is_packed else 'present'}.{self.layer}.{self.kind}"

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in this tensor."""
        return self.heads * self.dim * BITS[self.dtype] // 8

    @property
    def columns(self) -> int:
        """Length of the last axis, in stored elements."""
        return self.dim if self.dtype in {"float32", "int8"} else self.dim * BITS[self.dtype] // 8

    @property
    def is_packed(self) -> bool:
        """Whether it holds packed codes of the tokens that left the window."""
        return self.kind.endswith("_codes")

    @property
    def kept(self) -> int | None:
        """Rows of the layer's window with its sinks or its slack; None where all tokens are kept."""
        return None if self.window is None else self.window + (WINDOW_SLACK if self.sinks is None else self.sinks)

    def rows(self, context: int) -> int:
        """Rows to allocate for a context of that many tokens."""
        if self.kept is None:
            return context
        return max(0, context - self.kept) if self.is_packed else self.kept


class KVLayout(Frozen):
    """The input/output contract of a graph: what exporter, runtime, genai_config and report agree on."""

    layout: Layout = "gqa"
    tensors: tuple[KVTensor, ...]

    def bytes_at(self, context: int) -> int:
        """Bytes that the cache takes at a context of that many tokens."""
        return sum(tensor.bytes_per_token * tensor.rows(context) for tensor in self.tensors)

    @property
    def is_packed(self) -> bool:
        """Whether any layer has packed codes, which no runtime but KVSlim's appends."""
        return any(tensor.is_packed for tensor in self.tensors)

    @property
    def dynamic_layers(self) -> tuple[int, ...]:
        """The layers that form clusters for each prompt, which no runtime but KVSlim's does."""
        return tuple(t.layer for t in self.tensors if t.clusters == "dynamic" and t.kind == "key")

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
        tensors = (tensor for layer in cached for tensor in _layer_tensors(spec, layer, windows[layer.layer]))
        return cls(layout=plan.layout, tensors=tuple(tensors))


def _layer_tensors(spec: ModelSpec, layer: LayerPlan, window: int | None) -> list[KVTensor]:
    """The KV inputs of one layer: its cache or ring, then the packed codes of what left the ring."""
    streams, heads = layer.window is not None, len(layer.kv_heads(spec))
    common = {"layer": layer.layer, "heads": heads, "window": layer.window if streams else window}
    common |= {"sinks": layer.sinks if streams else None}
    exact = "float32" if layer.cache in CODES else layer.cache
    dims = dict(zip(("key", "value"), layer.widths(spec.head_dim), strict=True))
    if layer.clustering is not None:
        kinds: tuple[tuple[Kind, int], ...] = (("key", layer.key_heads(spec)), ("value", heads))
        return [
            KVTensor(
                layer=layer.layer, kind=kind, heads=count, dim=dims[kind], dtype="float32", clusters=layer.clustering
            )
            for kind, count in kinds
        ]
    tensors = [KVTensor(kind=kind, dim=dim, dtype=exact, **common) for kind, dim in dims.items()]
    if layer.cache in CODES:
        tensors += [KVTensor(kind=f"{kind}_codes", dim=dim, dtype=layer.cache, **common) for kind, dim in dims.items()]
    return tensors


class Measures(Frozen):
    """One column of the report. What was not measured is None.

    `kv_bytes_per_token` is the cache at the target context over that context. Latencies are milliseconds, keyed by
    prompt length (`ttft_ms`), context length (`tpot_ms`) or, for an encoder, text length (`latency_ms`) in tokens;
    `kl_*` are nats per token against the plain export; `recall` and the agreements are shares in 0..1; the rank
    correlation is Spearman's.
    """

    kv_bytes_per_token: float | None = None
    file_mib: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None
    perplexity: float | None = None
    perplexity_se: float | None = None
    recall: float | None = None
    embedding_cosine_mean: float | None = None
    embedding_cosine_min: float | None = None
    retrieval_rank_correlation: float | None = None
    masked_top1_agreement: float | None = None
    ttft_ms: dict[str, float] | None = None
    tpot_ms: dict[str, float] | None = None
    latency_ms: dict[str, float] | None = None
    peak_rss_mib: float | None = None


class GateResult(Frozen):
    """One gate: the measured value against its limit."""

    name: str
    value: float | None
    limit: float
    passed: bool
    note: str | None = Field(None, description="why the verdict says little, if it does")


class Report(Frozen):
    """What an artifact costs and saves, next to the plain export of the same model."""

    passed: bool
    gates: tuple[GateResult, ...]
    plain: Measures
    floor: Measures
    artifact: Measures
    ratio: Measures


class Source(Frozen):
    """Where the model came from: the id the user gave, the hub revision if any, the digest of its weights."""

    model: str
    revision: str | None
    sha256: str


class Manifest(Frozen):
    """`kvslim.json`: what an artifact is made of, from what, and what was measured."""

    format: Literal[1] = 1
    source: Source
    spec: ModelSpec
    context: int = Field(description="tokens of the cache that bytes per token are counted in")
    recipe: dict[str, object]
    plan: Plan
    frontier: tuple[PlanPoint, ...] = Field((), description="with a budget: what the planner saw at other sizes")
    kv_layout: KVLayout
    weights: Weights
    inputs: tuple[str, ...] = Field(description="graph inputs that have no default, other than the cache, in order")
    versions: dict[str, str]
    files: dict[str, str] = Field(description="SHA-256 of every other file of the folder, by name")
    report: Report | None = None
    passed: bool | None = None
