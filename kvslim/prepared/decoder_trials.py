"""Trials of a decoder: divergence and recall on calibration text that nothing is fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from kvslim.calibrate.taylor import taylor_scores
from kvslim.memory import give_back
from kvslim.methods.base import Method
from kvslim.planning.budget import choose_within
from kvslim.planning.choose import Chosen
from kvslim.planning.refit import refit_where_it_pays
from kvslim.planning.survey import surveyed
from kvslim.planning.windows import SHARES
from kvslim.prepared.fitted import heal, shortened, transferred_before
from kvslim.prepared.text import joined, split
from kvslim.prepared.trials import Trials
from kvslim.settings import Budget, Heal
from kvslim.transform.compensate import refitting
from kvslim.transform.edits import Codes
from kvslim.transform.kl_evaluator import KLEvaluator, held_out_windows, is_large, probe_windows
from kvslim.transform.recall_trials import AnswerTrials, RecallTrials
from kvslim.types import Plan, PlanPoint, Survey

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics
    from kvslim.prepared.decoder import PreparedDecoder
    from kvslim.validation.recall import RecallItem

REFIT_TOKENS = 4_096, 12_288  # for many layers, for few
TAYLOR_TOKENS = 8_192
RECALL_ITEMS, LAZY_ITEMS, FAR_ITEMS = 50, 12, 32
LONGEST = 4_096  # tokens of a text that states are trained on
JOINED = 4  # text is put end to end up to one part in so many of the target context


@dataclass(frozen=True)
class Losing:
    """The loss of the model with one after another of many codes.

    Attributes:
        statistics: What is known of the model's cache; they have the text.
    """

    statistics: CalibrationStatistics

    def open(self, prepared: PreparedDecoder) -> Callable[[Codes], float]:
        """What measures codes."""
        vars(prepared)["statistics"] = self.statistics
        trials = prepared.trials()

        def loss(codes: Codes) -> float:
            give_back()  # what is computed with other codes comes on top
            return trials.loss(codes)

        return loss


class DecoderTrials(Trials):
    """Trials of a prepared decoder that is not edited yet.

    Args:
        prepared: The model.
    """

    loss_name = "KL"

    def __init__(self, prepared: PreparedDecoder) -> None:
        super().__init__(prepared)
        self.prepared, self.model, self.architecture = prepared, prepared.device_model, prepared.architecture

    @cached_property
    def held_out(self) -> KLEvaluator:
        """The divergence on that part of the calibration text which nothing is fitted to.

        Its windows are put end to end up to a quarter of the target context, as far as there are tokens: what a cache
        forgets does not show on shorter text.
        """
        windows, mask = (
            held_out_windows(joined(split(array)[1], self.prepared.context // JOINED), self.spec.vocab_size)
            for array in (self.statistics.windows, self.statistics.loss_mask)
        )
        return KLEvaluator(self.model, self.architecture, windows, mask, probing=True)

    @cached_property
    def probe(self) -> KLEvaluator:
        """The divergence on a little of the text that serves for fitting, for many quick probes."""
        windows, mask = (
            probe_windows(split(array)[0], self.spec.layers, large=is_large(self.model))
            for array in (self.statistics.windows, self.statistics.loss_mask)
        )
        return KLEvaluator(self.model, self.architecture, windows, mask, probing=True)

    @cached_property
    def recall(self) -> AnswerTrials:
        """Some recall questions, to be asked often; what counts is the probability of their answers.

        Of so few questions no answer may change though a layer loses much. SmolLM2-135M with windows of 512 tokens in
        eight layers lost 0.7 % of the answers of 12 questions, and 4 % of those of 100.
        """
        return AnswerTrials(self.model, self.architecture, self._recall_items(LAZY_ITEMS))

    @cached_property
    def far_recall(self) -> AnswerTrials:
        """The same over the whole target context, by which windows are judged.

        At 4,096 tokens SmolLM2-135M lost a quarter of its recall with windows of 512 that lost nothing up to 1,024.
        """
        return AnswerTrials(self.model, self.architecture, self.far_items)

    @cached_property
    def far_items(self) -> list[RecallItem]:
        """Questions of one text as long as the target context, at all distances that the longest window leaves out.

        Where there is no such text, near ones.
        """
        far = self.prepared.text.far_items(self.statistics.windows, FAR_ITEMS, 1 - SHARES[0])
        return far or self._recall_items(LAZY_ITEMS)

    @cached_property
    def more_recall(self) -> RecallTrials:
        """More of both, to be asked of a few plans; what counts are right answers, as when an artifact is measured."""
        far = self.prepared.text.far_items(self.statistics.windows, FAR_ITEMS, 0.5)
        return RecallTrials(self.model, self.architecture, [*far, *self._recall_items(RECALL_ITEMS)])

    def _recall_items(self, most: int) -> list[RecallItem]:
        return self.prepared.text.recall_items(self.statistics.windows, most)

    @cached_property
    def taylor(self) -> np.ndarray:
        """Taylor scores on some of the text that serves for fitting; see `taylor_scores`."""
        windows, mask = (split(array)[0] for array in (self.statistics.windows, self.statistics.loss_mask))
        count = max(1, TAYLOR_TOKENS // windows.shape[1])
        return taylor_scores(self.model, self.architecture, self.spec, windows[:count], mask[:count], self.progress)

    def loss(self, codes: Codes) -> float:
        """Mean KL(model || model with codes), nats per token."""
        return self.held_out.kl(codes)

    def losses(self, codes: Iterable[Codes]) -> Iterator[float]:
        """The losses of many, in their order, by the model's workers."""
        return self.prepared.workers.map(self.prepared, self._losing, codes, self.loss)

    @cached_property
    def _losing(self) -> Losing:
        return Losing(self.statistics)

    def recall_drop(self, change: Plan | Method) -> float:
        """Probability that recalled answers may lose by a change."""
        return self.recall.drop(self.codes_of(change))

    def refitting(self, codes: Codes) -> Iterator[Codes]:
        """The codes with projections fitted to them, on some of the text that serves for fitting; layer by layer."""
        fitting, _ = split(self.statistics.windows)
        tokens = min(max(REFIT_TOKENS[0], 2**17 // self.spec.layers), REFIT_TOKENS[1])
        count = max(1, tokens // fitting.shape[1])
        return refitting(self.model, self.architecture, codes, fitting[:count], self.progress)

    def healed(self, plan: Plan, settings: Heal) -> tuple[Plan, float]:
        """The plan, refitted where that pays, and the KL that it is expected to keep when it is healed.

        That is its KL on this text, which shows windows too, times the share of it that a short training leaves on text
        that the training never saw.

        Args:
            plan: Without projections that are fitted again.
            settings: Of the whole training.
        """
        refits = self.prepared.recipe.compensate
        plan, kl = refit_where_it_pays(self, plan) if refits else (plan, self.loss(self.codes(plan)))
        _, healing = heal(self.prepared, self.prepared.fitted(plan), shortened(settings))
        return plan, kl * (healing.kl_after / healing.kl_before if healing.kept else 1)

    def transferred(self, plan: Plan, codes: Codes) -> Codes:
        """The codes with the features of linear caches trained on text that serves for fitting."""
        if all(code.features is None for code in codes):
            return codes
        fitting, _ = split(self.statistics.windows)
        windows = joined(fitting, min(self.prepared.context, LONGEST))
        return transferred_before(self.prepared, plan, codes, windows)

    def within(self, budget: Budget) -> Chosen:
        """The planner's choice for a budget."""
        return choose_within(budget, self)

    def survey(self, frontier: tuple[PlanPoint, ...] = ()) -> Survey:
        """What other sizes cost, and other tools' cache types."""
        return surveyed(self, frontier)
