"""What every stage agrees on: a model's shape, and the cache tensors of a graph. Plain, frozen, free of torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

MIB = 2**20
WeightType = Literal["fp32", "int8", "int4"]
WeightMethod = Literal["gptq", "k_quant", "rtn"]
CacheType = Literal["float32", "int8", "int4", "codes3", "codes2", "codes1"]
Stored = Literal["float32", "int8", "int4"]  # what the operators of onnxruntime read
Granularity = Literal["per_channel", "per_tensor"]
Clip = Literal["error", "minmax"]
Kind = Literal["key", "value", "key_codes", "value_codes", "state"]
Layout = Literal["gqa", "attention24"]
Objective = Literal["balanced", "key"]
Part = Literal["attention", "mlp", "block"]
Clusters = Literal["static", "dynamic"]
Task = Literal["text-generation", "fill-mask", "feature-extraction"]
Axes = tuple[str | int, ...]  # lengths of a tensor's axes, or their names where they vary

INPUTS = ("input_ids", "attention_mask", "position_ids")  # before the cache; not every graph needs positions
LAST_POSITION = "last_position"  # the node that hands the head the last position alone
FIRST_LOGITS = "first_logits"  # an input of that node in graphs for evaluation: the first position that gets logits
BITS: dict[CacheType, int] = {"float32": 32, "int8": 8, "int4": 4, "codes3": 3, "codes2": 2, "codes1": 1}
WINDOW_SLACK = 16  # rows of a window's cache beyond the window: eviction then moves it once in so many tokens
# Names of axes. Those of past and present must differ, or onnxruntime takes them for equal (its issue 32716).
BATCH, LENGTH, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
CAPACITY = "max_sequence_length"  # of a cache that is allocated for its full length: past and present are one buffer


class Frozen(BaseModel):
    """A frozen value that refuses unknown fields and numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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

    @property
    def rope_bytes(self) -> int:
        """About what a graph's cosines and sines of all positions take, once for each kind of layer."""
        return 4 * self.max_context * self.head_dim * len(set(self.windows))


class KVTensor(Frozen):
    """One KV input of the graph, [batch, heads, rows, dim]; int4 packs two numbers into a uint8, which halves dim.

    This is the tensor of a full cache: a row per token, or the model's own sliding window, which the operator keeps.
    Other kinds of cache derive from it.
    """

    cache: str = Field("full", description="kind of cache that it belongs to")
    layer: int
    kind: Kind
    heads: int
    dim: int
    dtype: CacheType
    window: int | None = Field(None, description="recent tokens that the cache must keep; None for all")
    sinks: int | None = Field(
        None, description="first tokens kept beside the window, in a ring; None: the operator keeps the window"
    )

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
        return self.heads * self.dim * BITS[self.dtype] // 8

    @property
    def columns(self) -> int:
        """Length of the last axis, in stored elements."""
        return self.dim if self.dtype in {"float32", "int8"} else self.dim * BITS[self.dtype] // 8

    @property
    def kept(self) -> int | None:
        """Rows of the layer's window with its sinks or its slack; None where all tokens are kept."""
        return None if self.window is None else self.window + (WINDOW_SLACK if self.sinks is None else self.sinks)

    def rows(self, context: int) -> int:
        """Rows to allocate for a context of that many tokens."""
        return context if self.kept is None else self.kept

    def past_axes(self, layout: Layout) -> Axes:
        """Axes of the graph input."""
        return self._axes(CAPACITY if layout == "attention24" else PAST)

    def present_axes(self, layout: Layout) -> Axes:
        """Axes of the graph output."""
        return self._axes(CAPACITY if layout == "attention24" else TOTAL)

    def _axes(self, rows: str) -> Axes:
        return (BATCH, self.heads, rows if self.kept is None else self.kept, self.columns)
