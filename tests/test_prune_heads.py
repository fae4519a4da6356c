"""Heads that go: legal groups, the mean in their place, and graphs without their cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from support.gathering import gather, windows_of
from support.models import cached_logits, exported, open_prepared, original_logits, recipe_of, tokens_of, torch_logits
from support.numbers_of_a_model import SPEC, statistics_of
from support.tiny_decoders import FAMILIES
from support.trials import MadeUpTrials, refitted

from kvslim import pipeline
from kvslim.caches import FullCache, WindowCache
from kvslim.checks import check_plan
from kvslim.contract import ModelSpec
from kvslim.errors import UsageError
from kvslim.methods import KvHdc, KvPca, KvQuant, KvWindow, Method, PruneHeads
from kvslim.methods.fitting import fit
from kvslim.runtime.opening import layout_of, open_session
from kvslim.transform.kl_evaluator import KLEvaluator
from kvslim.types import KVLayout, LayerPlan, Plan

GROUPED = SPEC.model_copy(update={"layers": 3, "q_heads": 6, "kv_heads": 2, "windows": (None,) * 3})
ModelOf = Callable[[str], Path]


def partial_plan(spec: ModelSpec, first: tuple[int, ...], second: tuple[int, ...], **layer: object) -> Plan:
    entries = [{"layer": 0, "heads": first, **layer}, {"layer": 1, "heads": second, **layer}]
    return Plan(layers=tuple(LayerPlan.model_validate(entry) for entry in entries))


# Projections apart and in one, in both orders; with biases; with norms and windows.
DIFFERENT = ("llama", "phi3", "gpt2", "gpt_neox", "opt", "gemma3_text")
OTHERS = [family for family in FAMILIES if "-" not in family and family not in DIFFERENT]


@pytest.mark.parametrize(
    "family", [*DIFFERENT, *(pytest.param(family, marks=pytest.mark.thorough) for family in OTHERS)]
)
def test_graph_without_heads_equals_torch_in_prefill_and_cached_decode(
    tiny_model: ModelOf, tmp_path: Path, family: str
) -> None:
    """The last kv head of the first layer stays with one reader; the second layer has no attention."""
    prepared = open_prepared(tiny_model(family), recipe_of())
    last = (prepared.spec.q_heads - 1,)
    plan = partial_plan(prepared.spec, last, ())
    tokens = tokens_of(prepared)
    slim = exported(prepared, plan, tmp_path / "slim")
    assert np.abs(slim - original_logits(tiny_model(family), tokens)).max() > 1e-3
    assert np.abs(cached_logits(tmp_path / "slim", tokens) - slim).max() < 1e-4
    (tensor, _) = KVLayout.of(prepared.spec, plan).tensors
    assert (tensor.heads, tensor.past) == (1, "past_key_values.0.key")


@pytest.mark.parametrize("family", ["llama", "gpt2", pytest.param("qwen3", marks=pytest.mark.thorough)])
@pytest.mark.parametrize(
    "cache",
    [
        FullCache(rank=8, stored="int8"),
        FullCache(rank=16, residual=8, rotation=0, stored="int4", centred=True),
        WindowCache(rank=8, window=12, sinks=3),
    ],
    ids=["int8", "int4", "window"],
)
def test_heads_go_along_with_codes(
    tiny_model: ModelOf, tmp_path: Path, family: str, cache: FullCache | WindowCache
) -> None:
    prepared = open_prepared(tiny_model(family), recipe_of())
    plan = partial_plan(prepared.spec, (0, 1), (0, 1, 2, 3), cache=cache)
    tokens = tokens_of(prepared)
    slim = exported(prepared, plan, tmp_path / "slim")
    effect = np.abs(slim - original_logits(tiny_model(family), tokens)).max()
    assert effect > 1e-3
    assert np.abs(cached_logits(tmp_path / "slim", tokens) - slim).max() < max(1e-4, 0.1 * effect * cache.is_integer)


def test_first_layer_without_attention_leaves_the_second_one_its_number(tiny_model: ModelOf, tmp_path: Path) -> None:
    prepared = open_prepared(tiny_model("llama"), recipe_of())
    slim = exported(prepared, partial_plan(prepared.spec, (), (0, 1, 2, 3)), tmp_path / "slim")
    assert {tensor.layer for tensor in layout_of(open_session(tmp_path / "slim")).tensors} == {1}
    assert np.abs(cached_logits(tmp_path / "slim", tokens_of(prepared)) - slim).max() < 1e-4


def test_kept_heads_reproduce_the_model_when_the_others_say_the_same_for_every_token(tiny_model: ModelOf) -> None:
    """Heads whose values are constant lose nothing when their mean takes their place."""
    import torch

    prepared = open_prepared(tiny_model("qwen2"), recipe_of())
    attention = prepared.model.model.layers[1].self_attn
    with torch.no_grad():
        attention.v_proj.weight[16:] = 0.0  # the second kv head, which query heads 2 and 3 read
    tokens = tokens_of(prepared)
    before = torch_logits(prepared, tokens)
    statistics = gather(prepared, windows_of(prepared, 20))
    codes = fit(prepared.spec, statistics, partial_plan(prepared.spec, (0, 1, 2, 3), (0, 1)))
    prepared.install(codes)
    np.testing.assert_allclose(torch_logits(prepared, tokens), before, atol=2e-5)


def test_groups_with_the_least_fluctuation_go_first() -> None:
    fluctuation = np.array([[5, 5, 5, 9, 9, 9], [1, 1, 1, 7, 7, 7], [4, 4, 4, 2, 2, 2]], float)
    statistics = replace(statistics_of(GROUPED), fluctuation=fluctuation)
    plan = PruneHeads(groups=2, score="fluctuation").decide(GROUPED, statistics, Plan.identity(GROUPED))
    assert [layer.heads for layer in plan.layers] == [None, (3, 4, 5), (0, 1, 2)]
    assert [len(layer.kv_heads(GROUPED)) for layer in plan.layers] == [2, 1, 1]
    assert "3 of 6 heads removed with 12.5% of the layer's fluctuation, 1 of 2 kv heads left" in plan.layers[1].reason


def test_query_heads_go_from_every_group_of_a_layer_alike() -> None:
    statistics = statistics_of(GROUPED)
    plan = PruneHeads(queries=4, score="fluctuation").decide(GROUPED, statistics, Plan.identity(GROUPED))
    check_plan(plan, GROUPED)
    kept = [layer.heads or range(6) for layer in plan.layers]
    assert sum(6 - len(heads) for heads in kept) == 8
    assert all(len(layer.kv_heads(GROUPED)) == 2 for layer in plan.layers)


def test_measured_choice_takes_what_loses_least_alone_and_asks_once() -> None:
    asked: list[tuple[int, tuple[int, ...]]] = []

    def loss(layer: int, gone: tuple[int, ...]) -> float:
        asked.append((layer, gone))
        return {0: 3.0, 1: 1.0, 2: 2.0}[layer] + gone[0]

    trials = MadeUpTrials(GROUPED, lambda method: loss(*next(iter(method.heads.items()))))
    method = PruneHeads(groups=3).resolve(trials)
    assert method.heads == {0: (0, 1, 2), 1: (0, 1, 2), 2: (0, 1, 2)}
    assert len(asked) == len(set(asked)) == 6
    assert not method.is_measured


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({}, "not what to remove"),
        ({"groups": 6}, "too many"),
        ({"queries": 7}, "too many"),
        ({"heads": {3: (0,)}}, "3 layers"),
        ({"heads": {0: (0,)}}, "read by 2 or 3 query heads"),
    ],
)
def test_heads_that_cannot_go_are_refused(options: dict[str, object], fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        PruneHeads.model_validate(options).check(GROUPED)


@pytest.mark.parametrize("options", [{"groups": 1, "queries": 1}, {"groups": 0}, {"score": "random", "groups": 1}])
def test_options_that_say_two_things_or_nonsense_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PruneHeads.model_validate(options)


@pytest.mark.parametrize(
    ("heads", "fault"), [((6,), "not some of"), ((1, 0), "not some of"), ((0, 0), "not some of"), ((0, 3, 4), "1 or 2")]
)
def test_plan_with_impossible_heads_is_refused(heads: tuple[int, ...], fault: str) -> None:
    layers = (LayerPlan(layer=0, heads=heads), LayerPlan(layer=1), LayerPlan(layer=2))
    with pytest.raises(UsageError, match=fault):
        check_plan(Plan(layers=layers), GROUPED)


def test_plan_without_any_head_is_refused() -> None:
    with pytest.raises(UsageError, match="no layer keeps a head"):
        check_plan(Plan(layers=tuple(LayerPlan(layer=layer, heads=()) for layer in range(3))), GROUPED)


@pytest.mark.parametrize(
    "methods",
    [(PruneHeads(groups=1), KvHdc(bits=4), KvPca(rank=8)), (PruneHeads(queries=1), KvWindow(window=12), KvQuant())],
    ids=["groups", "queries"],
)
def test_compress_measures_prunes_and_keeps_its_plan(
    tiny_model: ModelOf, tmp_path: Path, methods: tuple[Method, ...]
) -> None:
    model, recipe = str(tiny_model("llama")), recipe_of(methods)
    summary = pipeline.plan(model, recipe)
    plan = Plan.model_validate_json(summary.plan.model_dump_json())
    assert sum(layer.heads is not None for layer in plan.layers) == 1
    manifest = pipeline.compress(model, recipe, tmp_path / "out", plan=plan)
    assert manifest.plan == plan
    assert manifest.report is not None
    assert manifest.report.artifact.kv_bytes_per_token == summary.kv_bytes_per_token
    assert layout_of(open_session(tmp_path / "out")) == manifest.kv_layout


@pytest.mark.parametrize("second", [(), (0, 1, 2, 3)])
def test_refit_lowers_the_kl_of_pruned_heads(tiny_model: ModelOf, second: tuple[int, ...]) -> None:
    prepared = open_prepared(tiny_model("llama"), recipe_of())
    windows = windows_of(prepared, 20)
    codes = prepared.codes(partial_plan(prepared.spec, (0, 1), second))
    evaluator = KLEvaluator(prepared.model, prepared.architecture, windows)
    again = refitted(prepared, codes, windows)
    assert 0 < evaluator.kl(again) < 0.95 * evaluator.kl(codes)
