"""Layers that read an earlier layer's cache: maps that hold at every position, pairs, and their graphs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from support.batches import check_batch
from support.gathering import gather, windows_of
from support.models import cached_logits, exported, open_prepared, original_logits, recipe_of, tokens_of, torch_logits
from support.numbers_of_a_model import SPEC, statistics_of
from support.trials import MadeUpTrials, refitted

from kvslim import pipeline
from kvslim.caches import FullCache, SharedCache, WindowCache
from kvslim.calibrate.rope import rotate
from kvslim.checks import check_methods, check_plan
from kvslim.cli.inputs import read_plan
from kvslim.errors import UsageError
from kvslim.methods import KvHdc, KvPca, KvQuant, KvWindow, Method, PruneHeads, PruneLayers, ShareKv
from kvslim.methods.fitting import fit
from kvslim.methods.share_kv import Distance, distances
from kvslim.methods.sharing import fit_maps
from kvslim.planning.decide import decide
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.runtime.opening import layout_of, open_session
from kvslim.transform.kl_evaluator import KLEvaluator
from kvslim.transform.surgery import trial
from kvslim.types import KVLayout, LayerPlan, Plan

ModelOf = Callable[[str], Path]
DEEP = SPEC.model_copy(update={"layers": 6, "windows": (None,) * 6})


def sharing_plan(**first: object) -> Plan:
    return Plan(
        layers=(LayerPlan.model_validate({"layer": 0, **first}), LayerPlan(layer=1, cache=SharedCache(source=0)))
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_graph_that_shares_equals_torch_in_prefill_and_cached_decode(
    tiny_model: ModelOf, tmp_path: Path, family: str
) -> None:
    recipe = recipe_of().model_copy(update={"window_cache": False})
    prepared = open_prepared(tiny_model(family), recipe)
    plan = sharing_plan().model_copy(update={"window_cache": False})
    tokens = tokens_of(prepared)
    slim = exported(prepared, plan, tmp_path / "slim")
    assert np.abs(slim - original_logits(tiny_model(family), tokens)).max() > 1e-3
    assert np.abs(cached_logits(tmp_path / "slim", tokens) - slim).max() < 1e-4
    assert {tensor.layer for tensor in KVLayout.of(prepared.spec, plan).tensors} == {0}
    check_batch(tmp_path / "slim")


@pytest.mark.parametrize(
    ("family", "first"),
    [
        ("gpt2", {"cache": FullCache(rank=8, stored="int8")}),
        ("smollm3", {"cache": FullCache(rank=16, stored="int8", granularity="per_tensor", rotation=0)}),
        ("qwen3", {"cache": FullCache(rank=16, residual=8, rotation=0, stored="int4", centred=True)}),
        ("llama", {"heads": (0, 1), "cache": FullCache(rank=8)}),
    ],
    ids=["int8", "one step", "int4", "fewer heads"],
)
def test_codes_of_the_source_are_read(
    tiny_model: ModelOf, tmp_path: Path, family: str, first: dict[str, object]
) -> None:
    prepared = open_prepared(tiny_model(family), recipe_of())
    tokens = tokens_of(prepared)
    slim = exported(prepared, sharing_plan(**first), tmp_path / "slim")
    effect = np.abs(slim - original_logits(tiny_model(family), tokens)).max()
    assert effect > 1e-3
    assert np.abs(cached_logits(tmp_path / "slim", tokens) - slim).max() < max(1e-4, 0.1 * effect)


def test_standard_operators_share_too(tiny_model: ModelOf, tmp_path: Path) -> None:
    prepared = open_prepared(tiny_model("llama"), recipe_of().model_copy(update={"layout": "attention24"}))
    plan = sharing_plan(cache=FullCache(rank=8, value_rank=16)).model_copy(update={"layout": "attention24"})
    check_plan(plan, prepared.spec)
    prepared.install(prepared.codes(plan))
    (tmp_path / "slim").mkdir()
    prepared.export(plan, tmp_path / "slim")
    slim = torch_logits(prepared, tokens_of(prepared))
    assert np.abs(cached_logits(tmp_path / "slim", tokens_of(prepared)) - slim).max() < 1e-4


def test_layer_reproduces_itself_when_its_keys_and_values_are_linear_in_those_of_the_source(
    tiny_model: ModelOf,
) -> None:
    """Layer 0 adds nothing, so layer 1 sees what it saw; its heads are those of layer 0, mixed and in another order."""
    import torch

    prepared = open_prepared(tiny_model("gpt2"), recipe_of())
    first, second = prepared.model.transformer.h
    mixing = torch.eye(16).roll(3, 1) * torch.linspace(0.5, 2, 16)
    with torch.no_grad():
        for part in (first.attn.c_proj, first.mlp.c_proj):
            part.weight.zero_()
        for side in (slice(64, 128), slice(128, 192)):
            heads = first.attn.c_attn.weight[side].unflatten(0, (4, 16))[[2, 0, 3, 1]]
            second.attn.c_attn.weight[side] = torch.einsum("hdi,de->hei", heads, mixing).flatten(0, 1)
    tokens = tokens_of(prepared)
    before = torch_logits(prepared, tokens)
    statistics = gather(prepared, windows_of(prepared, 20))
    prepared.install(fit(prepared.spec, statistics, sharing_plan()))
    assert np.abs(torch_logits(prepared, tokens) - before).max() < 0.01 * np.abs(before).max()


def test_key_map_is_the_least_squares_one_of_the_whole_context_when_calibrated_on_a_short_text() -> None:
    """A map that does not commute with RoPE: 600 tokens at 64 positions, read at 4,096."""
    spec = SPEC.model_copy(update={"layers": 2, "q_heads": 1, "kv_heads": 1, "windows": (None,) * 2})
    rng, dim = np.random.default_rng(0), spec.head_dim
    frequencies = 100.0 ** (-2 * np.arange(dim // 2) / dim)
    given = rng.standard_normal((600, dim)) @ rng.standard_normal((dim, dim)) + 1
    own = given @ rng.standard_normal((dim, dim)) + rng.standard_normal((600, dim))
    positions = rng.integers(0, 64, 600)
    calibrated = replace(
        statistics_of(spec),
        key_samples=np.stack([rotate(keys, positions, frequencies)[None] for keys in (given, own)]),
        value_samples=np.stack([given[None], own[None]]),
        received=np.full((2, 1, 600), 1 / 600),
        sink_mass=np.zeros((2, 1)),
        positions=positions,
        frequencies=np.stack([frequencies] * 2),
        context=np.array(4096),
    )
    far = rng.permutation(4096)[:400, None]
    read, wanted = (
        rotate(np.broadcast_to(keys, (400, 600, dim)), far, frequencies).reshape(-1, dim) for keys in (given, own)
    )

    def missing(found: np.ndarray) -> float:
        error = wanted - read @ found
        metric = calibrated.query_moment[1, 0]
        return float(np.trace(np.cov(error.T) @ metric) / np.trace(np.cov(wanted.T) @ metric))

    maps = fit_maps(calibrated, 1, 0, (0,))
    best, *_ = np.linalg.lstsq(read - read.mean(0), wanted - wanted.mean(0))
    assert missing(maps.key[0, 0]) == pytest.approx(missing(best), rel=0.02)
    assert maps.key_error[0, 0] == pytest.approx(missing(best), rel=0.02)
    short = fit_maps(replace(calibrated, context=np.array(64)), 1, 0, (0,))
    assert missing(short.key[0, 0]) > 1.1 * missing(best)


def test_pairs_are_chosen_one_by_one_by_measured_kl_and_make_no_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    near = {(layer, layer - 1): Distance(0.1 * layer, 0.0) for layer in range(1, 6)}
    monkeypatch.setattr("kvslim.methods.share_kv.distances", lambda *_: near)
    asked: list[dict[int, int]] = []

    def divergence(method: ShareKv) -> float:
        sources = method.sources or {}
        asked.append(sources)
        return sum({1: 5.0, 2: 4.0, 3: 1.0, 4: 2.0, 5: 3.0}[layer] for layer in sources)

    assert ShareKv(layers=2).resolve(MadeUpTrials(DEEP, divergence)).sources == {3: 2, 5: 4}
    assert asked[:5] == [{1: 0}, {2: 1}, {3: 2}, {4: 3}, {5: 4}]
    assert asked[5:] == [{3: 2, 1: 0}, {3: 2, 5: 4}]


def test_distances_leave_out_sources_that_keep_a_window() -> None:
    spec = DEEP.model_copy(update={"windows": (None, 16, None, 16, None, None)})
    found = distances(spec, statistics_of(spec), Plan.identity(spec))
    assert {source for _, source in found} == {0, 2, 4}
    assert all(0 <= part <= 1 for distance in found.values() for part in distance)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({}, "not what to share"),
        ({"layers": 4}, "too many"),
        ({"sources": {6: 5}}, "not a layer 6"),
        ({"sources": {1: -1}}, "not a layer -1"),
        ({"sources": {2: 3}}, "no earlier"),
        ({"sources": {2: 2}}, "no earlier"),
        ({"sources": {2: 1, 3: 2}}, "reads that of layer 1 itself"),
    ],
)
def test_pairs_that_cannot_be_are_refused(options: dict[str, object], fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        ShareKv.model_validate(options).check(DEEP)


@pytest.mark.parametrize("options", [{"layers": 1, "sources": {1: 0}}, {"layers": 0}])
def test_options_that_contradict_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ShareKv.model_validate(options)


@pytest.mark.parametrize(
    ("methods", "fault"),
    [
        ((ShareKv(layers=1), PruneLayers(attention=1)), "cannot count on"),
        ((ShareKv(layers=1), PruneHeads(groups=1)), "cannot count on"),
        ((ShareKv(layers=1), KvWindow(layers=(1,))), "same layers"),
        ((ShareKv(sources={2: 1}), KvWindow()), "same layers"),
        ((ShareKv(sources={2: 1}), KvWindow(layers=(1,))), "layer 1 cannot have a window"),
        ((ShareKv(sources={2: 1}), KvHdc(bits=2)), "packed codes"),
    ],
)
def test_methods_that_conflict_are_refused_before_any_work(methods: tuple[Method, ...], fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        check_methods(recipe_of(methods))


def test_named_layers_go_with_windows_and_removed_attention_elsewhere() -> None:
    check_methods(recipe_of([ShareKv(sources={2: 1}), KvWindow(layers=(3,)), PruneLayers(layers={4: "attention"})]))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({2: {"cache": SharedCache(source=4)}}, "no earlier"),
        ({2: {"cache": SharedCache(source=9)}}, "not a layer 9"),
        ({2: {"cache": SharedCache(source=1)}, 3: {"cache": SharedCache(source=2)}}, "reads that of layer 1 itself"),
        ({2: {"cache": SharedCache(source=1)}, 1: {"heads": ()}}, "layer 1 has no attention"),
        ({2: {"cache": SharedCache(source=1), "heads": ()}}, "layer 2 has no attention"),
        ({2: {"cache": SharedCache(source=1)}, 1: {"cache": WindowCache(window=8, sinks=2)}}, "keeps a window"),
        ({2: {"cache": SharedCache(source=1), "heads": (0,)}}, "cannot read 2 kv heads alike"),
    ],
)
def test_plan_with_an_impossible_source_is_refused(changes: dict[int, dict[str, object]], fault: str) -> None:
    layers = tuple(LayerPlan.model_validate({"layer": layer, **changes.get(layer, {})}) for layer in range(6))
    with pytest.raises(UsageError, match=fault):
        check_plan(Plan(layers=layers), DEEP)


def test_plan_of_a_layer_that_shares_and_stores_is_refused(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    layers = [{"layer": 0}, {"layer": 1, "cache": {"kind": "shared", "source": 0, "rank": 8}}]
    plan.write_text(json.dumps({"layers": layers}))
    with pytest.raises(UsageError, match="rank: no such key"):
        read_plan(plan)


def test_recipe_that_drops_a_named_source_is_refused() -> None:
    recipe = recipe_of([PruneLayers(layers={1: "attention"}), ShareKv(sources={2: 1})])
    with pytest.raises(UsageError, match="layer 1 has no attention"):
        decide(recipe, DEEP, statistics_of(DEEP))


def test_compress_measures_pairs_and_keeps_its_plan(tiny_model: ModelOf, tmp_path: Path) -> None:
    model, recipe = str(tiny_model("llama")), recipe_of([ShareKv(layers=1), KvPca(rank=8), KvQuant()])
    summary = pipeline.plan(model, recipe)
    plan = Plan.model_validate_json(summary.plan.model_dump_json())
    first, second = plan.layers
    assert isinstance(first.cache, FullCache)
    assert (first.source, first.cache.rank, first.cache.dtype) == (None, 8, "int8")
    assert second.cache == SharedCache(source=0)
    manifest = pipeline.compress(model, recipe, tmp_path / "out", plan=plan)
    assert manifest.plan == plan
    assert manifest.report is not None
    assert manifest.report.artifact.kv_bytes_per_token == summary.kv_bytes_per_token == 2 * 2 * 8
    assert layout_of(open_session(tmp_path / "out")) == manifest.kv_layout


@pytest.fixture(scope="module")
def demo() -> PreparedDecoder:
    return open_prepared("demo", recipe_of())


def test_evaluator_runs_the_source_that_lies_before_the_first_changed_layer(demo: PreparedDecoder) -> None:
    import torch

    windows = demo.statistics.windows
    codes = demo.trials().codes_of(ShareKv(sources={5: 3}))
    evaluator = KLEvaluator(demo.model, demo.architecture, windows)
    ids = torch.from_numpy(windows)
    with torch.inference_mode():
        plain = demo.model(ids).logits.log_softmax(-1)
        with trial(demo.model, demo.architecture, codes):
            shared = demo.model(ids).logits.log_softmax(-1)
        assert torch.equal(demo.model(ids).logits.log_softmax(-1), plain)
    assert evaluator.kl(codes) == pytest.approx(float((plain.exp() * (plain - shared)).sum(-1).mean()), rel=1e-3)


def test_refit_lowers_the_kl_of_shared_layers(demo: PreparedDecoder) -> None:
    statistics = demo.statistics
    windows = statistics.windows
    codes = demo.trials().codes_of(ShareKv(sources={3: 2, 5: 4}))
    evaluator = KLEvaluator(demo.model, demo.architecture, windows)
    assert 0 < evaluator.kl(refitted(demo, codes, windows)) < 0.95 * evaluator.kl(codes)
