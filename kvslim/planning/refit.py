"""Output projections fitted again, where held-out text gains by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvslim.caches import FullCache
from kvslim.transform.edits import Codes
from kvslim.types import Plan

if TYPE_CHECKING:
    from kvslim.prepared.trials import Trials

LEAST_GAIN = 0.03  # of the loss; less is the noise of a few windows of text


def refit_as_planned(plan: Plan, codes: Codes, refitted: Callable[[Codes], Codes]) -> Codes:
    """The codes, those of the layers that the plan marks with projections fitted to them."""
    if not any(layer.refit for layer in plan.layers):
        return codes
    again = refitted(codes)
    return tuple(new if layer.refit else old for layer, old, new in zip(plan.layers, codes, again, strict=True))


def refit_where_it_pays(trials: Trials, plan: Plan) -> tuple[Plan, float]:
    """The plan, with output projections marked to be fitted again if that lowers the loss, and the loss."""
    codes = trials.codes(plan)
    before = trials.loss(codes)
    if not before or _rounds_finely(plan, trials.spec.head_dim):
        return plan, before
    again = codes
    for done, again in enumerate(trials.refitting(codes), start=1):
        if done == len(codes) // 2 and trials.loss(again) > before:  # the other half would take as long
            return plan, before
    after = trials.loss(again)
    if after > (1 - LEAST_GAIN) * before:
        return plan, before
    reason = f"refitted, which takes {1 - after / before:.0%} of the {trials.loss_name}"
    layers = tuple(
        layer if new is old else layer.model_copy(update={"refit": True, "reason": f"{layer.reason}; {reason}"})
        for layer, old, new in zip(plan.layers, codes, again, strict=True)
    )
    return plan.model_copy(update={"layers": layers}), after


def _rounds_finely(plan: Plan, head_dim: int) -> bool:
    """Whether all that a plan does is to round whole caches to 8 bits.

    Such errors are small and random, and a refit, which takes minutes on a large model, takes nothing off them.
    """
    return all(
        layer.heads is None
        and layer.mlp
        and layer.mlp_width is None
        and isinstance(layer.cache, FullCache)
        and layer.cache.dtype != "int4"
        and layer.cache.ranks(head_dim) == (head_dim, head_dim)
        for layer in plan.layers
    )
