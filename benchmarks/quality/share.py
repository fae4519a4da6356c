"""Ways for a layer to read another's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.models import STEP, Codes, OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import BRIEF, FULL
from kvslim.methods import ShareKv
from kvslim.methods.share_kv import distances
from kvslim.types import Plan

Sources = dict[int, int]
TABLE = Table(
    (
        Column("layers", "layers that share"),
        Column("read", "keys and values"),
        Column("pairs", "pairs"),
        Column("bytes", "bytes per token", ",.0f"),
        Column("kl", "KL", ".2g"),
        Column("refit", "refit", ".2g"),
        Column("recall", "recall", ".0%"),
    )
)


@benchmark("demo", "books", table=TABLE, quick={"text": BRIEF, "counts": (1,)})
def share(source: Source, *, text: Mapping[str, Any] = FULL, counts: tuple[int, ...] = (1, 2)) -> Iterator[Values]:
    """KL of models of which some layers read another's cache, by how they read it.

    On 24 x 512 held-out tokens. Each way of reading chooses its own pairs by measured KL, among the same. "KL" is taken
    in torch; "refit" and recall, with output projections fitted again, through the exported graph and its cache. The
    last row of each count is `kv_pca` with all layers at the largest rank that takes no more bytes.
    """
    model = OpenModel(source, text)
    near = {pair: sum(found) for pair, found in distances(model.spec, model.statistics, model.identity).items()}
    for count in counts:
        for name in READERS:
            chosen = pairs_of(model, name, near, count)
            plan = ShareKv(sources=chosen).decide(model.spec, model.statistics, model.identity)
            words = ", ".join(f"{layer} reads {read}" for layer, read in chosen.items())
            yield {"layers": count, "read": name, "pairs": words, **costs(model, plan, reading(model, name, chosen))}
        plan = of_equal_bytes(model, count)
        name = f"`kv_pca`, rank {plan.layers[0].cache.ranks(model.spec.head_dim)[0]}"
        yield {"layers": count, "read": name, "pairs": None, **costs(model, plan, model.codes(plan))}


def pairs_of(model: OpenModel, name: str, near: Mapping[tuple[int, int], float], count: int) -> Sources:
    """The layers that share, and whose cache each reads, chosen by measured KL."""

    def kl(pairs: Sources) -> float:
        return model.held_out.kl(reading(model, name, pairs))

    return ShareKv(layers=count).named_by(dict(near), kl).sources or {}


def of_equal_bytes(model: OpenModel, count: int) -> Plan:
    """All layers at one rank that takes no more bytes."""
    share = 1 - count / model.spec.layers
    return model.decided({"kv_pca": {"rank": int(model.spec.head_dim * share) // STEP * STEP}})


def costs(model: OpenModel, plan: Plan, codes: Codes) -> Values:
    """Bytes, KL without and with refitted output projections, and recall with."""
    found = model.measured(plan, model.refitted(codes))
    return {"bytes": model.size(plan), "kl": model.kl(codes), "refit": found.kl, "recall": found.recall}


def reading(model: OpenModel, name: str, pairs: Sources) -> Codes:
    """The model with these layers reading those caches."""
    codes = model.without(ShareKv(sources=pairs))
    return tuple(code if code.source is None else READERS[name](model, layer, code) for layer, code in enumerate(codes))


def mapped(_: OpenModel, __: int, code: Any) -> Any:
    """As `share_kv` reads."""
    return code


def turned(model: OpenModel, layer: int, code: Any) -> Any:
    """Keys mapped by what commutes with RoPE, the least-squares complex number of each pair that it turns."""
    spec, samples, read = model.spec, model.statistics.key_samples, code.source
    encoder = np.zeros((spec.q_heads, spec.head_dim, spec.head_dim))
    for place, head in enumerate(code.heads.query):
        own = head // spec.group_size
        weights = model.statistics.received[layer, own]
        given = complex_pairs(samples[read, place // spec.group_size])
        cross = (weights[:, None] * complex_pairs(samples[layer, own]) * given.conj()).sum(0)
        factor = np.diag(cross / (weights[:, None] * np.abs(given) ** 2).sum(0))
        encoder[head] = np.block([[factor.real, -factor.imag], [factor.imag, factor.real]])
    return code.coded(query_encoder=encoder)


def copied(model: OpenModel, _: int, code: Any) -> Any:
    """Keys and values taken as they are, head by head."""
    heads, dim = model.spec.q_heads, model.spec.head_dim
    same, nothing = np.broadcast_to(np.eye(dim), (heads, dim, dim)), np.zeros((heads, dim))
    in_order = replace(code, heads=replace(code.heads, query=tuple(range(heads))))
    return in_order.coded(query_encoder=same, value_decoder=same, value_offset=nothing)


READERS: dict[str, Callable[[OpenModel, int, Any], Any]] = {
    "mapped": mapped,
    "keys turned pair by pair": turned,
    "copied": copied,
}


def complex_pairs(keys: np.ndarray) -> np.ndarray:
    """[n, head_dim] as the pairs that RoPE turns, [n, head_dim / 2]."""
    first, second = np.split(keys.astype(np.float64), 2, axis=-1)
    return np.asarray(first + 1j * second)
