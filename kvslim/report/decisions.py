"""A plan in words that a user knows: what all layers share is said once, and a table has only what differs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvslim.caches import ClusteredCache, CodedCache, LinearCache, PackedCache
from kvslim.contract import ModelSpec
from kvslim.report.tables import NONE, Table, ranges
from kvslim.types import LayerPlan, Plan

STORED = {"float32": "32-bit floats", "int8": "8-bit integers", "int4": "4-bit integers"}
USUAL = {"dimensions stored finer": "none", "feed-forward part": "kept", "output projection": "as it was"}


class Decisions(NamedTuple):
    """What happens to the layers of a model.

    Attributes:
        shared: What all layers have in common.
        differing: What differs, with layers that are alike in one row; no rows where nothing differs.
    """

    shared: str
    differing: Table


def decisions(spec: ModelSpec, plan: Plan) -> Decisions:
    """A decoder's plan."""
    facts = [_facts(spec, layer) for layer in plan.layers]
    titles = list(facts[0])
    kept = {title: list(dict.fromkeys(fact[title] for fact in facts if fact[title] != NONE)) for title in titles}
    common = {title: values[0] for title, values in kept.items() if len(values) == 1}
    said = [f"{title}: {value}" for title, value in common.items() if value != USUAL.get(title)]
    differing = [title for title, values in kept.items() if len(values) > 1]
    rows: dict[tuple[str, ...], list[int]] = {}
    for layer, fact in zip(plan.layers, facts, strict=True):
        rows.setdefault(tuple(fact[title] for title in differing), []).append(layer.layer)
    table = tuple((ranges(layers), *cells) for cells, layers in rows.items()) if differing else ()
    count = "In all layers" if len(facts) > 1 else "In the one layer"
    return Decisions(f"{count}, {'; '.join(said)}." if said else "", Table(("layers", *differing), table, words=True))


def _facts(spec: ModelSpec, layer: LayerPlan) -> dict[str, str]:
    """What is decided of a layer, by what a table calls it."""
    heads = "all" if layer.heads is None else f"{len(layer.heads)} of {spec.q_heads}"
    own = _of_cache(spec, layer) if layer.has_cache else (NONE, NONE, NONE)
    return {
        "cache": _stored(layer),
        "dimensions per head": own[0],
        "dimensions stored finer": own[1],
        "tokens kept": own[2],
        "query heads": heads if layer.heads != () else "none",
        "feed-forward part": _mlp(layer),
        "output projection": "fitted again" if layer.refit else "as it was",
    }


def _mlp(layer: LayerPlan) -> str:
    if not layer.mlp:
        return "removed"
    return "kept" if layer.mlp_width is None else f"{layer.mlp_width:,} channels"


def _stored(layer: LayerPlan) -> str:
    if layer.heads == ():
        return "none, attention is removed"
    if layer.source is not None:
        return f"that of layer {layer.source}"
    return STORED.get(layer.cache.dtype, f"{layer.cache.dtype.removeprefix('codes')}-bit codes")


def _of_cache(spec: ModelSpec, layer: LayerPlan) -> tuple[str, str, str]:
    """Dimensions of keys and values, how many of them are stored in two parts, and the tokens that stay."""
    cache, whole = layer.cache, spec.head_dim
    if isinstance(cache, ClusteredCache):
        return f"all {whole}; keys of {cache.attending} of {spec.q_heads} heads", "none", "all"
    if isinstance(cache, LinearCache):
        kept = f"the first {cache.sinks} and the last {cache.window} exact"
        return f"all {whole}", "none", f"{kept}, all others in a state of {cache.features} features"
    if not isinstance(cache, CodedCache):
        return f"all {whole}", "none", "all"
    dims = f"all {whole}" if set(cache.ranks(whole)) == {whole} else f"{_sides(cache.ranks(whole))} of {whole}"
    finer = _sides(cache.residuals) if any(cache.residuals) else "none"
    return dims, finer, _tokens(cache, spec.windows[layer.layer])


def _sides(pair: Iterable[int]) -> str:
    key, value = pair
    return str(key) if key == value else f"keys {key}, values {value}"


def _tokens(cache: CodedCache, window: int | None) -> str:
    if cache.kept is None:
        return "all" if window is None else f"the last {window}"
    recent, sinks = cache.kept
    kept = f"the first {sinks} and the last {recent}" if sinks else f"the last {recent}"
    return f"all, {kept} exact" if isinstance(cache, PackedCache) else kept
