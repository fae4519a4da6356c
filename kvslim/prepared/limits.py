"""Limits of the weights: a file's size as a gate, and a budget of memory as shares for weights and cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from kvslim import stages
from kvslim.blas import one_blas_thread
from kvslim.contract import MIB
from kvslim.devices.peak import open_bytes
from kvslim.errors import GateError
from kvslim.methods import KvQuant
from kvslim.planning.budget import planner_of
from kvslim.planning.choose import check_time
from kvslim.planning.split import CacheSize, Split, WeightsSize, beside_bytes, least_room, split, weights_sizes
from kvslim.planning.survey import decided_by
from kvslim.prepared.weights import MatrixPicking, file_limit, matrix_picking
from kvslim.progress import WithinStage
from kvslim.recipe import Recipe
from kvslim.settings import Budget, Gates
from kvslim.types import KVLayout, Plan

if TYPE_CHECKING:
    from kvslim.prepared.decoder import PreparedDecoder
    from kvslim.prepared.decoder_trials import DecoderTrials

STEPS = KvQuant(bits=8), KvQuant(bits=4)


@one_blas_thread()
def with_limits(prepared: PreparedDecoder) -> Recipe:
    """The recipe of a decoder that is not rounded yet, with what its limits come to.

    A limit of the file is a gate as well, unless there is one. A limit of memory becomes one of the file, within which
    bits are picked, and one of the cache. Both are priced on the model in float32: its cache is planned again once the
    weights are rounded.

    Raises:
        GateError: Not even the smallest weights and cache fit, or there is no plan of the cache.
    """
    recipe = prepared.recipe
    budget = recipe.budget
    if budget is None or budget.memory_mib is None or budget.context is None:
        limit = recipe.gates.max_file_mib or file_limit(prepared)
        return recipe.gated(Gates(max_file_mib=limit))
    ways = [way for way in _ways(prepared, budget, budget.context) if way.caches]
    if not ways:
        raise GateError(
            "there is no plan of the cache, of whatever size, to split the memory by",
            where="budget",
            fix="leave out its other limits, or limit the weights alone with weights.file_mib",
        )
    room = budget.memory_mib * MIB - open_bytes(prepared.spec.layers) - ways[0].picking.constants
    splits = [(found, way) for way in ways if (found := split(room, way.weights, way.caches)) is not None]
    if not splits:
        lack = min(least_room(way.weights, way.caches) for way in ways) - room
        raise GateError(
            f"weights and cache at {budget.context:,} tokens do not fit into {budget.memory_mib:g} MiB",
            where="budget.memory_mib",
            fix=f"ask for {budget.memory_mib + lack / MIB + 0.5:.0f} or more, or for a shorter context",
        )
    found, way = min(splits, key=lambda each: each[0].loss)
    return way.within(found)


class _Way(NamedTuple):
    """One way to code the cache.

    Attributes:
        recipe: What makes it, but for the shares of the memory.
        picking: What formats of the matrices are then picked from.
        weights: What the matrices take and lose then.
        caches: What the cache takes and loses; nothing where there is no plan of it.
    """

    recipe: Recipe
    picking: MatrixPicking
    weights: list[WeightsSize]
    caches: list[CacheSize]

    def within(self, found: Split) -> Recipe:
        """The recipe with the shares that were found."""
        recipe, picking = self.recipe, self.picking
        file_mib = (found.weights + picking.beside) / MIB
        update: dict[str, object] = {"weights": recipe.weights.model_copy(update={"file_mib": file_mib})}
        if recipe.budget is not None:
            shares = {"memory_mib": None, "kv_mib": found.cache / MIB}
            update["budget"] = recipe.budget.model_copy(update=shares)
        most = recipe.gates.max_file_mib or file_mib + picking.added / MIB  # set aside again: residuals widen encoders
        return recipe.model_copy(update=update).gated(Gates(max_file_mib=most))


def _ways(prepared: PreparedDecoder, budget: Budget, context: int) -> Iterator[_Way]:
    """Steps alone, which fold into no matrix, where nothing but memory is limited; and the planner's codes."""
    recipe, progress = prepared.recipe, prepared.progress
    stepped = [
        recipe.model_copy(update={"methods": (method,), "budget": None, "compensate": False}) for method in STEPS
    ]
    is_alone = budget == Budget(memory_mib=budget.memory_mib, context=budget.context)
    is_free = is_alone and recipe.heal is None and recipe.layout == "gqa"
    # Recipes of a kind change the same matrices. Steps change none: all are probed for them, in one stage.
    kinds = [stepped, [recipe]] if is_free else [[recipe]]
    pickings = [matrix_picking(prepared, kind[0]) for kind in kinds]
    progress.stage(stages.PROBE_CACHE)
    prepared.progress = WithinStage(progress)
    try:
        trials = prepared.trials()
        for kind, picking in zip(kinds, pickings, strict=True):
            weights = weights_sizes(picking.prices)
            for each in kind:
                yield _Way(each, picking, weights, _sizes(trials, each, context))
    finally:
        prepared.progress = progress
        vars(prepared).pop("statistics", None)  # those of the model with its weights rounded are others


def _sizes(trials: DecoderTrials, recipe: Recipe, context: int) -> list[CacheSize]:
    """What the caches of a recipe take and lose on the model in float32; nothing where the kernel cannot read them."""
    if recipe.budget is not None:
        return _planned_sizes(trials, recipe.budget)
    plan = decided_by(trials, recipe.methods)
    return [] if plan is None else [_size(trials, plan, trials.divergence(plan), context)]


def _planned_sizes(trials: DecoderTrials, budget: Budget) -> list[CacheSize]:
    """The same of the planner's caches of several sizes."""
    planner = planner_of(trials, budget.context, budget.time_ratio)
    check_time(planner)
    found = planner.frontier(trials.progress)
    return [_size(trials, planned.plan, planned.point.kl, planner.context) for planned in found]


def _size(trials: DecoderTrials, plan: Plan, loss: float, context: int) -> CacheSize:
    return CacheSize(KVLayout.of(trials.spec, plan).bytes_at(context), beside_bytes(trials.spec, plan), loss)
