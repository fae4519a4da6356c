"""Limits of the weights: a file's size as a gate, and a budget of memory as shares for weights and cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvslim import stages
from kvslim.contract import MIB
from kvslim.devices.peak import open_bytes
from kvslim.errors import GateError
from kvslim.planning.budget import planner_of
from kvslim.planning.choose import check_time
from kvslim.planning.split import CacheSize, beside_bytes, least_room, split
from kvslim.prepared.weights import file_limit, matrix_picking
from kvslim.progress import WithinStage
from kvslim.recipe import Recipe
from kvslim.settings import Budget, Gates

if TYPE_CHECKING:
    from kvslim.prepared.decoder import PreparedDecoder


def with_limits(prepared: PreparedDecoder) -> Recipe:
    """The recipe of a decoder that is not rounded yet, with what its limits come to.

    A limit of the file is a gate as well, unless there is one. A limit of memory becomes one of the file, within which
    bits are picked, and one of the cache. Both are priced on the model in float32: its cache is planned again once the
    weights are rounded.

    Raises:
        GateError: Not even the smallest weights and cache fit.
    """
    recipe = prepared.recipe
    budget = recipe.budget
    if budget is None or budget.memory_mib is None or budget.context is None:
        limit = recipe.gates.max_file_mib or file_limit(prepared)
        return recipe.gated(Gates(max_file_mib=limit))
    picking, sizes = matrix_picking(prepared), _cache_sizes(prepared, budget)
    room = budget.memory_mib * MIB - open_bytes(prepared.spec.layers) - picking.constants
    found = split(room, picking.prices, sizes)
    if found is None:
        lack = least_room(picking.prices, sizes) - room
        raise GateError(
            f"weights and cache at {budget.context:,} tokens do not fit into {budget.memory_mib:g} MiB",
            where="budget.memory_mib",
            fix=f"ask for {budget.memory_mib + lack / MIB + 0.5:.0f} or more, or for a shorter context",
        )
    file_mib = (found.weights + picking.beside) / MIB
    weights = recipe.weights.model_copy(update={"file_mib": file_mib})
    shares = budget.model_copy(update={"memory_mib": None, "kv_mib": found.cache / MIB})
    most = recipe.gates.max_file_mib or file_mib + picking.added / MIB  # codes with residuals may be twice as large
    return recipe.model_copy(update={"weights": weights, "budget": shares}).gated(Gates(max_file_mib=most))


def _cache_sizes(prepared: PreparedDecoder, budget: Budget) -> list[CacheSize]:
    """What caches of several sizes take and lose on the model in float32."""
    progress = prepared.progress
    progress.stage(stages.PROBE_CACHE)
    prepared.progress = WithinStage(progress)
    try:
        planner = planner_of(prepared.trials(), budget.context, budget.time_ratio)
        check_time(planner)
        found = planner.frontier(prepared.progress)
    finally:
        prepared.progress = progress
        vars(prepared).pop("statistics", None)  # those of the model with its weights rounded are others
    return [
        CacheSize(
            planned.point.kv_bytes_per_token * planner.context,
            beside_bytes(prepared.spec, planned.plan),
            planned.point.kl,
        )
        for planned in found
    ]
