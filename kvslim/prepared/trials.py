"""What a method may measure before it decides: how far a model with a change is from itself without."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kvslim.contract import ModelSpec
from kvslim.errors import UnsupportedError
from kvslim.methods.base import Method
from kvslim.methods.fitting import fit
from kvslim.planning.refit import refit_as_planned
from kvslim.progress import Progress
from kvslim.settings import Budget
from kvslim.transform.edits import Codes
from kvslim.types import Plan, PlanPoint, Survey

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics
    from kvslim.planning.choose import Chosen
    from kvslim.prepared.base import PreparedModel


class Trials(ABC):
    """Trials of a prepared model that is not edited yet, on calibration text that nothing is fitted to.

    Args:
        prepared: The model.

    Attributes:
        loss_name: What the loss is called in a plan's reasons.
        spec: The model's shape.
        statistics: What is known of it.
        identity: The plan that changes nothing.
        progress: Receives the progress.
        methods: Those whose options are not the defaults.
    """

    loss_name: ClassVar[str]

    spec: ModelSpec
    statistics: CalibrationStatistics
    identity: Plan
    progress: Progress
    methods: tuple[Method, ...]

    def __init__(self, prepared: PreparedModel) -> None:
        recipe = prepared.recipe
        self.spec, self.progress, self.methods = prepared.spec, prepared.progress, recipe.methods
        self.identity = Plan.identity(prepared.spec, recipe.layout, recipe.window_cache)
        self.statistics = prepared.statistics

    @abstractmethod
    def loss(self, codes: Codes) -> float:
        """How far the model with codes is from itself without."""

    def losses(self, codes: Iterable[Codes]) -> Iterator[float]:
        """The losses of many, in their order; each is made when it is needed."""
        return map(self.loss, codes)

    @abstractmethod
    def refitting(self, codes: Codes) -> Iterator[Codes]:
        """The codes with projections fitted to them, on text that serves for fitting: of one layer more each time."""

    def refitted(self, codes: Codes) -> Codes:
        """The codes with projections of all layers fitted to them."""
        return [codes, *self.refitting(codes)][-1]

    def transferred(self, plan: Plan, codes: Codes) -> Codes:
        """The codes with the features of linear caches trained."""
        return codes

    def recall_drop(self, change: Plan | Method) -> float:
        """Probability that recalled answers may lose by a change.

        Raises:
            UnsupportedError: The model writes no text.
        """
        raise self._unsupported("recall")

    @property
    def taylor(self) -> np.ndarray:
        """[layers, q_heads] Taylor scores of query heads, nats per token.

        Raises:
            UnsupportedError: The model writes no text.
        """
        raise self._unsupported("next tokens")

    def within(self, budget: Budget) -> Chosen:
        """The planner's choice for a budget.

        Raises:
            UnsupportedError: The model has no cache.
            GateError: No plan meets all limits.
        """
        raise self._unsupported("a KV cache")

    def survey(self, frontier: tuple[PlanPoint, ...] = ()) -> Survey:
        """What other sizes cost, as the planner found or else with all layers alike, and other tools' cache types.

        Empty for a model without a cache.

        Args:
            frontier: Sizes that a planner has measured.
        """
        return Survey(frontier)

    def divergence(self, change: Plan | Method) -> float:
        """How far the model is from itself with a plan, or with one method and nothing else."""
        return self.loss(self.codes_of(change))

    def divergences(self, changes: Iterable[Plan | Method]) -> Iterator[float]:
        """The divergences of many changes, each alone, in their order."""
        return self.losses(map(self.codes_of, changes))

    def codes_of(self, change: Plan | Method) -> Codes:
        """Codes of a plan, or of the model with one method and nothing else; no projections are refitted."""
        if isinstance(change, Method):
            change = change.decide(self.spec, self.statistics, self.identity)
        return fit(self.spec, self.statistics, change)

    def codes(self, plan: Plan) -> Codes:
        """What a plan puts into the model, one entry per layer, with the options of the recipe's methods."""
        codes = self.transferred(plan, fit(self.spec, self.statistics, plan, self.methods))
        return refit_as_planned(plan, codes, self.refitted)

    def _unsupported(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.spec.model_type} is an encoder, without {what}", where="--recipe", fix="use `-r encoder`"
        )
