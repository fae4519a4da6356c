"""Attention over another layer's cache: queries alone, mapped to what the source layer keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from kvslim.caches.attention.base import CacheAttention, States, attended
from kvslim.transform.operators import shared_attention, standard_shared_attention
from kvslim.transform.scoring import Scoring

if TYPE_CHECKING:
    from kvslim.transform.attention import SlimAttention


@dataclass
class SharedStates:
    """What a layer caches, for the layers that read it.

    Attributes:
        source: The layer that has the cache.
        states: Keys and values [batch, kv_heads, length, rank] as it gives them back; while exporting, the present
            cache; None before the layer ran.
    """

    source: int
    states: tuple[Tensor, Tensor] | None = None


class SharedAttention(CacheAttention):
    """Reads the states of an earlier layer.

    Attributes:
        read: Those states; surgery connects the two layers.
    """

    def __init__(self, source: int) -> None:
        self.read = SharedStates(source)

    def attend(self, slim: SlimAttention, states: States, scoring: Scoring) -> Tensor:
        """Attention of queries alone; keys and values of this layer are not even projected."""
        assert self.read.states is not None  # source layers are earlier
        query = slim.projected("query", states[0])
        if slim.step is None:
            rotated = query if slim.rotary is None else slim.rotary.rotated(query)
            return attended(slim.coded_query(rotated), *self.read.states, scoring)
        query = slim.coded_query(slim.rotated_in_graph(slim.step, query))
        if slim.step.layout == "attention24":
            return standard_shared_attention(slim.step, query, self.read.states, scoring)
        scales = slim.kernel_scales()
        return shared_attention(slim.step, query, self.read.states, scoring, cache=slim.stored, scales=scales)
