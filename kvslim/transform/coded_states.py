"""Queries, keys and values of a graph as the cache knows them, in few operators.

At one token an operator takes about as long to start as to run, so that codes cost by their number. RoPE and the codes
of queries and keys are one operator each for the heads of both, and keys and values are rounded with feedback together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvslim.transform.operators import ExportStep, by_head, merged

if TYPE_CHECKING:
    from kvslim.transform.attention import SlimAttention

States = tuple[Tensor, Tensor, Tensor]


def has_packed_codes(slim: SlimAttention) -> bool:
    """Whether queries and keys of a layer have codes of one size, so that one product gives both."""
    query, key = slim.query_encoder, slim.key_encoder
    return query is not None and key is not None and query.shape[2] == key.shape[2]


def packed_codes(slim: SlimAttention, step: ExportStep, states: States, rotates: bool) -> States:
    """Query, key and value after RoPE and codes, as `SlimAttention.coded` gives them.

    Args:
        slim: The layer's numbers; it has packed codes.
        step: Where it stands in the graph.
        states: Query, key and value, [batch, heads, length, head_dim] before RoPE.
        rotates: Whether RoPE is still to come.

    Returns:
        [batch, heads, length, dim] each.
    """
    query, key, value = states
    heads = query.shape[1], key.shape[1]
    both = by_head(torch.cat([merged(query), merged(key)], dim=-1), sum(heads))
    if rotates:
        both = slim.rotated_in_graph(step, both)
    both = both @ _both(slim.query_encoder, slim.key_encoder)
    if slim.key_offset is not None:
        both = both - _both(torch.zeros(heads[0], *slim.key_offset.shape[1:]), slim.key_offset)
    if slim.key_feedback is None or slim.value_feedback is None:
        query, key = _parted(both, heads)
        return slim.finished(query, key, value)
    scale, feedback = _both(slim.key_scale, slim.value_scale), _both(slim.key_feedback, slim.value_feedback)
    query, key = both.split(list(heads), dim=1)
    rounded = slim.with_feedback(torch.cat([key, value], dim=1), scale, feedback)
    key, value = _parted(rounded, (heads[1], heads[1]))
    return query, key, value


def _both(first: Tensor | None, second: Tensor | None) -> Tensor:
    """Numbers of two sides, by head."""
    assert first is not None  # a layer has them of both sides or of none
    assert second is not None
    return torch.cat([first, second])


def _parted(states: Tensor, heads: tuple[int, ...]) -> list[Tensor]:
    """[batch, sum of heads, length, dim] as so many heads each: cut once heads are merged, as operators read them."""
    flat, dim = merged(states), states.shape[3]
    parts = flat.split([count * dim for count in heads], dim=-1)
    return [by_head(part, count) for part, count in zip(parts, heads, strict=True)]
