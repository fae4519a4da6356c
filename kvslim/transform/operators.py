"""The onnxruntime and ONNX operators that a layer's attention becomes in a graph.

`gqa` is onnxruntime's fused GroupQueryAttention: one operator that rotates, appends to the cache and attends.
`attention24` is the standard's own: TensorScatter appends to a cache allocated for its full length, Attention attends
under a mask (ONNX operator set 24). It is slower, and takes keys and values of different ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvslim.contract import BITS, CacheType, Layout
from kvslim.transform.rotary import Rotary
from kvslim.transform.scoring import Scoring

Scales = tuple[Tensor, Tensor] | None
# So many last coordinates of keys and of values hold what rounding leaves of the first ones, and queries read both
# alike. The operator does not know it: an attribute tells it to `export.prompts`, which takes it away.
Residuals = tuple[int, int]
RESIDUALS = "residuals"


@dataclass
class ExportStep:
    """What one layer's attention reads of a graph, and the cache tensors that it returns.

    Attributes:
        layout: The operators to use.
        window_cache: Whether the layer's cache has the size of its window.
        past: Key and value cache, [batch, kv_heads, rows, dim] each; with packed codes these follow.
        rows: Rows of every cache in layout attention24, read off one, so that all layers share what masks them.
        mask: [batch, total] int64, 1 for every token so far and of this step.
        positions: [batch, length] int64, of the new tokens.
        extra: What the layer's cache takes from the graph besides, as `Cache.inputs` names it.
        shared: What is the same in all layers of a step and better traced once, by the name that a layer gives it.
        present: Key and value cache with the new tokens, once attention has run; then new rows of packed codes.
        extra_outputs: What it gives besides, as `Cache.outputs` names it.
    """

    layout: Layout
    window_cache: bool
    past: tuple[Tensor, ...]
    rows: int
    mask: Tensor
    positions: Tensor
    extra: tuple[Tensor, ...]
    shared: dict[object, Tensor]
    present: tuple[Tensor, ...] | None = field(default=None, init=False)
    extra_outputs: tuple[Tensor, ...] = field(default=(), init=False)

    def once(self, name: object, make: Callable[[], Tensor]) -> Tensor:
        """What is the same in all layers, made by the first that asks for it."""
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]


def group_query_attention(
    step: ExportStep,
    states: tuple[Tensor, Tensor, Tensor],
    scoring: Scoring,
    *,
    rotary: Rotary | None,
    cache: CacheType,
    scales: Scales,
    residuals: Residuals,
) -> Tensor:
    """Attention by onnxruntime's fused operator.

    Args:
        step: Where it stands in the graph; takes the present cache.
        states: Query, key and value, [batch, heads, length, dim] each.
        scoring: How scores become weights.
        rotary: RoPE for the operator to apply, or None.
        cache: How it stores keys and values.
        scales: Steps of an integer cache, in the shape that the operator reads, or None.
        residuals: See `Residuals`.

    Returns:
        [batch, length, q_heads, dim].
    """
    attributes = _attributes(states[0], states[1].shape[1], scoring, cache, scales, residuals)
    past_key = step.past[0]
    attributes |= {"do_rotary": int(rotary is not None)}
    rows = past_key.shape[2] + states[0].shape[2]
    if scoring.window is not None and step.window_cache:
        attributes["sliding_window_cache"] = 1
        rows = past_key.shape[2]
    inputs: list[Tensor | None] = [*map(merged, states), *step.past, *_lengths(step)]
    inputs += [None, None] if rotary is None else [rotary.cos, rotary.sin]
    inputs += [] if scales is None else [None] * 3 + list(scales)
    attended, step.present = _fused(states[0], inputs, attributes, rows)
    return attended


def masked_attention(
    states: tuple[Tensor, Tensor, Tensor],
    past: tuple[Tensor, Tensor],
    hidden: Tensor,
    scoring: Scoring,
    *,
    cache: CacheType,
    scales: Scales,
    residuals: Residuals,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Attention over rows in any order by the same operator, which a mask tells what each query sees.

    The operator reads a mask as fast as none. Without rows it takes a batch; with rows, of a batch one token at a time.

    Args:
        states: Query, key and value, [batch, heads, length, dim] each, after RoPE.
        past: Keys and values so far, [batch, kv_heads, rows, columns].
        hidden: What to add to the scores, [batch, 1, length, rows + length]: 0, or -inf where a query does not see.
        scoring: How scores become weights, but for what the mask hides.
        cache: How keys and values are stored.
        scales: Their steps.
        residuals: See `Residuals`.

    Returns:
        [batch, length, q_heads, dim], and the rows so far with the new ones behind them.
    """
    query, rows = states[0], hidden.shape[3]
    attributes = _attributes(query, states[1].shape[1], replace(scoring, window=None), cache, scales, residuals)
    last = torch.tensor(rows - 1, dtype=torch.int32).expand(query.shape[0])
    inputs: list[Tensor | None] = [*map(merged, states), *past, last, torch.tensor(rows, dtype=torch.int32)]
    inputs += [None, None, None, hidden, *([] if scales is None else (None, *scales))]
    return _fused(query, inputs, attributes, rows)


def shared_attention(
    step: ExportStep,
    query: Tensor,
    source: tuple[Tensor, Tensor],
    scoring: Scoring,
    *,
    cache: CacheType,
    scales: Scales,
) -> Tensor:
    """Attention over another layer's cache by the same operator, which then gets no new keys and values.

    The operator gives a present cache of its own; bound to the source's memory it copies nothing. It could do without
    over float32 alone, and there onnxruntime before 1.31 crashes.

    Args:
        step: Where it stands in the graph; takes that present cache.
        query: [batch, q_heads, length, dim], to be multiplied with what the source layer keeps.
        source: Its present cache, with the new tokens.
        scoring: How scores become weights.
        cache: How the source stores keys and values.
        scales: Its steps.

    Returns:
        [batch, length, q_heads, dim].
    """
    kv_heads, rows = source[0].shape[1:3]
    flat = merged(query)
    nothing = flat[:, :0, : kv_heads * query.shape[3]]
    inputs: list[Tensor | None] = [flat, nothing, nothing, *source, *_lengths(step)]
    inputs += [] if scales is None else [None] * 5 + list(scales)
    attended, step.present = _fused(query, inputs, _attributes(query, kv_heads, scoring, cache, scales), rows)
    return attended


def _fused(
    query: Tensor, inputs: list[Tensor | None], attributes: dict[str, Any], rows: Any
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The operator: [batch, length, q_heads, dim], and key and value of so many rows, as its fourth input has them."""
    (batch, q_heads, length, dim), past = query.shape, inputs[3]
    assert past is not None  # every call has a past
    present = (batch, past.shape[1], rows, past.shape[3])
    attended, key, value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        inputs,
        attrs=attributes,
        dtypes=[query.dtype, past.dtype, past.dtype],
        shapes=[(batch, length, q_heads * dim), present, present],
        version=1,
    )
    return attended.reshape(batch, length, q_heads, dim), (key, value)


def _attributes(
    query: Tensor,
    kv_heads: int,
    scoring: Scoring,
    cache: CacheType,
    scales: Scales,
    residuals: Residuals = (0, 0),
) -> dict[str, Any]:
    attributes: dict[str, Any] = {"num_heads": query.shape[1], "kv_num_heads": kv_heads, "scale": float(scoring.scale)}
    if scoring.softcap is not None:
        attributes["softcap"] = float(scoring.softcap)
    if scoring.window is not None:
        attributes["local_window_size"] = scoring.window
    if scales is not None:
        kind = "PER_TENSOR" if scales[0].ndim == 1 else "PER_CHANNEL"
        attributes |= {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": BITS[cache]}
    if min(residuals):
        attributes[RESIDUALS] = list(residuals)
    return attributes


def _lengths(step: ExportStep) -> tuple[Tensor, Tensor]:
    """Index of the last token of each sequence, [batch], and the longest length: what the operator reads."""
    return step.mask.sum(-1).to(torch.int32) - 1, torch.tensor(step.mask.shape[1], dtype=torch.int32)


def standard_attention(step: ExportStep, states: tuple[Tensor, Tensor, Tensor], scoring: Scoring) -> Tensor:
    """Attention by the operators of ONNX 24; arguments and result as for `group_query_attention`."""
    query, key, value = states
    start = step.mask.sum(-1) - query.shape[2]
    key, value = (
        _symbolic("TensorScatter", [past, new, start], past.shape, axis=2)
        for past, new in zip(step.past, (key, value), strict=True)
    )
    step.present = (key, value)
    return standard_shared_attention(step, query, (key, value), scoring)


def standard_shared_attention(
    step: ExportStep, query: Tensor, present: tuple[Tensor, Tensor], scoring: Scoring
) -> Tensor:
    """Attention over a cache that holds the new tokens already; arguments and result as for `shared_attention`."""
    length = query.shape[2]
    start = step.mask.sum(-1) - length
    age = (start[:, None] + torch.arange(length))[:, None, :, None] - torch.arange(step.rows)
    visible = age >= 0
    if scoring.window is not None:
        visible = torch.logical_and(visible, age < scoring.window)
    options = {} if scoring.softcap is None else {"softcap": float(scoring.softcap)}
    shape = (*query.shape[:3], present[1].shape[3])
    inputs = [query, *present, visible]
    return _symbolic("Attention", inputs, shape, scale=float(scoring.scale), **options).transpose(1, 2)


def rotary_embedding(flat: Tensor, heads: int, positions: Tensor, rotary: Rotary) -> Tensor:
    """onnxruntime's operator for RoPE on [batch, length, heads * head_dim] at [batch, length] positions."""
    partial = {} if rotary.dim * heads == flat.shape[-1] else {"rotary_embedding_dim": rotary.dim}
    rotated: Tensor = torch.onnx.ops.symbolic(
        "com.microsoft::RotaryEmbedding",
        [flat, positions, rotary.cos, rotary.sin],
        attrs={"num_heads": heads, **partial},
        dtype=flat.dtype,
        shape=flat.shape,
        version=1,
    )
    return rotated


def gathered(source: Tensor, places: Tensor) -> Tensor:
    """The rows of [batch, heads, rows, columns] at [batch, heads, n, 3] places: batch, head and row."""
    return _symbolic("GatherND", [source, places], (*places.shape[:3], source.shape[3]))


def scattered(cache: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """A cache with rows written at such places; in its own memory, where that is the output's too."""
    return _symbolic("ScatterND", [cache, places, rows], cache.shape)


def _symbolic(name: str, inputs: list[Tensor], shape: Any, **attributes: Any) -> Tensor:
    made: Tensor = torch.onnx.ops.symbolic(name, inputs, attrs=attributes, dtype=inputs[0].dtype, shape=shape)
    return made


def merged(states: Tensor) -> Tensor:
    """[batch, heads, length, dim] as the [batch, length, heads * dim] that onnxruntime's operators read."""
    by_token = states.transpose(1, 2)
    return by_token.reshape(*by_token.shape[:2], -1)


def by_head(flat: Tensor, heads: int) -> Tensor:
    """What `merged` was given."""
    return flat.reshape(*flat.shape[:2], heads, -1).transpose(1, 2)
