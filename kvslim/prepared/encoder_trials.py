"""Trials of an encoder: its loss on sentences that nothing is fitted to."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from kvslim.prepared.trials import Trials
from kvslim.transform.compensate import refitting
from kvslim.transform.edits import Codes
from kvslim.transform.loss_evaluator import LossEvaluator

if TYPE_CHECKING:
    from kvslim.prepared.encoder import PreparedEncoder


class EncoderTrials(Trials):
    """Trials of a prepared encoder that is not edited yet.

    Args:
        prepared: The model.
    """

    loss_name = "loss"

    def __init__(self, prepared: PreparedEncoder) -> None:
        super().__init__(prepared)
        self.model, self.architecture = prepared.model, prepared.architecture
        self.fitting, self.chosen_by = prepared.calibration

    @cached_property
    def held_out(self) -> LossEvaluator:
        """The loss on sentences that nothing is fitted to."""
        return LossEvaluator(self.model, self.architecture, self.chosen_by)

    def loss(self, codes: Codes) -> float:
        """One minus the cosine of embeddings, or with a masked-token head the KL at masked tokens."""
        return self.held_out.loss(codes)

    def refitting(self, codes: Codes) -> Iterator[Codes]:
        """The codes with output projections fitted to them, layer by layer."""
        windows = [np.asarray(text) for text in self.fitting.masked or self.fitting.texts]
        return refitting(self.model.base_model, self.architecture, codes, windows, self.progress)
