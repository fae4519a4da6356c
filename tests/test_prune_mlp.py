"""`prune_mlp`: the channels that change least go, and the down projection takes up what they did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from support.models import open_prepared, recipe_of, tokens_of, torch_logits
from support.numbers_of_a_model import SPEC, statistics_of
from support.trials import MadeUpTrials

from kvslim.checks import check_plan
from kvslim.errors import UsageError
from kvslim.methods import PruneMlp, ShareKv
from kvslim.methods.fitting import fit
from kvslim.methods.prune_mlp import MOST, shared_out, stepped
from kvslim.planning.budget import decode_time
from kvslim.planning.decide import decide
from kvslim.planning.refit import refit_where_it_pays
from kvslim.report.decisions import decisions
from kvslim.transform.kl_evaluator import KLEvaluator
from kvslim.types import LayerPlan, Plan
from kvslim.weight_format import WeightFormat

ModelOf = Callable[[str], Path]


def test_statistics_are_those_of_the_inputs_of_the_down_projection(tiny_llama: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of())
    statistics, down = prepared.statistics, prepared.model.model.layers[1].mlp.down_proj
    seen = []
    hook = down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].double()))
    with torch.inference_mode():
        for window in statistics.windows:
            prepared.model(torch.from_numpy(window[None]))
    hook.remove()
    inner = torch.cat([states[len(states) // 8 :] for states in seen])
    with torch.no_grad():
        added = inner.square().mean(0) * down.weight.double().square().sum(0)
    np.testing.assert_allclose(statistics.inner_mean[1], inner.mean(0).numpy(), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(statistics.inner_square[1], inner.square().mean(0).numpy(), rtol=1e-5)
    np.testing.assert_allclose(statistics.inner_added[1], added.numpy(), rtol=1e-5)


def test_channels_that_vary_least_in_what_they_add_go() -> None:
    channels = np.arange(128)
    norms = np.random.default_rng(0).permutation(128) + 1.0
    square = (channels % 7.0) ** 2 + 1  # of variance one, so that the score is the norm
    statistics = replace(
        statistics_of(SPEC),
        inner_mean=np.tile(channels % 7.0, (SPEC.layers, 1)),
        inner_square=np.tile(square, (SPEC.layers, 1)),
        inner_added=np.tile(square * norms, (SPEC.layers, 1)),
    )
    plan = PruneMlp(widths={1: 96}).decide(SPEC, statistics, Plan.identity(SPEC))
    assert [layer.mlp_width for layer in plan.layers] == [None, 96]
    edits = fit(SPEC, statistics, plan)
    assert edits[0].channels is None
    assert edits[1].channels is not None
    assert edits[1].channels.kept.tolist() == sorted(np.argsort(norms)[32:].tolist())


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt", "gemma2"])
def test_narrow_layer_is_the_whole_one_with_other_channels_at_their_mean(tiny_model: ModelOf, family: str) -> None:
    prepared = open_prepared(tiny_model(family), recipe_of((PruneMlp(widths={0: 64}),)))
    plan = decide(prepared.recipe, prepared.spec, prepared.statistics)
    codes, tokens = prepared.codes(plan), tokens_of(prepared)
    channels = codes[0].channels
    assert channels is not None
    mean = torch.from_numpy(channels.mean).float()
    gone = np.setdiff1d(np.arange(len(mean)), channels.kept)

    def at_mean(_: object, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        states = inputs[0].clone()
        states[..., gone] = mean[gone]
        return (states,)

    layer = prepared.model.get_submodule(prepared.architecture.layers).get_submodule("0")
    plain = torch_logits(prepared, tokens)
    hook = layer.get_submodule(prepared.architecture.down).register_forward_pre_hook(at_mean)
    expected = torch_logits(prepared, tokens)
    hook.remove()
    assert prepared.trials().loss(codes) > 0
    assert np.array_equal(torch_logits(prepared, tokens), plain)  # trials leave the model as it was
    prepared.install(codes)
    found = torch_logits(prepared, tokens)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(found - plain).max() > 1e-3 * np.abs(plain).max()


def test_refit_takes_up_what_channels_did(tiny_llama: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of((PruneMlp(ratio=0.3, score="alike"),)))
    plan = decide(prepared.recipe, prepared.spec, prepared.statistics)
    codes = prepared.codes(plan)
    again = prepared.trials().refitted(codes)
    assert all(code.down is not None and code.down.weight.shape[1] == 64 for code in again)
    evaluator = KLEvaluator(prepared.model, prepared.architecture, prepared.statistics.windows[:3])
    assert evaluator.kl(again) < evaluator.kl(codes)


def test_narrow_layers_with_plain_caches_are_refitted_where_that_pays(tiny_llama: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of((PruneMlp(ratio=0.3, score="alike"),)))
    trials, plan = prepared.trials(), decide(prepared.recipe, prepared.spec, prepared.statistics)
    # A random model gains on the text that the projections are fitted to alone.
    trials.held_out = KLEvaluator(prepared.model, prepared.architecture, prepared.statistics.windows[:3])
    before = trials.loss(prepared.codes(plan))
    found, after = refit_where_it_pays(trials, plan)
    assert all(layer.refit for layer in found.layers)
    assert 0 < after < before


def test_shares_make_the_quadratic_loss_least() -> None:
    costs = np.array([1.0, 2.0, 4.0])
    shares = shared_out(costs, 0.3)
    assert shares.mean() == pytest.approx(0.3)
    grid = np.arange(0, MOST + 1e-9, 0.01)
    losses = [costs @ np.square([a, b, 0.9 - a - b]) for a, b in product(grid, grid) if 0 <= 0.9 - a - b <= MOST]
    assert costs @ shares**2 <= min(losses)
    capped = shared_out(np.array([0.0, 1.0, 1.0]), 0.5)
    assert capped == pytest.approx([MOST, 0.375, 0.375])


def test_layer_that_loses_most_keeps_most() -> None:
    spec = SPEC.model_copy(update={"layers": 3, "windows": (None,) * 3})
    trials = MadeUpTrials(spec, lambda method: [0.1, 0.4, 0.1][next(iter(method.widths))], statistics_of(spec))
    assert PruneMlp(ratio=0.5).resolve(trials).widths == {0: 32, 1: 96, 2: 32}
    assert PruneMlp(widths={1: 64}).resolve(trials) == PruneMlp(widths={1: 64})


def test_widths_are_whole_steps() -> None:
    assert [stepped(1536, share) for share in (0.0, 0.2, 0.5, 0.01)] == [1536, 1216, 768, 1536]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "not what to remove"),
        ({"widths": {9: 32}}, "not a layer 9"),
        ({"widths": {0: 40}}, "not a multiple of 32"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        PruneMlp.model_validate(options).check(SPEC)
    with pytest.raises(ValidationError, match="not both"):
        PruneMlp(ratio=0.2, widths={0: 32})


def test_plan_for_wider_layers_is_refused() -> None:
    layers = tuple(LayerPlan(layer=layer, mlp_width=160) for layer in range(SPEC.layers))
    with pytest.raises(UsageError, match="has 128"):
        fit(SPEC, statistics_of(SPEC), Plan(layers=layers))
    with pytest.raises(ValidationError, match="multiple"):
        LayerPlan(layer=0, mlp_width=33)


def test_narrow_layer_can_read_the_cache_of_another(tiny_llama: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of([PruneMlp(widths={1: 32}), ShareKv(sources={1: 0})]))
    plan = decide(prepared.recipe, prepared.spec, prepared.statistics)
    assert (plan.layers[1].mlp_width, plan.layers[1].source) == (32, 0)


def test_narrow_layers_take_less_time_and_are_told(tiny_llama: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of((PruneMlp(widths={1: 64}),)))
    plan = decide(prepared.recipe, prepared.spec, prepared.statistics)
    check_plan(plan, prepared.spec)
    time, plain = decode_time(prepared, 64), Plan.identity(prepared.spec)
    assert time.of_plan(plan.layers) < time.of_plan(plain.layers)
    assert "64 channels" in str(decisions(prepared.spec, plan))


def test_rows_that_stay_keep_their_four_bits(tiny_llama: Path) -> None:
    weights = WeightFormat(type="int4", method="rtn")
    prepared = open_prepared(tiny_llama, recipe_of((PruneMlp(widths={0: 64}),), weights))
    plan = decide(prepared.recipe, prepared.spec, prepared.statistics)
    prepared.install(prepared.codes(plan))
    mlp = prepared.model.model.layers[0].mlp
    assert prepared.rows is not None
    assert prepared.rows.stored(mlp.up_proj.weight.detach().numpy()).bits == 4
    assert mlp.up_proj.weight.shape == (64, 64)
    assert prepared.rows.stored(mlp.down_proj.weight.detach().numpy()).bits == 8
