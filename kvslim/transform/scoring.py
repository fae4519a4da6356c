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
        window: Tokens that a query sees, itself included; None for all before it.
        softcap: Bound c of the scores, as c * tanh(score / c); None for none (Gemma 2, 2024, section 2).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None

    def weights(self, query: Tensor, key: Tensor, start: int = 0) -> Tensor:
        """Softmax weights, causal.

        Args:
            query: [..., queries, head_dim], of the tokens from `start` on.
            key: [..., keys, head_dim], of the tokens from 0 on.
            start: Position of the first query.

        Returns:
            [..., queries, keys].
        """
        scores = query @ key.transpose(-1, -2) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        age = torch.arange(start, start + query.shape[-2])[:, None] - torch.arange(key.shape[-2])
        hidden = age < 0 if self.window is None else (age < 0) | (age >= self.window)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1)
