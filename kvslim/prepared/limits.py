"""Limits of the weights: a file's size as a gate, and a budget of memory as shares for weights and cache."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kvslim import stages
from kvslim.contract import MIB
from kvslim.devices.peak import RUNTIME_BYTES
from kvslim.errors import GateError
from kvslim.planning.budget import planner_of
from kvslim.planning.choose import check_time
from kvslim.planning.split import split
from kvslim.prepared.weights import MatrixPicking, file_limit, matrix_picking
from kvslim.progress import WithinStage
from kvslim.recipe import Recipe
from kvslim.settings import Budget, Gates
from kvslim.types import PlanPoint

if TYPE_CHECKING:
    from kvslim.prepared.decoder import PreparedDecoder


def with_limits(prepared: PreparedDecoder) -> Recipe:
    """The recipe of a decoder that is not rounded yet, with what its limits come to.

    A limit of the file is a gate as well, unless there is one. A limit of memory becomes one of the file and one of the
    cache. Both are priced on the model in float32: its cache is planned again once the weights are rounded.

    Raises:
        GateError: Not even the smallest weights and cache fit.
    """
    recipe = prepared.recipe
    budget = recipe.budget
    if budget is None or budget.memory_mib is None or budget.context is None:
        limit = recipe.gates.max_file_mib or file_limit(prepared)
        return recipe.gated(Gates(max_file_mib=limit))
    picking = matrix_picking(prepared)
    frontier = _frontier(prepared, budget)
    room = budget.memory_mib * MIB - RUNTIME_BYTES - picking.others
    found = split(room, picking.least, lambda size: _loss(picking, size), frontier, budget.context)
    if found is None:
        smallest = min((point.kv_bytes_per_token for point in frontier), default=0.0)
        lack = smallest * budget.context + picking.least - room
        raise GateError(
            f"weights and cache at {budget.context:,} tokens do not fit into {budget.memory_mib:g} MiB",
            where="budget.memory_mib",
            fix=f"ask for {budget.memory_mib + lack / MIB + 0.5:.0f} or more, or for a shorter context",
        )
    file_mib = (found.weights + picking.others) / MIB
    weights = recipe.weights.model_copy(update={"file_mib": file_mib})
    shares = budget.model_copy(update={"memory_mib": None, "kv_mib": found.cache / MIB})
    return recipe.model_copy(update={"weights": weights, "budget": shares}).gated(Gates(max_file_mib=file_mib))


def _frontier(prepared: PreparedDecoder, budget: Budget) -> list[PlanPoint]:
    """What caches of several sizes lose on the model in float32."""
    progress = prepared.progress
    progress.stage(stages.PROBE_CACHE)
    prepared.progress = WithinStage(progress)
    try:
        planner = planner_of(prepared.trials(), budget.context, budget.time_ratio)
        check_time(planner)
        return [planned.point for planned in planner.frontier(prepared.progress)]
    finally:
        prepared.progress = progress
        vars(prepared).pop("statistics", None)  # those of the model with its weights rounded are others


def _loss(picking: MatrixPicking, size: float) -> float:
    """What the matrices are expected to lose within so many bytes."""
    found = picking.within(size)
    return math.inf if found is None else found[1]
