"""`kv_window`: which layers it takes, why, and what a plan may say of rings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from support.gathering import attention, gather, states
from support.gathering import windows_of as texts_of
from support.models import open_prepared, recipe_of
from support.numbers_of_a_model import SPEC, statistics_of
from support.tiny_artifact import fill

from kvslim.caches import Cache, PackedCache, WindowCache
from kvslim.caches.attention.base import BLOCK, attended
from kvslim.checks import check_methods, check_plan
from kvslim.cli.inputs import read_plan
from kvslim.errors import UsageError
from kvslim.export.manifest import read_manifest
from kvslim.methods import KvPca, KvQuant, KvWindow
from kvslim.methods.fitting import fit
from kvslim.methods.kv_window import kept_attention
from kvslim.report.memory import artifact_caches, cache_memory
from kvslim.report.tables import caches_table, layers_table, plan_table
from kvslim.transform.scoring import Scoring
from kvslim.types import KVLayout, LayerPlan, Plan

FOUR = SPEC.model_copy(update={"layers": 4, "windows": (None,) * 4})


def windows_of(plan: Plan) -> list[int | None]:
    return [None if layer.cache.kept is None else layer.cache.kept[0] for layer in plan.layers]


def test_kept_attention_counts_sinks_and_ages_below_the_window() -> None:
    ages = np.broadcast_to([0.1, 0.2, 0.4], (SPEC.layers, SPEC.kv_heads, 3))  # of age 0, 1..2 and 3..6
    statistics = replace(statistics_of(SPEC), age_mass=ages, sink_mass=np.full((SPEC.layers, SPEC.kv_heads), 0.3))
    for window, expected in {1: 0.4, 2: 0.5, 3: 0.6, 5: 0.8, 7: 1.0, 99: 1.0}.items():
        np.testing.assert_allclose(kept_attention(statistics, window), expected)


def test_lazy_takes_the_layers_whose_worst_head_keeps_most() -> None:
    statistics = statistics_of(FOUR)
    kept = kept_attention(statistics, 8).min(1)
    plan = KvWindow(window=8, sinks=2, lazy=2).decide(FOUR, statistics, Plan.identity(FOUR))
    chosen = {layer.layer for layer in plan.layers if layer.cache.kept == (8, 2)}
    assert chosen == set(np.argsort(-kept)[:2].tolist())
    for layer in plan.layers:
        assert (f"{kept[layer.layer]:.1%}" in layer.reason) == (layer.layer in chosen)


@pytest.mark.parametrize(
    "scoring",
    [
        Scoring(0.5, recent=40, sinks=4),
        Scoring(0.5, window=40),
        Scoring(0.5, 90, None, 40, 2),
        Scoring(0.5, softcap=1.0),
        Scoring(0.5, 40, softcap=1.0),
    ],
)
def test_attention_by_blocks_is_that_under_one_mask(scoring: Scoring) -> None:
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 2 * BLOCK + 10, 8, generator=random) for heads in (4, 2, 2))
    key_of_all, value_of_all = (states.repeat_interleave(2, 1) for states in (key, value))

    found = attended(query, key, value, scoring)

    torch.testing.assert_close(found, (scoring.weights(query, key_of_all) @ value_of_all).transpose(1, 2))


def test_window_goes_to_the_layers_named_or_to_all() -> None:
    statistics, plan = statistics_of(FOUR), Plan.identity(FOUR)
    assert windows_of(KvWindow(window=8).decide(FOUR, statistics, plan)) == [8] * 4
    assert windows_of(KvWindow(window=8, layers=(1, 3)).decide(FOUR, statistics, plan)) == [None, 8, None, 8]


def test_layer_keeps_its_own_window_when_that_is_no_longer() -> None:
    spec = FOUR.model_copy(update={"windows": (None, 8, 9, None)})
    plan = KvWindow(window=8).decide(spec, statistics_of(FOUR), Plan.identity(spec))
    assert windows_of(plan) == [8, None, 8, 8]


def test_rank_window_and_bits_combine_in_one_layer() -> None:
    statistics, plan = statistics_of(SPEC), Plan.identity(SPEC)
    methods = sorted((KvQuant(), KvWindow(window=8), KvPca(rank=8)), key=lambda method: method.order)
    assert [method.name for method in methods] == ["kv_pca", "kv_window", "kv_quant"]
    for method in methods:
        plan = method.decide(SPEC, statistics, plan)
    layer, edit = plan.layers[0], fit(SPEC, statistics, plan, methods)[0]
    assert isinstance(layer.cache, WindowCache)
    assert (layer.cache.rank, layer.cache.window, layer.cache.sinks, layer.cache.dtype) == (8, 8, 4, "int8")
    assert isinstance(edit.cache, WindowCache)
    assert (edit.cache.window, edit.cache.sinks, edit.cache.dtype) == (8, 4, "int8")
    assert [word for word in ("rank 8", "recent", "int8") if word not in layer.reason] == []
    assert KVLayout.of(SPEC, plan).bytes_at(10_000) == SPEC.layers * 2 * SPEC.kv_heads * 8 * (8 + 4)
    table = plan_table(plan)
    assert table.header[3] == "sinks + window"
    assert table.rows[0][3] == "4 + 8"


@pytest.mark.parametrize("options", [{"layers": (2, SPEC.layers)}, {"lazy": SPEC.layers + 1}])
def test_check_names_the_option_when_the_model_has_fewer_layers(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"the model has {SPEC.layers} layers") as caught:
        KvWindow.model_validate(options).check(SPEC)
    assert next(iter(options)) in caught.value.where


@pytest.mark.parametrize("options", [{"window": 0}, {"sinks": -1}, {"lazy": 1, "layers": (0,)}])
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        KvWindow.model_validate(options)


def test_layout_attention24_refuses_rings() -> None:
    with pytest.raises(UsageError, match="attention24 has no ring"):
        check_methods(recipe_of([KvWindow()]).model_copy(update={"layout": "attention24"}))


@pytest.mark.parametrize(
    ("cache", "fault"),
    [
        (WindowCache(window=0), "a window of 0"),
        (WindowCache(window=8, sinks=-1), "-1 sinks"),
        (PackedCache(window=0, bits=2), "a window of 0"),
    ],
)
def test_plan_is_refused_when_a_ring_cannot_be(cache: Cache, fault: str) -> None:
    layers = (LayerPlan(layer=0, cache=cache), *(LayerPlan(layer=i) for i in range(1, SPEC.layers)))
    with pytest.raises(UsageError, match=fault):
        check_plan(Plan(layers=layers), SPEC)


@pytest.mark.parametrize(
    ("cache", "fault"),
    [
        ({"kind": "full", "sinks": 4}, "sinks: no such key"),
        ({"kind": "window", "sinks": 4}, "window: must be given"),
        ({"kind": "packed", "bits": 2}, "window: must be given"),
    ],
)
def test_plan_is_refused_when_sinks_or_codes_have_no_window(
    tmp_path: Path, cache: dict[str, object], fault: str
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"layers": [{"layer": 0, "cache": cache}]}))
    with pytest.raises(UsageError, match=fault):
        read_plan(plan)


def test_inspect_counts_sinks_window_and_codes(tmp_path: Path) -> None:
    fill(tmp_path)
    caches = PackedCache(rank=8, bits=2, window=16, sinks=4), WindowCache(window=16)
    layers = tuple(LayerPlan(layer=layer, cache=cache) for layer, cache in enumerate(caches))
    layout = KVLayout.of(SPEC, Plan(layers=layers))
    manifest = read_manifest(tmp_path).model_copy(update={"kv_layout": layout})
    memory = cache_memory(manifest.spec, artifact_caches(manifest), "fp32", 0, [10, 1000])
    packed, ring = memory.layers
    assert (packed.dtype, packed.key_dim, packed.window, packed.sinks) == ("codes2", 8, 16, 4)
    assert packed.bytes_per_token["as it is"] == 2 * SPEC.kv_heads * 8 // 4
    assert (ring.window, ring.sinks) == (16, 0)
    exact = 2 * SPEC.kv_heads * 4 * (8 * 20 + 16 * 16)
    assert memory.mib["10"]["as it is"] * 2**20 == exact
    assert memory.mib["1000"]["as it is"] * 2**20 == exact + 980 * 2 * SPEC.kv_heads * 8 // 4
    assert [row[4] for row in layers_table(memory).rows] == ["4 + 16", "16", ""]
    assert [row[0] for row in caches_table(memory).rows] == ["plain", "as it is"]


def test_ages_of_attention_are_those_of_a_direct_count(tiny_llama: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of())
    windows = texts_of(prepared, 3)
    statistics = gather(prepared, windows)
    weights = attention(states(prepared, windows, 1)).mean((0, 2))
    queries = np.arange(40)[40 // 8 :]
    for window in (1, 3, 7, 15, 31, 63):  # where buckets end
        near = queries[:, None] - np.arange(40) < window
        kept = (weights * (near | (np.arange(40) < 4))).sum(-1).mean(-1)
        np.testing.assert_allclose(kept_attention(statistics, window)[1], kept, atol=1e-6)
