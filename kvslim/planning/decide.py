"""From a recipe to a plan: its methods decide, or the planner where it has a budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from kvslim import stages
from kvslim.blas import one_blas_thread
from kvslim.contract import Frozen, ModelSpec
from kvslim.kv_ratios import smaller_than
from kvslim.planning.refit import refit_where_it_pays
from kvslim.recipe import Recipe
from kvslim.types import KVLayout, PeerPoint, Plan, PlanPoint, Survey

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics
    from kvslim.prepared.base import PreparedModel
    from kvslim.prepared.trials import Trials
    from kvslim.transform.edits import FittedPlan


class PlanSummary(Frozen):
    """What `compress` would decide, and the cache it would give."""

    plan: Plan
    kv_bytes_per_token: float
    plain_kv_bytes_per_token: float
    smaller_than: dict[str, float] | None = Field(
        None, description="how many times smaller the cache is than the same model's in fp32, fp16 and q8_0"
    )
    kl: float = Field(description="mean KL measured in torch on calibration text that no projection was fitted to")
    frontier: tuple[PlanPoint, ...] = Field((), description="what the planner saw at other sizes, the largest first")
    alike: tuple[PlanPoint, ...] = Field((), description="without a budget: what all layers alike cost in a few sizes")
    peers: tuple[PeerPoint, ...] = Field((), description="what cache types of other tools cost")


def decide(recipe: Recipe, spec: ModelSpec, statistics: CalibrationStatistics) -> Plan:
    """The plan that the recipe's methods make of a model's statistics."""
    plan = Plan.identity(spec, recipe.layout, recipe.window_cache)
    for method in recipe.ordered_methods:
        plan = method.decide(spec, statistics, plan)
    return plan


@one_blas_thread()
def planned(prepared: PreparedModel) -> PlanSummary:
    """The plan of a model's recipe, with projections fitted again where that pays.

    No text is read for a recipe that has nothing to decide.

    Raises:
        KvslimError: No plan is good enough.
    """
    recipe, spec = prepared.recipe, prepared.spec
    if recipe.budget is None and not recipe.methods:
        return _summary(prepared, Plan.identity(spec, recipe.layout, recipe.window_cache), 0.0)
    trials = prepared.trials()
    prepared.progress.stage(stages.DECIDE if recipe.budget is None else stages.PLAN)
    if recipe.budget is None:
        plan, around = decide(resolved(recipe, trials), spec, trials.statistics), trials.survey()
    else:
        chosen, frontier = trials.within(recipe.budget)
        plan, around = chosen.plan, trials.survey(frontier)
    if not recipe.compensate or any(layer.refit for layer in plan.layers):
        return _summary(prepared, plan, trials.loss(prepared.codes(plan)), around)
    return _summary(prepared, *refit_where_it_pays(trials, plan), around)


def decided(prepared: PreparedModel, given: Plan | FittedPlan | None) -> tuple[FittedPlan, Survey]:
    """The plan to make with what is fitted for it, and what else there would have been.

    Args:
        prepared: The model.
        given: A plan to make in place of what the recipe decides; what is fitted already is taken as it is.

    Raises:
        KvslimError: As `planned`.
    """
    if given is None:
        summary = planned(prepared)
        return prepared.fitted(summary.plan), Survey(summary.frontier, summary.alike, summary.peers)
    if not isinstance(given, Plan):
        return given, Survey()
    return prepared.fitted(given), Survey() if given.changes_nothing else prepared.trials().survey()


def resolved(recipe: Recipe, trials: Trials) -> Recipe:
    """The recipe with what its methods leave open measured."""
    return recipe.model_copy(update={"methods": tuple(method.resolve(trials) for method in recipe.methods)})


def _summary(prepared: PreparedModel, plan: Plan, kl: float, around: Survey | None = None) -> PlanSummary:
    spec, context = prepared.spec, prepared.context
    slim, plain = (KVLayout.of(spec, each).bytes_per_token(context) for each in (plan, Plan.identity(spec)))
    return PlanSummary(
        plan=plan,
        kv_bytes_per_token=slim,
        plain_kv_bytes_per_token=plain,
        smaller_than=smaller_than(slim, plain),
        kl=kl,
        **(around or Survey())._asdict(),
    )
