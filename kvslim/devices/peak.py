"""The peak memory of answering: what a process holds while it reads a prompt and decodes.

Beside the cache these are in memory, as measured on x86 (docs/boards.md has predictions against peaks):

- Python, numpy, onnxruntime, pages of their libraries: `OPEN_BYTES`. The graph: `LAYER_BYTES` a layer, and as much
  again where its cache is of integers, for the branch that reads prompts.
- The weights as the processor's kernels read them. Opening a graph packs each matrix: a block of integers then has its
  codes, a scale, and the sum of the block in float32 in place of its zero point. The stored matrix is given up. A table
  of embeddings that is the output head too is there twice: packed for the product, and as pages of the file.
- The activations of a chunk of a prompt. A layer of n numbers in its matrices makes about n / hidden numbers of a
  token, its width. Not all live at once, but onnxruntime's arena grows in regions, each twice as large as the last,
  and what was too small stays: 2.3 to 2.4 times the width was measured for three shapes, all of them gated.
- Over an integer cache a prompt turns one layer's rows into float32. Attention is given these and gives back as many,
  with the new ones behind them; integers on their way to float32 take the rest of `FLOAT_ROWS`. Over packed codes a
  chunk's scores are in memory too, and chunks have `CODES_CHUNK` tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvslim.contract import MIB

if TYPE_CHECKING:
    from kvslim.devices.demand import Cache, StoredWeights

CHUNK = 512  # tokens of a prompt that run at once, as in `kvslim.runtime`
FLOAT = 4
OPEN_BYTES = 82 * MIB
LAYER_BYTES = 0.35 * MIB
CODES_CHUNK = 64
ARENA = 2.4
FLOAT_ROWS = 2.5
# What a layer's branches over integers take in a process that decodes, and with feedback or residuals on top, measured
# on SmolLM2's shape: a budget of memory counts these. `LAYER_BYTES` was fitted with `ARENA`, to peaks of prompts.
BRANCH_BYTES, FEEDBACK_BYTES, RESIDUAL_BYTES = 0.5 * MIB, 0.2 * MIB, 0.3 * MIB


def open_bytes(layers: int, integer_layers: int = 0) -> float:
    """What a process holds beside weights, cache and activations: interpreter, libraries, and the graph."""
    return OPEN_BYTES + LAYER_BYTES * (layers + integer_layers)


def memory(weights: StoredWeights, cache: Cache, context: int) -> int:
    """Peak memory of reading a prompt and decoding up to a context."""
    return beside_cache(weights, cache, context) + cache.bytes_at(context)


def beside_cache(weights: StoredWeights, cache: Cache, context: int) -> int:
    """What of it is not the cache."""
    integers = cache.integer_layers
    graph = open_bytes(len(cache.q_heads), len(integers))
    chunk = CODES_CHUNK if any(map(cache.has_codes, integers)) else CHUNK
    activations = ARENA * FLOAT * weights.width * min(context, chunk)
    rows = max((_in_float32(cache, layer, context) for layer in integers), default=0)
    return weights.resident + int(graph + activations + rows)


def _in_float32(cache: Cache, layer: int, context: int) -> float:
    """What a prompt holds of a layer beside its integers."""
    scores = FLOAT * CODES_CHUNK * cache.q_heads[layer] * context if cache.has_codes(layer) else 0
    return FLOAT_ROWS * cache.float_rows_at(context, layer) + scores
