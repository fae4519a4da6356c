"""Layers with a state of what left their window, next to windows of the same bytes and of more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.models import Codes, OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import BRIEF
from kvslim.methods import KvWindow, LinearAttention, Method
from kvslim.methods.kv_window import kept_attention

LONG = 4096
TEXT = {
    "calibration": {"samples": 24, "length": 1024, "context": LONG},
    "validation": {"samples": 2, "length": LONG},
}
TABLE = Table(
    (
        Column("layers", "layers"),
        Column("cache", "cache"),
        Column("bytes", "KiB in these layers", ",.0f"),
        Column("kl", "KL", ".3g"),
    )
)


@benchmark("smollm2", table=TABLE, quick={"text": BRIEF, "count": 1, "window": 8, "features": 4})
def linear_attention(
    source: Source,
    *,
    text: Mapping[str, Any] = TEXT,
    count: int = 3,
    window: int = 64,
    features: int = 64,
) -> Iterator[Values]:
    """A window, the same with a state of what left it, before and after training, and windows of more bytes.

    In the layers whose attention is nearest, and farthest: by the least share that any head of them gives to the sinks
    and the window. KL is in torch, on two texts of 4,096 tokens of another kind than the calibration text; output
    projections are not fitted again.
    """
    model = OpenModel(source, text)
    near = kept_attention(model.statistics, window).min(axis=1)
    order = sorted(range(model.spec.layers), key=lambda layer: -near[layer])
    state = LinearAttention(window=window, features=features)
    wider = window + round(features * (model.spec.head_dim + 1) / (2 * model.spec.head_dim))
    trained = _codes(model, state.model_copy(update={"layers": (*order[:count], *order[-count:])}))
    for name, layers in {"nearest": sorted(order[:count]), "farthest": sorted(order[-count:])}.items():
        told = f"{name} attention: {', '.join(map(str, layers))}"
        for cache, method in {
            f"window {window}": KvWindow(window=window),
            f"window {window} and a state, untrained": state,
            f"window {window} and a state, trained": state,
            f"window {wider}": KvWindow(window=wider),
            f"window {4 * window}": KvWindow(window=4 * window),
        }.items():
            here = method.model_copy(update={"layers": tuple(layers)})
            codes = model.without(here)
            if cache.endswith(", trained"):
                codes = tuple(trained[each] if each in layers else code for each, code in enumerate(codes))
            yield {"layers": told, "cache": cache, "bytes": _kib(model, here, count), "kl": model.kl(codes)}


def _codes(model: OpenModel, method: Method) -> Codes:
    """What a method puts into the model, trained."""
    return model.codes(model.decided({method.name: method.model_dump()}))


def _kib(model: OpenModel, method: Method, count: int) -> float:
    """KiB of the caches of `count` layers that a method changes, at the target context."""
    others = model.size(model.identity) * (1 - count / model.spec.layers)
    return (model.size(model.decided({method.name: method.model_dump()})) - others) * model.context / 1024
