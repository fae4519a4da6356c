"""Recall questions that are put to a model again and again, each time with other codes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from statistics import mean, stdev

from kvslim.transform.edits import LayerEdit
from kvslim.transform.kl_evaluator import KLEvaluator, Question


class _Asked:
    """Questions, and the model that they are put to.

    Args:
        evaluator: Runs the model on the questions.
        items: The questions.
    """

    def __init__(self, evaluator: KLEvaluator, items: Sequence[Question]) -> None:
        self.evaluator, self.items = evaluator, items


class RecallTrials(_Asked):
    """Recall as it is measured of an artifact: the share of answer tokens that the model finds most likely."""

    @cached_property
    def plain(self) -> float:
        """Recall of the model without codes."""
        return self.evaluator.recall((), self.items)

    def drop(self, codes: tuple[LayerEdit, ...]) -> float:
        """Share of recall that the model loses with codes."""
        return self.plain - self.evaluator.recall(codes, self.items)


class AnswerTrials(_Asked):
    """The probability of answers: it falls about as recall does, but by little where a model loses little."""

    @cached_property
    def plain(self) -> list[float]:
        """The probability of each answer without codes."""
        return self.evaluator.answer_probabilities((), self.items)

    def drop(self, codes: tuple[LayerEdit, ...]) -> float:
        """Probability that answers may lose with codes: the mean loss, if it is one, and its standard error.

        Where some answers gain and others lose, their mean says nothing, and the questions of another text lose.
        """
        found = self.evaluator.answer_probabilities(codes, self.items)
        lost = [before - after for before, after in zip(self.plain, found, strict=True)]
        error = stdev(lost) / len(lost) ** 0.5 if len(lost) > 1 else 0.0
        return max(mean(lost), 0.0) + error

    def shifts(self, edit: LayerEdit, layers: Sequence[int]) -> dict[int, float]:
        """How far each of the layers moves what it gives where answers are predicted, when it alone has an edit.

        One pass tells it for all layers, and it orders them nearly as the divergence that each makes at the answers:
        with windows of 512 tokens in SmolLM2-135M, at a context of 4,096, the rank correlation is 0.97.

        Returns:
            By layer the mean of |change| / |output|.
        """
        return self.evaluator.shifts(edit, layers, self.items)
