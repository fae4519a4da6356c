"""Codes of streaming layers made by hand, for tests that look at the graph and the runtime alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvslim.caches import Cache, PackedCache, WindowCache
from kvslim.caches.packed import CODES
from kvslim.contract import BITS, CacheType
from kvslim.methods.levels import fit_levels
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.transform.edits import LayerEdit, Rounding
from kvslim.types import LayerPlan, Plan
from support.models import open_prepared, recipe_of

WINDOW, SINKS = 12, 3


def ring_cache(stored: CacheType, window: int = WINDOW, sinks: int = SINKS) -> Cache:
    """A ring that stores by `stored`, or keeps packed codes of what leaves it."""
    if stored in CODES.values():
        return PackedCache(bits=BITS[stored], window=window, sinks=sinks)
    return WindowCache(stored=stored, window=window, sinks=sinks)


def install_ring(
    model: Path, cache: CacheType, window: int = WINDOW, sinks: int = SINKS
) -> tuple[PreparedDecoder, Plan]:
    """A model whose layers all have a ring and store by `cache`, and its plan."""
    prepared = open_prepared(model, recipe_of())
    statistics, ring = prepared.statistics, ring_cache(cache, window, sinks)
    codes = tuple(
        LayerEdit(
            cache=ring,
            rounding=Rounding(
                **scales(cache, statistics.key_samples[layer], "key"),
                **scales(cache, statistics.value_samples[layer], "value"),
            ),
        )
        for layer in range(prepared.spec.layers)
    )
    prepared.install(codes)
    return prepared, Plan(layers=tuple(LayerPlan(layer=layer, cache=ring) for layer in range(prepared.spec.layers)))


def scales(cache: CacheType, samples: np.ndarray, side: str) -> dict[str, np.ndarray]:
    """Scale of each channel, and levels where the cache has them, of samples [heads, n, dim]."""
    if cache == "float32":
        return {}
    if cache not in CODES.values():
        return {f"{side}_scale": np.abs(samples).max(1) / (2 ** (BITS[cache] - 1) - 1)}
    spread = samples.std(1)
    unit = (samples / spread[:, None]).ravel()
    return {f"{side}_scale": spread, f"{side}_levels": fit_levels(unit, np.ones_like(unit), BITS[cache])}


def export_ring(model: Path, folder: Path, cache: CacheType, **ring: int) -> PreparedDecoder:
    """The same, written to a new folder."""
    prepared, plan = install_ring(model, cache, **ring)
    folder.mkdir()
    prepared.export(plan, folder)
    return prepared
