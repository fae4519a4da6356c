"""What a model needs for training, reading a prompt and decoding: memory, memory traffic, and FLOPs.

Multiplying a token with a matrix of n numbers takes 2 n FLOPs; attention over c tokens takes 2 c (key dim + value dim)
per query head. Decoding reads each matrix once per token; a prompt reads it once per chunk. The cache is read once by
each query head: onnxruntime's kernel reads the rows of a kv head again for every query head of the group, so its time
grows with the query heads. Activations of inference stay in the processor's caches and are not counted. Attention over
integers takes longer than its bytes say: bounds use the bytes and FLOPs that take as long in float32 (`kernels.py`).
What is in memory at once is in `peak.py`; how long kernels take that were timed on a machine, in `limits.py`.
docs/devices.md has the formulas and the measurements.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from kvslim.contract import CacheType, Frozen, KVTensor, ModelSpec, WeightType
from kvslim.devices.kernels import Step, kernel_ratio
from kvslim.devices.peak import CHUNK, FLOAT, memory
from kvslim.loading.parameters import Parameters
from kvslim.types import KVLayout, Plan

StageName = Literal["training", "prefill", "decode"]

BLOCK = 32
BLOCK_BYTES: dict[WeightType, float] = {  # codes, a float32 scale and a zero point
    "fp32": BLOCK * FLOAT,
    "int8": BLOCK + (FLOAT + 1) / 4,  # for 128 numbers
    "int4": BLOCK / 2 + FLOAT + 0.5,
}
# The same in memory: codes, a scale and the block's sum.
PACKED_BYTES: dict[WeightType, float] = {
    "fp32": BLOCK * FLOAT,
    "int8": BLOCK + 2 * FLOAT / 4,
    "int4": BLOCK / 2 + 2 * FLOAT,
}
# Of a number whose bits and blocks are picked: four bits in blocks of 128.
LEAST_BYTES, LEAST_PACKED = (64 + FLOAT + 0.5) / 128, (64 + 2 * FLOAT) / 128
STATES = 4  # numbers that training with Adam holds per parameter: itself, its gradient and two moments
MOVES = (
    10  # numbers moved per step: read forward and back, gradient written, all four read, all but the gradient written
)
PASSES = 3  # the backward pass computes two products for each of the forward pass
MATRICES = 4  # of a layer of a graph: those that read one input are one
# What reads numbers of so many bits; onnxruntime's float16 on CPUs was not measured, and counts as float32.
KERNELS: dict[int, CacheType] = {32: "float32", 16: "float32", 8: "int8", 4: "int4"}
# Numbers of the hidden size that a layer keeps of a token for the backward pass: equation 2 of Korthikanti et al.
# (2022), "Reducing activation recomputation in large transformer models", without dropout, with attention's scores
# computed again as fused kernels do.
ACTIVATIONS = 16


class Demand(Frozen):
    """What one stage needs at a context length.

    Attributes:
        stage: Training on one text, reading a prompt or decoding after it, of `context` tokens.
        context: Tokens.
        memory_bytes: Memory that it occupies.
        bytes_per_token: Memory traffic.
        flops_per_token: Products and sums.
        timed_bytes_per_token, timed_flops_per_token: The same, but of a float32 cache whose attention takes as long.
        kernels: What a token of decoding asks of each kernel, by its name in a profile: numbers of weights, numbers of
            the cache that query heads read, matrices and layers. Empty for other stages.
    """

    stage: StageName
    context: int
    memory_bytes: int
    bytes_per_token: float
    flops_per_token: float
    timed_bytes_per_token: float
    timed_flops_per_token: float
    kernels: dict[str, float] = Field({})


@dataclass(frozen=True)
class StoredWeights:
    """Weights and how they are stored.

    Attributes:
        name: Their name in tables.
        stored: Bytes in files.
        resident: Bytes in memory once a graph is open: matrices as kernels read them, and tables.
        tables: Those of them that are tables, in pages of the file: there once tokens were looked up in them.
        read: Bytes that a token reads.
        products: Numbers in matrices that every token is multiplied with.
        head: Numbers in the matrix that gives logits, which a prompt needs once per chunk.
        width: Numbers that a layer's products make of a token.
        kinds: Numbers in matrices by how they are stored.
    """

    name: str
    stored: int
    resident: int
    tables: int
    read: int
    products: int
    head: int
    width: float
    kinds: Mapping[WeightType, int] = field(default_factory=dict)

    @classmethod
    def of(cls, parameters: Parameters, kind: WeightType) -> StoredWeights:
        """A model's matrices in this type, everything else in float32."""
        return cls.in_bytes(parameters, kind, BLOCK_BYTES[kind] / BLOCK, PACKED_BYTES[kind] / BLOCK)

    @classmethod
    def in_bytes(cls, parameters: Parameters, name: str, number: float, packed: float) -> StoredWeights:
        """A model's matrices with so many bytes a number in files and in memory, everything else in float32."""
        products = parameters.products + parameters.head
        read = int(products * number) + parameters.others * FLOAT
        stored = read + int(parameters.embedding * number) + parameters.positions * FLOAT
        tables, is_tied = int((parameters.embedding or parameters.head) * number), not parameters.embedding
        resident = stored + int(products * (packed - number)) + (tables if is_tied else 0)
        kind = min(BLOCK_BYTES, key=lambda kind: abs(BLOCK_BYTES[kind] / BLOCK - number))
        sizes = parameters.products, parameters.head, parameters.width
        return cls(name, stored, resident, tables, read, *sizes, {kind: products})

    @property
    def decoding(self) -> int:
        """Bytes in memory while tokens are decoded, few of which were looked up."""
        return self.resident - self.tables


@dataclass(frozen=True)
class Cache:
    """A cache, and the attention that reads it.

    Attributes:
        name: Its name in tables.
        layout: Its tensors.
        q_heads: Query heads, by layer.
        bits: Bits of every number; None for those of the layout.
    """

    name: str
    layout: KVLayout
    q_heads: tuple[int, ...]
    bits: int | None = None

    @classmethod
    def of(cls, name: str, spec: ModelSpec, plan: Plan, bits: int | None = None) -> Cache:
        """The cache that a plan gives a model."""
        return cls(name, KVLayout.of(spec, plan), query_heads(spec, plan), bits)

    def row_bytes(self, tensor: KVTensor) -> int:
        """Bytes of one token in a tensor."""
        return tensor.bytes_per_token if self.bits is None else tensor.heads * tensor.dim * self.bits // 8

    def bytes_at(self, context: int) -> int:
        """Bytes to allocate for a context of this many tokens; a window is always allocated in full."""
        return sum(self.row_bytes(tensor) * tensor.rows(context) for tensor in self.layout.tensors)

    def read_at(self, context: int) -> int:
        """Bytes that the next token reads: each query head reads the filled rows of its kv head."""
        return sum(
            self.row_bytes(each) // each.heads * self.q_heads[each.layer] * _held(each, context)
            for each in self.layout.tensors
        )

    def flops_at(self, context: int) -> int:
        """FLOPs of one token's attention over a context."""
        return sum(2 * self._numbers(each, context) for each in self.layout.tensors)

    def timed_read_at(self, context: int, step: Step) -> float:
        """Bytes that attention over float32 reads in the time that it takes over this cache."""
        return sum(FLOAT * self._numbers(each, context) * self._ratio(step, each) for each in self.layout.tensors)

    def timed_flops_at(self, context: int, step: Step) -> float:
        """FLOPs that attention over float32 does in that time, or its own if these are more."""
        return sum(2 * self._numbers(each, context) * max(1, self._ratio(step, each)) for each in self.layout.tensors)

    def attention_at(self, context: int) -> dict[str, float]:
        """Numbers that all query heads together read, by kernel."""
        found = Counter[str]()
        for each in self.layout.tensors:
            found[f"{self._stored(each)} attention"] += self._numbers(each, context)
        return dict(found)

    @property
    def integer_layers(self) -> tuple[int, ...]:
        """Layers whose rows are integers, for the operator or packed."""
        return tuple(sorted({each.layer for each in self.layout.tensors if self._stored(each) != "float32"}))

    def float_rows_at(self, context: int, layer: int) -> int:
        """Bytes of a layer's rows in float32."""
        tensors = [each for each in self.layout.tensors if each.layer == layer]
        return sum(FLOAT * each.heads * each.dim * _held(each, context) for each in tensors)

    def has_codes(self, layer: int) -> bool:
        """Whether a layer's rows are packed codes."""
        return any(each.layer == layer and each.kind.endswith("_codes") for each in self.layout.tensors)

    def _numbers(self, tensor: KVTensor, context: int) -> int:
        """Numbers that all query heads together read."""
        return self.q_heads[tensor.layer] * tensor.dim * _held(tensor, context)

    def _ratio(self, step: Step, tensor: KVTensor) -> float:
        return kernel_ratio(step, self._stored(tensor))

    def _stored(self, tensor: KVTensor) -> CacheType:
        """What the operator reads."""
        return tensor.dtype if self.bits is None else KERNELS[self.bits]


def _most(kinds: Mapping[WeightType, int]) -> list[WeightType]:
    """How most numbers are stored, if there are any."""
    return sorted(kinds, key=lambda kind: kinds[kind])[-1:]


def query_heads(spec: ModelSpec, plan: Plan) -> tuple[int, ...]:
    """Query heads that each layer keeps under a plan."""
    return tuple(spec.q_heads if layer.heads is None else len(layer.heads) for layer in plan.layers)


def decode(weights: StoredWeights, cache: Cache, context: int) -> Demand:
    """One token after a context."""
    products = 2 * (weights.products + weights.head)
    return Demand(
        stage="decode",
        context=context,
        memory_bytes=memory(weights, cache, context),
        bytes_per_token=weights.read + cache.read_at(context),
        flops_per_token=products + cache.flops_at(context),
        timed_bytes_per_token=weights.read + cache.timed_read_at(context, "decode"),
        timed_flops_per_token=products + cache.timed_flops_at(context, "decode"),
        kernels={
            **{f"{kind} product": numbers for kind, numbers in weights.kinds.items()},
            **{f"{kind} matrix": MATRICES * len(cache.q_heads) for kind in _most(weights.kinds)},
            **cache.attention_at(context),
            "layer": len(cache.q_heads),
        },
    )


def prefill(weights: StoredWeights, cache: Cache, context: int) -> Demand:
    """A prompt of `context` tokens, in chunks; each chunk needs the head only for its last token."""
    ends = [*range(CHUNK, context, CHUNK), context]
    read = weights.read * len(ends)
    products = 2 * (weights.products * context + weights.head * len(ends))
    attention = _over_prompt(cache.flops_at, ends)
    timed = _over_prompt(lambda tokens: cache.timed_flops_at(tokens, "prefill"), ends)
    return Demand(
        stage="prefill",
        context=context,
        memory_bytes=memory(weights, cache, context),
        bytes_per_token=(read + sum(map(cache.read_at, ends))) / context,
        flops_per_token=(products + attention) / context,
        timed_bytes_per_token=(read + sum(cache.timed_read_at(end, "prefill") for end in ends)) / context,
        timed_flops_per_token=(products + timed) / context,
    )


def training(spec: ModelSpec, parameters: Parameters, cache: Cache, context: int) -> Demand:
    """A step of Adam in float32 on one text of `context` tokens."""
    kept = FLOAT * context * (ACTIVATIONS * spec.hidden_size * spec.layers + spec.vocab_size)
    products = 2 * (parameters.products + parameters.head) * context
    attention = _over_prompt(cache.flops_at, [*range(CHUNK, context, CHUNK), context])
    moved = (FLOAT * MOVES * parameters.total + 2 * kept) / context
    computed = PASSES * (products + attention) / context
    return Demand(
        stage="training",
        context=context,
        memory_bytes=FLOAT * STATES * parameters.total + kept,
        bytes_per_token=moved,
        flops_per_token=computed,
        timed_bytes_per_token=moved,
        timed_flops_per_token=computed,
    )


def _held(tensor: KVTensor, context: int) -> int:
    return min(context, tensor.rows(context))


def _over_prompt(flops_at: Callable[[int], float], ends: Sequence[int]) -> float:
    """FLOPs of all tokens' attention. Within a chunk they grow linearly from the first token to the last."""
    starts = [0, *ends[:-1]]
    return sum(
        (end - start) * (flops_at(start + 1) + flops_at(end)) / 2 for start, end in zip(starts, ends, strict=True)
    )
