"""Rounding in two halves, the first of which takes up what the last one loses; values centred at the first token's."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.models import (
    cached_logits,
    exported,
    open_prepared,
    original_logits,
    recipe_of,
    tokens_of,
    torch_logits,
)
from support.numbers_of_a_model import SPEC, statistics_of

from kvslim.caches import FullCache
from kvslim.calibrate.recording import SINKS
from kvslim.checks import check_plan
from kvslim.errors import UsageError
from kvslim.methods.feedback import feedback, has_feedback, mixing
from kvslim.methods.fitting import fit
from kvslim.methods.kv_hdc import KvHdc
from kvslim.methods.kv_pca import KvPca
from kvslim.methods.kv_quant import KvQuant, key_rounding_error, value_rounding_error
from kvslim.methods.rounding import fit_steps, rounded
from kvslim.planning.cost import Choice, SideCosts
from kvslim.transform.edits import LayerEdit, LinearCode
from kvslim.types import LayerPlan, Plan

SPREAD = 4.0 ** -np.arange(16)[None] * np.array([[1.0], [3.0]])  # eigenvalues of two heads: a wide spectrum


def balanced(values: np.ndarray, count: int = 4000) -> np.ndarray:
    """Samples [heads, count, r] of balanced coordinates, whose power is the root of the eigenvalues."""
    return np.random.default_rng(0).standard_normal((len(values), count, values.shape[1])) * values[:, None] ** 0.25


def score_noise(values: np.ndarray, bits: int, *, halves: bool) -> float:
    """What rounding does to products with readers, whose power is the root of the eigenvalues too."""
    mixed = mixing(values, seed=0)
    samples = balanced(values)
    metric = np.sqrt(values)[:, :, None] * np.eye(values.shape[1])
    if halves:
        samples = samples @ mixed.encoder
        metric = mixed.decoder.swapaxes(1, 2) @ metric @ mixed.decoder
    weights = np.ones(samples.shape[:2])
    taken_up = feedback(metric) if halves else None
    steps = fit_steps(samples, weights, "per_channel", bits)
    error = rounded(samples, steps, bits, feedback=taken_up) - samples
    return float(np.einsum("hnd,hde,hne->", error, metric, error) / samples.shape[1])


def test_mixing_keeps_every_product() -> None:
    mixed = mixing(SPREAD, seed=3)
    np.testing.assert_allclose(
        mixed.encoder @ mixed.decoder.swapaxes(1, 2), np.broadcast_to(np.eye(16), (2, 16, 16)), atol=1e-9
    )


def test_mixed_coordinates_have_equal_power() -> None:
    power = np.square(balanced(SPREAD, 40_000) @ mixing(SPREAD, seed=0).encoder).mean(1)
    np.testing.assert_allclose(power, 1, atol=0.1)


def test_feedback_lowers_the_noise_when_coordinates_differ_in_strength() -> None:
    assert score_noise(SPREAD, 8, halves=True) < 0.5 * score_noise(SPREAD, 8, halves=False)


def test_feedback_is_the_best_correction_of_an_error_that_is_known() -> None:
    rng = np.random.default_rng(0)
    root = rng.standard_normal((2, 16, 16))
    metric = root @ root.swapaxes(1, 2)
    error = rng.standard_normal((2, 50, 8))

    def cost(correction: np.ndarray) -> float:
        whole = np.concatenate([correction, error], axis=-1)
        return float(np.einsum("hnd,hde,hne->", whole, metric, whole))

    best = -error @ feedback(metric).swapaxes(1, 2)
    assert all(cost(best) < cost(best + 0.1 * rng.standard_normal(best.shape)) for _ in range(5))
    assert cost(best) < 0.7 * cost(np.zeros_like(best))


def test_expected_noise_is_the_geometric_mean_of_the_halves_and_falls_with_them() -> None:
    costs = SideCosts(SPREAD, 1.0)
    strong, weak = (np.sqrt(SPREAD[:, half]).mean(1) for half in (slice(8), slice(8, 16)))
    assert costs.cost(Choice(16, 0), 4).noise == pytest.approx(float((strong * weak).sum() * 16))


@pytest.mark.parametrize("rank", range(8, 129, 8))
def test_halves_have_a_rotation_where_they_say_so(rank: int) -> None:
    assert rank == 104 or has_feedback(rank)
    if has_feedback(rank):
        assert mixing(np.ones((1, rank)), seed=0).encoder.shape == (1, rank, rank)


def test_int4_codes_have_feedback_and_int8_codes_none() -> None:
    statistics = statistics_of(SPEC)
    for bits in (4, 8):
        plan = KvHdc(bits=bits).decide(SPEC, statistics, Plan.identity(SPEC))
        for layer, edit in zip(plan.layers, fit(SPEC, statistics, plan), strict=True):
            assert isinstance(layer.cache, FullCache)
            assert layer.cache.feedback == (bits == 4)
            assert (edit.rounding.key_feedback is not None) == (edit.rounding.value_feedback is not None) == (bits == 4)


def test_side_with_a_residual_has_no_feedback_and_the_other_keeps_its_own() -> None:
    cache = FullCache(rank=8, residual=8, value_rank=16, value_residual=0, rotation=0, stored="int4", feedback=True)
    plan = Plan(layers=tuple(LayerPlan(layer=layer, cache=cache) for layer in range(SPEC.layers)))
    for edit in fit(SPEC, statistics_of(SPEC), plan):
        assert edit.rounding.key_feedback is None
        assert edit.rounding.value_feedback is not None


@pytest.mark.parametrize(
    "cache", [FullCache(rank=16, stored="int4", feedback=True), FullCache(rank=16, rotation=0, feedback=True)]
)
def test_feedback_is_refused_without_rotation_or_integers(cache: FullCache) -> None:
    plan = Plan(layers=tuple(LayerPlan(layer=layer, cache=cache) for layer in range(SPEC.layers)))
    with pytest.raises(UsageError, match="feedback needs"):
        check_plan(plan, SPEC)


@pytest.mark.parametrize("side", ["key", "value"])
def test_feedback_loses_less_than_a_rotation_alone(side: str) -> None:
    statistics = statistics_of(SPEC)
    error = key_rounding_error if side == "key" else value_rounding_error
    losses = []
    for wanted in (True, False):
        cache = FullCache(rank=16, rotation=0, stored="int4", feedback=wanted)
        plan = Plan(layers=tuple(LayerPlan(layer=layer, cache=cache) for layer in range(SPEC.layers)))
        edits = fit(SPEC, statistics, plan, before=KvQuant.order)
        losses.append(sum(error(statistics, layer, cache, edit) for layer, edit in enumerate(edits)))
    assert losses[0] < 0.95 * losses[1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_graph_equals_torch_when_halves_are_rounded_with_feedback(
    tiny_model: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    prepared = open_prepared(tiny_model(family), recipe_of())
    cache = FullCache(rank=16, rotation=0, stored="int4", centred=True, value_centred=True, feedback=True)
    plan = Plan(layers=tuple(LayerPlan(layer=layer, cache=cache) for layer in range(prepared.spec.layers)))
    tokens, slim = tokens_of(prepared), exported(prepared, plan, tmp_path / "slim")
    effect = np.abs(slim - original_logits(tiny_model(family), tokens)).max()
    assert effect > 1e-4
    assert np.abs(cached_logits(tmp_path / "slim", tokens) - slim).max() < 0.1 * effect


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2", "gpt_neox"])
def test_centre_of_all_values_changes_no_logits_when_nothing_is_rounded(
    tiny_model: Callable[[str], Path], family: str
) -> None:
    prepared = open_prepared(tiny_model(family), recipe_of())
    tokens, spec = tokens_of(prepared), prepared.spec
    before = torch_logits(prepared, tokens)
    centre = np.random.default_rng(0).standard_normal((spec.kv_heads, spec.head_dim))
    prepared.install((LayerEdit(code=LinearCode(value_centre=centre)),) * spec.layers)
    np.testing.assert_allclose(torch_logits(prepared, tokens), before, atol=5e-5)


@pytest.mark.parametrize("methods", [(KvQuant(bits=4),), (KvPca(), KvHdc(bits=4, granularity="per_channel"))])
def test_values_are_centred_when_most_attention_falls_on_one_value(
    methods: tuple[KvQuant | KvPca | KvHdc, ...],
) -> None:
    statistics = statistics_of(SPEC)
    sinks = np.full_like(statistics.sink_values, 0.3 * statistics.value_samples.std())
    statistics = replace(statistics, sink_values=sinks, sink_mass=np.full_like(statistics.sink_mass, 0.9))
    plan = Plan.identity(SPEC)
    for method in methods:
        plan = method.decide(SPEC, statistics, plan)
    for layer, edit in zip(plan.layers, fit(SPEC, statistics, plan), strict=True):
        assert isinstance(layer.cache, FullCache)
        assert layer.cache.value_centred
        assert "of the values' error" in layer.reason
        encoder = np.eye(16) if edit.code.value_encoder is None else edit.code.value_encoder
        first = statistics.sink_values[layer.layer][:, ::SINKS] @ encoder
        assert np.abs(first - np.asarray(edit.code.value_centre)[:, None]).max() < 1e-9


def test_nothing_is_centred_when_that_is_not_wanted() -> None:
    statistics = statistics_of(SPEC)
    statistics = replace(statistics, sink_values=statistics.sink_values + 25)
    plan = KvQuant(bits=4, centre=False).decide(SPEC, statistics, Plan.identity(SPEC))
    assert all(edit.code.value_centre is None for edit in fit(SPEC, statistics, plan))
