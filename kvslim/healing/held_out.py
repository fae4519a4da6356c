"""How far a student is from its teacher, on text that it is not trained on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kvslim.transform.device import where
from kvslim.transform.edits import Array
from kvslim.transform.kl_evaluator import BATCH, SMALL_VOCABULARY, log_probabilities, logits_at, predicting, summed_kl

LOST = 1e9  # nats per token, of a student whose logits are no numbers any more


class HeldOut:
    """Text with what the teacher says of it.

    Args:
        teacher: The model as it is.
        windows: [n, length] token ids.
        loss_mask: [n, length] bool, the tokens whose prediction counts; None for all.
    """

    def __init__(self, teacher: Any, windows: Array, loss_mask: Array | None) -> None:
        size = max(1, BATCH // windows.shape[1])
        counted = torch.from_numpy(predicting(windows, loss_mask))
        stride = 2 if teacher.config.vocab_size > SMALL_VOCABULARY and counted[:, 1::2].any() else 1
        self._places = torch.arange(stride - 1, windows.shape[1], stride)
        counted = counted[:, self._places]
        parts = (part.to(teacher.device).split(size) for part in (torch.from_numpy(windows), counted))
        self._batches = list(zip(*parts, strict=True))
        self._teacher = [log_probabilities(self._logits(teacher, batch)) for batch, _ in self._batches]
        self._count = int(counted.sum())

    def kl(self, student: Any) -> float:
        """Mean KL(teacher || student), nats per token; `LOST` where that is no number."""
        total = 0.0
        for (batch, counted), expected in zip(self._batches, self._teacher, strict=True):
            total += summed_kl(expected, self._logits(student, batch), counted)
        return max(total / self._count, 0.0) if math.isfinite(total) else LOST

    def _logits(self, model: Any, batch: Tensor) -> Tensor:
        with where(model), torch.inference_mode():
            return logits_at(model, batch, self._places)
