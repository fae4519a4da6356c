"""The values that pass between the stages: plain, frozen, JSON in and out, and free of torch."""

from __future__ import annotations

from itertools import groupby
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, SerializeAsAny, model_validator
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
    WeightMethod,
    WeightType,
)

DraftChoice = Literal["auto", "lookup", "window", "none"]


class Draft(Frozen):
    """What proposes tokens for the model to verify."""

    kind: Literal["lookup", "window"] = Field(
        description="lookup: n-grams of the text so far; window: also the model itself over sinks and recent tokens"
    )
    window: int = Field(256, ge=1, description="recent tokens that the window draft reads")
    sinks: int = Field(4, ge=0, description="first tokens that it reads")


class WeightFormat(Frozen):
    """How a graph stores its large matrices and its embedding table."""

    type: Literal[WeightType, "stored", "auto"] = Field(
        "fp32",
        description="of all matrices; int8 and int4 in blocks; stored: the blocks of a GGUF as they are; "
        "auto: stored where that can be, else int4 for decoders and fp32 for encoders",
    )
    method: WeightMethod = Field(
        "k_quant",
        description="rtn rounds; k_quant searches scales and zero points; gptq (decoders) uses calibration text",
    )
    block: Literal[32, 64, 128] | None = Field(
        None, description="numbers that share a scale, at most; default: 32 of 4 bits or of an encoder, 128 of 8"
    )
    mixed: bool = Field(False, description="with int4: the most sensitive matrices in int8")
    file_mib: float | None = Field(
        None, gt=0, description="with int4 (decoders): size of the file within which bits and blocks are picked"
    )
    file_ratio: float | None = Field(
        None, gt=1, description="the same, as how many times smaller than the export in float32"
    )

    @model_validator(mode="after")
    def _check_parts(self) -> WeightFormat:
        if self.file_mib is not None and self.file_ratio is not None:
            raise ValueError("give file_mib or file_ratio, not both")
        is_int4 = self.type in ("int4", "auto")
        if self.picks and (not is_int4 or self._is_said):
            raise ValueError(
                "a limit of the file picks bits and blocks: give type int4 and method gptq or k_quant alone"
            )
        if self.mixed and not is_int4:
            raise ValueError(f"mixed goes with type int4, not {self.type}")
        if self.method == "gptq" and not is_int4 and self.type != "int8":
            raise ValueError(f"method gptq goes with type int8 or int4, not {self.type}")
        return self

    @property
    def is_quantised(self) -> bool:
        """Whether matrices are stored in blocks."""
        return self.type in ("int8", "int4", "stored")

    def settled(self, *, is_encoder: bool, has_blocks: bool) -> WeightFormat:
        """The format with `auto` decided; where more is asked of it, that is int4."""
        if self.type != "auto":
            return self
        if is_encoder:
            return WeightFormat()
        keeps = has_blocks and self == WeightFormat(type="auto")
        return self.model_copy(update={"type": "stored" if keeps else "int4"})

    @property
    def needs_text(self) -> bool:
        """Whether calibration text decides how matrices are stored."""
        return self.method == "gptq" or self.picks

    @property
    def is_open(self) -> bool:
        """Whether bits and blocks of each matrix can still be picked."""
        return self.type in ("int4", "auto") and not self.picks and not self._is_said

    @property
    def _is_said(self) -> bool:
        """Whether the recipe says bits or blocks of matrices itself, beyond a type."""
        return self.mixed or self.block is not None or self.method == "rtn"

    @property
    def picks(self) -> bool:
        """Whether bits and blocks of each matrix are picked within a limit of the file."""
        return self.file_mib is not None or self.file_ratio is not None

    @property
    def like(self) -> WeightType:
        """The format that costs about as much time."""
        return self.type if self.type in ("fp32", "int8") else "int4"

    def __str__(self) -> str:
        rounded = self.type in ("int8", "int4")
        words = [self.method, *["mixed"] * self.mixed, *[f"blocks of {self.block}"] * (self.block is not None)]
        words += [] if self.file_mib is None else [f"4 to 8 bits within {self.file_mib:g} MiB"]
        words += [] if self.file_ratio is None else [f"4 to 8 bits, {self.file_ratio:g} times smaller"]
        return f"{self.type} ({', '.join(words)})" if rounded else self.type


def _weight_format(value: object) -> object:
    """A plain word is a format's type."""
    return {"type": value} if isinstance(value, str) else value


Weights = Annotated[WeightFormat, BeforeValidator(_weight_format)]


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
    score: float | None = Field(None, description="share of the score energy that the rank keeps, the worse of K and V")
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
        """Whether a layer's cache asks more of a runtime than to hand present on as past; only KVSlim's does that."""
        return bool(self.extra_inputs) or any(tensor.present.startswith("appended.") for tensor in self.tensors)

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


class Measures(Frozen):
    """One column of the report. What was not measured is None.

    `kv_bytes_per_token` is the cache at the target context over that context. Latencies are milliseconds, keyed by
    prompt length (`ttft_ms`), context length (`tpot_ms`) or, for an encoder, text length (`latency_ms`) in tokens;
    `kl_*` are nats per token against the plain export; `recall` and the agreements are shares in 0..1; the rank
    correlation is Spearman's. `kl_by_position` has the mean KL of the tokens from the key before (or the start) up to
    its key, `kl_beyond` that of tokens beyond the target context, which no other number counts; `recall_by_distance`
    the recall of what stands at most so many tokens back. Standard errors end in `_se`: of `kl_mean` and `perplexity`
    over pieces of text, of the recall that is lost to the plain export over the questions. Where weights are quantised,
    KL and perplexity are measured with activations in float32; `kl_as_run` is the KL with activations rounded as
    onnxruntime does it, and `kl_to_original` the one to the model in float32.

    Latencies are medians; `*_quartiles_ms` are the first and third quartile. Tokens per second follow from the medians:
    `tokens_per_second` of one sequence by context length, `prompt_tokens_per_second` by prompt length.
    """

    kv_bytes_per_token: float | None = None
    file_mib: float | None = None
    kl_mean: float | None = None
    kl_se: float | None = None
    kl_p99: float | None = None
    kl_as_run: float | None = None
    kl_to_original: float | None = None
    kl_by_position: dict[str, float] | None = None
    kl_beyond: float | None = None
    top1_agreement: float | None = None
    perplexity: float | None = None
    perplexity_se: float | None = None
    recall: float | None = None
    recall_questions: int | None = None
    recall_drop_se: float | None = None
    recall_by_distance: dict[str, float] | None = None
    embedding_cosine_mean: float | None = None
    embedding_cosine_min: float | None = None
    retrieval_rank_correlation: float | None = None
    masked_top1_agreement: float | None = None
    ttft_ms: dict[str, float] | None = None
    tpot_ms: dict[str, float] | None = None
    latency_ms: dict[str, float] | None = None
    ttft_quartiles_ms: dict[str, tuple[float, float]] | None = None
    tpot_quartiles_ms: dict[str, tuple[float, float]] | None = None
    latency_quartiles_ms: dict[str, tuple[float, float]] | None = None
    prompt_tokens_per_second: dict[str, float] | None = None
    tokens_per_second: dict[str, float] | None = None
    peak_rss_mib: float | None = None


class GateResult(Frozen):
    """One gate: the measured value against its limit."""

    name: str
    value: float | None
    limit: float
    passed: bool
    note: str | None = Field(None, description="why the verdict says little, if it does")


class SampleAnswer(Frozen):
    """What the plain export and the artifact write after the same prompt, greedily."""

    prompt: str
    plain: str
    artifact: str


class Speculation(Frozen):
    """What a draft gains on held-out text, written greedily behind a context, with and without it in turns."""

    context: int = Field(description="tokens before the texts that are written")
    tokens: int = Field(description="tokens that are written")
    differing: int = Field(
        description="texts that are not the model's own, with activations in float32; must be 0 for the gates to pass"
    )
    tokens_per_round: float = Field(description="of a run of the graph")
    acceptance: tuple[float, ...] = Field(description="how often the first proposal of a run was right, the second ...")
    speed_ratio: float = Field(description="tokens per second over those without the draft, median over the texts")


class Report(Frozen):
    """What an artifact costs and saves, next to the plain export of the same model.

    Latencies in `ratio` are medians over pairs of neighbouring turns: load on the machine slows both sides alike.
    """

    passed: bool
    gates: tuple[GateResult, ...]
    plain: Measures
    floor: Measures
    artifact: Measures
    ratio: Measures
    original: Measures | None = Field(None, description="the model in float32, where the weights are quantised")
    smaller_than: dict[str, float] | None = Field(
        None, description="how many times smaller the cache is than the same model's in fp32, fp16 and q8_0"
    )
    timings_uncertain: str | None = Field(None, description="why the timings say little, if they do")
    samples: tuple[SampleAnswer, ...] = Field((), description="answers to compare by eye")
    speculation: Speculation | None = Field(
        None, exclude_if=lambda found: found is None, description="what the artifact's draft gains, if it has one"
    )


def _known(description: str) -> Any:
    """A field that is left out where it is not known, so that older manifests keep their digest."""
    return Field(None, exclude_if=lambda value: value is None, description=description)


class Source(Frozen):
    """Where the model came from: the id the user gave, the hub revision if any, the digest of its weights."""

    model: str
    revision: str | None
    sha256: str
    base_model: str | None = _known("the hub's id of the model, or of the one that a GGUF file was made from")
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
