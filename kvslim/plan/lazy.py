"""Which layers can do with a window: those that lose least by it alone, measured, and no recall."""

from __future__ import annotations

from collections.abc import Callable

from kvslim.caches import WindowCache
from kvslim.contract import ModelSpec
from kvslim.errors import GateError
from kvslim.methods.kv_window import KvWindow
from kvslim.progress import Progress
from kvslim.transform.edits import LayerEdit

MOST_RECALL = 0.01  # share of recall that a window in one layer may cost


def laziest(
    method: KvWindow,
    spec: ModelSpec,
    divergence: Callable[[tuple[LayerEdit, ...]], float],
    recall_drop: Callable[[tuple[LayerEdit, ...]], float],
    progress: Progress,
) -> KvWindow:
    """The method with its number of lazy layers turned into those layers.

    Perplexity and KL on plain text hide what a window forgets, so a layer that retrieval needs is out however little
    else it loses.

    Args:
        method: Asks for a number of lazy layers.
        spec: The model's shape.
        divergence: Of the model with the codes given, on text longer than the window.
        recall_drop: Recall that it loses, over distances longer than the window.
        progress: Hears which layer is tried.

    Raises:
        GateError: Fewer layers keep the recall.
    """
    losses: dict[int, float] = {}
    for layer in progress.track(method.able(spec), "layers tried with a window"):
        codes = tuple(
            LayerEdit(cache=WindowCache(window=method.window, sinks=method.sinks)) if index == layer else LayerEdit()
            for index in range(spec.layers)
        )
        if recall_drop(codes) <= MOST_RECALL:
            losses[layer] = divergence(codes)
    count = method.lazy or 0
    if len(losses) < count:
        raise GateError(
            f"only {len(losses)} layers keep recall with a window of {method.window} tokens",
            where="recipe: methods.kv_window.lazy",
            fix=f"ask for {len(losses)} lazy layers, or a longer window" if losses else "use a longer window",
        )
    chosen = sorted(sorted(losses, key=losses.__getitem__)[:count])
    return method.model_copy(update={"lazy": None, "layers": tuple(chosen)})
