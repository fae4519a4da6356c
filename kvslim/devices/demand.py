"""What a model needs for training, reading a prompt and decoding: memory, memory traffic, and FLOPs.

Multiplying a token with a matrix of n numbers takes 2 n FLOPs; attention over c tokens takes 2 c (key dim + value dim)
per query head. Decoding reads each matrix once per token; a prompt reads it once per chunk. The cache is read once by
each query head: onnxruntime's kernel reads the rows of a kv head again for every query head of the group, so its time
grows with the query heads. Activations of inference stay in the processor's caches and are not counted.
docs/devices.md has the formulas and the measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvslim.contract import Frozen, KVTensor, ModelSpec, WeightType
from kvslim.loading.parameters import Parameters
from kvslim.types import KVLayout, Plan

StageName = Literal["training", "prefill", "decode"]

CHUNK = 512  # tokens of a prompt that run at once, as in `kvslim.runtime`
RUNTIME_BYTES = 128 * 2**20  # peak memory apart from weights and cache: interpreter, onnxruntime, activations
FLOAT = 4
BLOCK = 32
BLOCK_BYTES: dict[WeightType, float] = {  # codes, a float32 scale and a zero point
    "fp32": BLOCK * FLOAT,
    "int8": BLOCK + FLOAT + 1,
    "int4": BLOCK / 2 + FLOAT + 0.5,
}
STATES = 4  # numbers that training with Adam holds per parameter: itself, its gradient and two moments
MOVES = (
    10  # numbers moved per step: read forward and back, gradient written, all four read, all but the gradient written
)
PASSES = 3  # the backward pass computes two products for each of the forward pass
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
    """

    stage: StageName
    context: int
    memory_bytes: int
    bytes_per_token: float
    flops_per_token: float


@dataclass(frozen=True)
class StoredWeights:
    """Weights and how they are stored.

    Attributes:
        name: Their name in tables.
        stored: Bytes in memory.
        read: Bytes that a token reads.
        products: Numbers in matrices that every token is multiplied with.
        head: Numbers in the matrix that gives logits, which a prompt needs once per chunk.
    """

    name: str
    stored: int
    read: int
    products: int
    head: int

    @classmethod
    def of(cls, parameters: Parameters, kind: WeightType) -> StoredWeights:
        """A model's matrices in this type, everything else in float32."""
        products = parameters.products + parameters.head
        number = BLOCK_BYTES[kind] / BLOCK
        read = int(products * number) + parameters.others * FLOAT
        stored = read + int(parameters.embedding * number) + parameters.positions * FLOAT
        return cls(kind, stored, read, parameters.products, parameters.head)


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
        return sum(2 * self.q_heads[each.layer] * each.dim * _held(each, context) for each in self.layout.tensors)


def query_heads(spec: ModelSpec, plan: Plan) -> tuple[int, ...]:
    """Query heads that each layer keeps under a plan."""
    return tuple(spec.q_heads if layer.heads is None else len(layer.heads) for layer in plan.layers)


def decode(weights: StoredWeights, cache: Cache, context: int) -> Demand:
    """One token after a context."""
    return Demand(
        stage="decode",
        context=context,
        memory_bytes=memory(weights, cache, context),
        bytes_per_token=weights.read + cache.read_at(context),
        flops_per_token=2 * (weights.products + weights.head) + cache.flops_at(context),
    )


def prefill(weights: StoredWeights, cache: Cache, context: int) -> Demand:
    """A prompt of `context` tokens, in chunks; each chunk needs the head only for its last token."""
    ends = [*range(CHUNK, context, CHUNK), context]
    moved = sum(weights.read + cache.read_at(end) for end in ends)
    flops = 2 * (weights.products * context + weights.head * len(ends)) + _attention(cache, ends)
    return Demand(
        stage="prefill",
        context=context,
        memory_bytes=memory(weights, cache, context),
        bytes_per_token=moved / context,
        flops_per_token=flops / context,
    )


def training(spec: ModelSpec, parameters: Parameters, cache: Cache, context: int) -> Demand:
    """A step of Adam in float32 on one text of `context` tokens."""
    kept = FLOAT * context * (ACTIVATIONS * spec.hidden_size * spec.layers + spec.vocab_size)
    products = 2 * (parameters.products + parameters.head) * context
    attention = _attention(cache, [*range(CHUNK, context, CHUNK), context])
    return Demand(
        stage="training",
        context=context,
        memory_bytes=FLOAT * STATES * parameters.total + kept,
        bytes_per_token=(FLOAT * MOVES * parameters.total + 2 * kept) / context,
        flops_per_token=PASSES * (products + attention) / context,
    )


def memory(weights: StoredWeights, cache: Cache, context: int) -> int:
    """Memory that inference needs at a context."""
    return weights.stored + cache.bytes_at(context) + RUNTIME_BYTES


def _held(tensor: KVTensor, context: int) -> int:
    return min(context, tensor.rows(context))


def _attention(cache: Cache, ends: list[int]) -> float:
    """FLOPs of all tokens' attention. Within a chunk they grow linearly from the first token to the last."""
    starts = [0, *ends[:-1]]
    return sum(
        (end - start) * (cache.flops_at(start + 1) + cache.flops_at(end)) / 2
        for start, end in zip(starts, ends, strict=True)
    )
