"""Attention, feed-forward parts and blocks that go: the choice, the means in their place, and the graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from pydantic import ValidationError
from support.gathering import gather, windows_of
from support.models import (
    cached_logits,
    export_slim,
    open_prepared,
    original_logits,
    recipe_of,
    tokens_of,
    torch_logits,
)
from support.numbers_of_a_model import SPEC, statistics_of
from support.tiny_decoders import FAMILIES
from support.trials import MadeUpTrials, refitted

from kvslim import pipeline
from kvslim.checks import check_methods, check_plan
from kvslim.contract import Part
from kvslim.errors import UsageError
from kvslim.methods import KvHdc, KvQuant, PruneHeads, PruneLayers
from kvslim.methods.fitting import fit
from kvslim.planning.decide import decide
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.progress import Silent
from kvslim.runtime.opening import layout_of, open_session
from kvslim.transform.compensate import RIDGE, runs_of
from kvslim.transform.kl_evaluator import KLEvaluator
from kvslim.transform.surgery import layer_modules, trial
from kvslim.types import KVLayout, Plan

DEEP = SPEC.model_copy(update={"layers": 6, "windows": (None,) * 6})
ModelOf = Callable[[str], Path]


def trials_with(loss: Callable[[Mapping[int, Part]], float]) -> MadeUpTrials:
    """Trials in which parts of layers that go lose so much."""
    return MadeUpTrials(DEEP, lambda method: loss(method.layers or {}))


def test_layers_go_one_by_one_with_the_loss_measured_again() -> None:
    """Layers 1 and 2 are spare alone, but stand in for each other."""
    asked: list[tuple[int, ...]] = []

    def loss(gone: Mapping[int, Part]) -> float:
        asked.append(tuple(gone))
        return sum({1: 0.1, 2: 0.2, 3: 0.5, 4: 0.9}[layer] for layer in gone) + 5.0 * ({1, 2} <= set(gone))

    method = PruneLayers(attention=2).resolve(trials_with(loss))
    assert method.layers == {1: "attention", 3: "attention"}
    assert asked == [(1,), (2,), (3,), (4,), (1, 2), (1, 3), (1, 4)]
    assert not method.is_measured


def test_parts_of_all_kinds_compete_when_several_are_asked_for() -> None:
    losses: dict[Part, dict[int, float]] = {
        "attention": {1: 3.0, 2: 1.0, 3: 4.0, 4: 9.0},
        "mlp": {1: 2.0, 2: 0.5, 3: 6.0, 4: 9.0},
        "block": {1: 9.0, 2: 9.0, 3: 9.0, 4: 8.0},
    }
    method = PruneLayers(attention=1, mlps=1, blocks=1).resolve(
        trials_with(lambda gone: sum(losses[part][layer] for layer, part in gone.items()))
    )
    assert method.layers == {1: "attention", 2: "mlp", 4: "block"}


@pytest.mark.parametrize(("protect", "free"), [(0, {0, 1, 2, 3, 4, 5}), (1, {1, 2, 3, 4}), (2, {2, 3})])
@pytest.mark.parametrize("part", ["attention", "mlps", "blocks"])
def test_ends_are_protected(part: str, protect: int, free: set[int]) -> None:
    method = PruneLayers.model_validate({part: 1, "protect": protect})
    asked: list[int] = []

    def loss(gone: Mapping[int, Part]) -> float:
        asked.extend(gone)
        return 0.0

    method.resolve(trials_with(loss))
    assert set(asked) == free


def test_least_block_influence_goes_first_when_that_is_the_score() -> None:
    influence = np.arange(18.0).reshape(6, 3)
    influence[3] = 0.5, 0.7, 99.0
    statistics = replace(statistics_of(DEEP), influence=influence)
    identity = Plan.identity(DEEP)
    taken = {
        option: PruneLayers.model_validate({option: 2, "score": "block_influence"}).decide(DEEP, statistics, identity)
        for option in ("attention", "mlps", "blocks")
    }
    gone = {option: [layer.layer for layer in plan.layers if layer.reason != "kept"] for option, plan in taken.items()}
    assert gone == {"attention": [1, 3], "mlps": [1, 3], "blocks": [1, 2]}


def test_plan_says_what_each_layer_loses() -> None:
    method = PruneLayers(layers={1: "attention", 3: "mlp", 4: "block"})
    plan = method.decide(DEEP, statistics_of(DEEP), Plan.identity(DEEP))
    check_plan(plan, DEEP)
    assert [(layer.heads, layer.mlp) for layer in plan.layers] == [
        (None, True), ((), True), (None, True), (None, False), ((), False), (None, True)
    ]  # fmt: skip
    assert sorted({tensor.layer for tensor in KVLayout.of(DEEP, plan).tensors}) == [0, 2, 3, 5]
    assert [plan.layers[layer].reason.split(" removed")[0] for layer in (1, 3, 4)] == [
        "attention", "feed-forward part", "block"
    ]  # fmt: skip
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({}, "not what to remove"),
        ({"attention": 5}, "too many"),
        ({"mlps": 5}, "too many"),
        ({"attention": 2, "mlps": 2, "blocks": 1}, "too many"),
        ({"layers": {6: "mlp"}}, "not a layer 6"),
        ({"layers": {-1: "mlp"}}, "not a layer -1"),
        ({"layers": dict.fromkeys(range(6), "block")}, "no layer keeps its attention"),
        ({"attention": 3, "blocks": 3, "protect": 0}, "no layer keeps its attention"),
        ({"attention": 1, "protect": 3}, "too many"),
    ],
)
def test_layers_that_cannot_go_are_refused(options: dict[str, object], fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        PruneLayers.model_validate(options).check(DEEP)


@pytest.mark.parametrize(
    "options",
    [
        {"attention": 1, "layers": {1: "mlp"}},
        {"attention": 0},
        {"protect": -1},
        {"layers": [1]},
        {"layers": {1: "head"}},
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PruneLayers.model_validate(options)


def test_counted_heads_are_refused_beside_layers_that_may_go() -> None:
    with pytest.raises(UsageError, match="cannot count on the heads"):
        check_methods(recipe_of([PruneLayers(attention=1), PruneHeads(groups=1)]))
    check_methods(recipe_of([PruneLayers(attention=1), PruneHeads(heads={0: (0, 1)})]))
    check_methods(recipe_of([PruneLayers(mlps=1), PruneHeads(groups=1)]))


def exported(prepared: PreparedDecoder, folder: Path) -> np.ndarray:
    """Logits in torch of the prepared model's recipe, now installed, its graph in `folder`."""
    plan = export_slim(prepared, folder)
    assert layout_of(open_session(folder)) == KVLayout.of(prepared.spec, plan)
    return torch_logits(prepared, tokens_of(prepared))


def matrix_entries(folder: Path) -> int:
    """Numbers in the matrices of a graph."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return sum(int(np.prod(weight.dims)) for weight in graph.initializer if len(weight.dims) == 2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "gpt2", "opt"])
def test_graph_without_a_feed_forward_part_and_a_block_equals_torch(
    tiny_model: ModelOf, tmp_path: Path, family: str
) -> None:
    """The first layer keeps its attention alone, the second nothing, and the graph holds no weight of what is gone."""
    prepared = open_prepared(tiny_model(family), recipe_of([PruneLayers(layers={0: "mlp", 1: "block"})]))
    first, second = layer_modules(prepared.model, prepared.architecture)
    parts = [first.get_submodule(name) for name in prepared.architecture.mlp]
    gone = sum(weight.numel() for part in (*parts, second) for weight in part.parameters() if weight.dim() == 2)
    (tmp_path / "plain").mkdir()
    prepared.export(Plan.identity(prepared.spec), tmp_path / "plain")
    slim, tokens = exported(prepared, tmp_path / "slim"), tokens_of(prepared)
    assert np.abs(slim - original_logits(tiny_model(family), tokens)).max() > 1e-3
    assert np.abs(cached_logits(tmp_path / "slim", tokens) - slim).max() < 1e-4
    assert {tensor.layer for tensor in layout_of(open_session(tmp_path / "slim")).tensors} == {0}
    assert matrix_entries(tmp_path / "plain") - matrix_entries(tmp_path / "slim") == gone


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_later_layer_keeps_its_number_and_its_code_when_the_first_block_goes(
    tiny_model: ModelOf, tmp_path: Path, family: str
) -> None:
    prepared = open_prepared(tiny_model(family), recipe_of([PruneLayers(layers={0: "block"}), KvQuant()]))
    slim, tokens = exported(prepared, tmp_path / "slim"), tokens_of(prepared)
    effect = np.abs(slim - original_logits(tiny_model(family), tokens)).max()
    cached = layout_of(open_session(tmp_path / "slim")).tensors
    assert {(tensor.past, tensor.dtype) for tensor in cached} == {
        ("past_key_values.1.key", "int8"),
        ("past_key_values.1.value", "int8"),
    }
    assert np.abs(cached_logits(tmp_path / "slim", tokens) - slim).max() < 0.1 * effect


@pytest.mark.parametrize("family", [family for family in FAMILIES if "-" not in family])
def test_parts_add_up_to_their_layer_in_every_family(tiny_model: ModelOf, family: str) -> None:
    """Means and influences are those of what really is added to the hidden states."""
    prepared = open_prepared(tiny_model(family), recipe_of())
    windows = windows_of(prepared, 2)
    seen = hidden_states(prepared, windows)
    statistics = gather(prepared, windows)
    multiplier = prepared.architecture.multiplier(prepared.model.config)
    for layer, (before, after) in enumerate(pairwise(seen)):
        before, after = (states[:, states.shape[1] // 8 :].reshape(-1, states.shape[2]) for states in (before, after))
        parts = statistics.attention_mean[layer] + statistics.mlp_mean[layer]
        np.testing.assert_allclose(multiplier * parts, (after - before).mean(0), atol=1e-5)
        lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
        assert statistics.influence[layer, 2] == pytest.approx(1 - ((before * after).sum(1) / lengths).mean(), abs=1e-5)
    down = dict(layer_modules(prepared.model, prepared.architecture)[0].named_modules())[prepared.architecture.down]
    assert down.out_features == prepared.spec.hidden_size


def hidden_states(prepared: PreparedDecoder, windows: np.ndarray) -> list[np.ndarray]:
    """[windows, length, hidden] before each layer and after the last."""
    import torch

    layers = layer_modules(prepared.model, prepared.architecture)
    seen: list[np.ndarray] = []
    hooks = [
        layers[0].register_forward_pre_hook(
            lambda _, given, named: seen.append((given[0] if given else named["hidden_states"]).double().numpy()),
            with_kwargs=True,
        ),
        *(layer.register_forward_hook(lambda *call: seen.append(call[2].double().numpy())) for layer in layers),
    ]
    with torch.inference_mode():
        prepared.model(torch.from_numpy(windows))
    for hook in hooks:
        hook.remove()
    return seen


def test_model_stays_as_it_is_when_the_part_that_goes_says_the_same_for_every_token(tiny_model: ModelOf) -> None:
    import torch

    prepared = open_prepared(tiny_model("gpt2"), recipe_of())
    block = prepared.model.transformer.h[1]
    with torch.no_grad():
        for projection in (block.mlp.c_proj, block.attn.c_proj):
            projection.weight.zero_()
            projection.bias.normal_()
    tokens = tokens_of(prepared)
    before = torch_logits(prepared, tokens)
    prepared.statistics = gather(prepared, windows_of(prepared, 2))
    for part in ("attention", "mlp", "block"):
        method = PruneLayers.model_validate({"layers": {1: part}})
        with trial(prepared.model, prepared.architecture, prepared.trials().codes_of(method)):
            np.testing.assert_allclose(torch_logits(prepared, tokens), before, atol=2e-5)
    np.testing.assert_array_equal(torch_logits(prepared, tokens), before)


@pytest.mark.parametrize("family", ["llama", "granite", "phi"])
def test_down_projection_before_a_block_that_goes_is_the_ridge_regression_to_what_comes_behind(
    tiny_model: ModelOf, family: str
) -> None:
    prepared = open_prepared(tiny_model(family), recipe_of())
    windows = windows_of(prepared, 40)
    prepared.statistics = statistics = gather(prepared, windows)
    codes = prepared.trials().codes_of(PruneLayers(layers={1: "block"}))
    fitted = refitted(prepared, codes, windows)
    down = layer_modules(prepared.model, prepared.architecture)[0].get_submodule(prepared.architecture.down)
    read: list[np.ndarray] = []
    hook = down.register_forward_hook(lambda *call: read.append(call[1][0].double().numpy()))
    _, first, wanted = hidden_states(prepared, windows)
    hook.remove()
    multiplier = prepared.architecture.multiplier(prepared.model.config)
    mean = multiplier * (statistics.attention_mean[1] + statistics.mlp_mean[1])
    missing = ((wanted - first - mean) / multiplier).reshape(-1, prepared.spec.hidden_size)
    rows = read[0].reshape(-1, down.in_features)
    norms = np.linalg.norm(wanted, axis=2).reshape(-1, 1)
    seen = norms[:, 0] > 0
    rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)[seen] / norms[seen]
    missing = missing[seen] / norms[seen]
    ridge = np.diag([*[RIDGE * (rows[:, :-1] ** 2).sum() / down.in_features] * down.in_features, 0.0])
    change = np.linalg.solve(rows.T @ rows + ridge, rows.T @ missing).T
    expected = down.weight.detach().double().numpy() + change[:, :-1]
    np.testing.assert_allclose(fitted[0].down.weight, expected, atol=1e-4)
    evaluator = KLEvaluator(prepared.model, prepared.architecture, windows)
    assert evaluator.kl(fitted) < evaluator.kl(codes)


def test_plan_refits_the_layer_before_a_block_that_goes_and_its_graph_equals_torch(
    tiny_model: ModelOf, tmp_path: Path
) -> None:
    recipe = recipe_of([PruneLayers(layers={1: "block"})])
    summary = pipeline.plan(str(tiny_model("gpt2")), recipe)
    assert [layer.refit for layer in summary.plan.layers] == [True, False]
    assert "refitted, which takes" in summary.plan.layers[0].reason
    prepared = open_prepared(tiny_model("gpt2"), recipe)
    statistics = prepared.statistics
    means_alone = decide(recipe, prepared.spec, statistics)
    evaluator = prepared.trials().held_out
    assert summary.kl < 0.97 * evaluator.kl(prepared.codes(means_alone))
    prepared.install(prepared.codes(Plan.model_validate_json(summary.plan.model_dump_json())))
    prepared.export(summary.plan, tmp_path)
    tokens = tokens_of(prepared)
    assert np.abs(cached_logits(tmp_path, tokens) - torch_logits(prepared, tokens)).max() < 1e-4


def test_norm_behind_the_feed_forward_part_leaves_the_means_alone(tiny_model: ModelOf) -> None:
    prepared = open_prepared(tiny_model("olmo2"), recipe_of())
    windows = windows_of(prepared, 4)
    prepared.statistics = gather(prepared, windows)
    codes = prepared.trials().codes_of(PruneLayers(layers={1: "block"}))
    assert refitted(prepared, codes, windows) == codes


def test_layers_are_refitted_together_with_the_blocks_that_are_gone_behind_them() -> None:
    codes = fit(DEEP, statistics_of(DEEP), PruneLayers(layers={0: "block", 2: "block", 3: "block", 4: "mlp"}).decide(
        DEEP, statistics_of(DEEP), Plan.identity(DEEP)
    ))  # fmt: skip
    assert list(runs_of(codes, Silent())) == [(0, 0), (1, 3), (4, 4), (5, 5)]


def test_compress_measures_what_goes_and_keeps_its_plan(tiny_model: ModelOf, tmp_path: Path) -> None:
    model = str(tiny_model("qwen3"))
    recipe = recipe_of([PruneLayers(attention=1, mlps=1, protect=0), KvHdc(bits=4)])
    summary = pipeline.plan(model, recipe)
    dropped = [layer.layer for layer in summary.plan.layers if layer.heads == ()]
    assert len(dropped) == 1
    assert [layer.mlp for layer in summary.plan.layers].count(False) == 1
    manifest = pipeline.compress(model, recipe, tmp_path / "out", plan=summary.plan)
    layout = layout_of(open_session(tmp_path / "out"))
    assert layout == manifest.kv_layout
    assert {tensor.layer for tensor in layout.tensors} == {0, 1} - set(dropped)
    assert manifest.report is not None
    assert manifest.report.artifact.kv_bytes_per_token == summary.kv_bytes_per_token
