"""How a layer turns queries and keys into attention weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scoring:
    """Options of one layer's softmax.

    Attributes:
        scale: Factor of the scores.
        window: Tokens that a query of the model sees, itself included; None for all before it.
        softcap: Bound c of the scores, as c * tanh(score / c); None for none (Gemma 2, 2024, section 2).
        recent: Tokens that a query sees beside the sinks, itself included; None for all (Xiao et al., "Efficient
            Streaming Language Models with Attention Sinks", 2023, section 3.2).
        sinks: First tokens that every query sees, as far as `window` lets it.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    recent: int | None = None
    sinks: int = 0

    def weights(self, query: Tensor, key: Tensor, start: int = 0) -> Tensor:
        """Softmax weights, causal.

        Args:
            query: [..., queries, head_dim], of the tokens from `start` on.
            key: [..., keys, head_dim], of the tokens from 0 on.
            start: Position of the first query.

        Returns:
            [..., queries, keys].
        """
        queries, keys = torch.arange(start, start + query.shape[-2]), torch.arange(key.shape[-2])
        return self.scores(query, key).masked_fill(self.hidden(queries, keys), -torch.inf).softmax(-1)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """[..., queries, keys] before the mask and the softmax."""
        return self.capped(query @ key.transpose(-1, -2) * self.scale)

    def capped(self, scores: Tensor) -> Tensor:
        """Scores within the softcap."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def reach(self, start: int, stop: int) -> Tensor:
        """Positions [keys] of the tokens that any query from `start` to before `stop` may see, in order."""
        recent = min(age for age in (self.window, self.recent, stop) if age is not None)
        first = max(start + 1 - recent, 0)
        return torch.cat([torch.arange(min(self.sinks, first)), torch.arange(first, stop)])

    def hidden(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Which keys a query does not see, by positions [..., queries] and [..., keys]: bool [..., queries, keys]."""
        age = queries[..., :, None] - keys[..., None, :]
        hidden = age < 0
        if self.window is not None:
            hidden = torch.logical_or(hidden, age >= self.window)
        if self.recent is not None:
            dropped = torch.logical_and(age >= self.recent, (keys >= self.sinks)[..., None, :])
            hidden = torch.logical_or(hidden, dropped)
        return hidden
