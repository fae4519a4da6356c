"""The values that pass between the stages: plain, frozen, JSON in and out, and free of torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

WeightType = Literal["fp32", "int8", "int4"]
WeightMethod = Literal["k_quant", "rtn"]
CacheType = Literal["float32", "int8"]
Granularity = Literal["per_channel", "per_tensor"]
Layout = Literal["gqa", "attention24"]
Objective = Literal["balanced", "key"]
Task = Literal["text-generation", "fill-mask", "feature-extraction"]
INPUTS = ("input_ids", "attention_mask", "position_ids")  # before the cache; not every graph needs positions
LAST_POSITION = "last_position"  # the node that hands the head the last position alone
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
    rank: int | None = Field(None, description="cached dimensions per kv head; None keeps head_dim untouched")
    value_rank: int | None = Field(None, description="the same for values, where it differs (layout attention24)")
    objective: Objective = "balanced"
    cache: CacheType = "float32"
    granularity: Granularity = "per_channel"
    score: float | None = Field(None, description="share of the score energy that the rank keeps, the worse of K and V")
    reason: str = "kept"


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


class KVTensor(Frozen):
    """One KV input of the graph, shaped [batch, heads, past_length, dim]."""

    layer: int
    kind: Literal["key", "value"]
    heads: int
    dim: int
    dtype: CacheType
    window: int | None = Field(None, description="tokens that the cache must keep; None for all")

    @property
    def past(self) -> str:
        """Name of the graph input."""
        return f"past_key_values.{self.layer}.{self.kind}"

    @property
    def present(self) -> str:
        """Name of the graph output."""
        return f"present.{self.layer}.{self.kind}"

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in this tensor."""
        return self.heads * self.dim * {"float32": 4, "int8": 1}[self.dtype]

    def rows(self, context: int) -> int:
        """Rows to allocate for a context of that many tokens."""
        return context if self.window is None else self.window + WINDOW_SLACK


class KVLayout(Frozen):
    """The input/output contract of a graph: what exporter, runtime, genai_config and report agree on."""

    layout: Layout = "gqa"
    tensors: tuple[KVTensor, ...]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in the whole cache, while every layer still keeps it."""
        return sum(tensor.bytes_per_token for tensor in self.tensors)

    def bytes_at(self, context: int) -> int:
        """Bytes that the cache takes at a context of that many tokens."""
        return sum(tensor.bytes_per_token * tensor.rows(context) for tensor in self.tensors)

    @classmethod
    def of(cls, spec: ModelSpec, plan: Plan) -> KVLayout:
        """The layout that `plan` gives a model of this `spec`; empty for an encoder."""
        if spec.is_encoder:
            return cls(tensors=())
        windowed = plan.window_cache and plan.layout == "gqa"
        return cls(
            layout=plan.layout,
            tensors=tuple(
                KVTensor(
                    layer=layer.layer,
                    kind=kind,
                    heads=spec.kv_heads,
                    dim=dim or spec.head_dim,
                    dtype=layer.cache,
                    window=spec.windows[layer.layer] if windowed else None,
                )
                for layer in plan.layers
                for kind, dim in (("key", layer.rank), ("value", layer.value_rank or layer.rank))
            ),
        )


class Measures(Frozen):
    """One column of the report. What was not measured is None.

    Latencies are milliseconds, keyed by prompt length (`ttft_ms`), context length (`tpot_ms`) or, for an encoder, text
    length (`latency_ms`) in tokens; `kl_*` are nats per token against the plain export; `recall` and the agreements are
    shares in 0..1.
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
    recipe: dict[str, object]
    plan: Plan
    kv_layout: KVLayout
    weights: Weights
    inputs: tuple[str, ...] = Field(description="graph inputs that have no default, other than the cache, in order")
    versions: dict[str, str]
    files: dict[str, str] = Field(description="SHA-256 of every other file of the folder, by name")
    report: Report | None = None
    passed: bool | None = None
