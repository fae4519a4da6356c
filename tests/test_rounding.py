"""Integer caches: their range and steps, residual coordinates, and what centring does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.gathering import gather, states, windows_of
from support.models import open_prepared, recipe_of, tokens_of, torch_logits
from support.numbers_of_a_model import SPEC, statistics_of

from kvslim.caches import FullCache
from kvslim.contract import Granularity, Stored
from kvslim.methods import KvQuant
from kvslim.methods.fitting import fit
from kvslim.methods.kv_quant import key_rounding_error, scaled
from kvslim.methods.rounding import fit_steps, peak_steps, rounded, sample_weights
from kvslim.transform.edits import LayerEdit, LinearCode
from kvslim.types import LayerPlan, Plan

ONE = np.ones((1, 1))


def column(*values: float) -> np.ndarray:
    """[1, n, 1] samples of one head and coordinate."""
    return np.array(values)[None, :, None]


def even(samples: np.ndarray) -> np.ndarray:
    return np.full(samples.shape[:2], 1 / samples.shape[1])


@pytest.mark.parametrize(("bits", "least", "most"), [(4, -8, 7), (8, -128, 127)])
def test_range_is_that_of_twos_complement(bits: int, least: int, most: int) -> None:
    given = rounded(column(-1000, least - 0.4, most + 0.4, 1000), ONE, bits)
    np.testing.assert_array_equal(given, column(least, least, most, most))


def test_halves_are_rounded_to_even() -> None:
    given = rounded(column(-2.5, -1.5, -0.5, 0.5, 1.5, 2.5), ONE, 4)
    np.testing.assert_array_equal(given, column(-2, -2, 0, 0, 2, 2))


@pytest.mark.parametrize("bits", [8, 4])
def test_residual_coordinates_are_finer_and_the_others_as_before(bits: int) -> None:
    samples = np.random.default_rng(0).standard_normal((2, 500, 8))
    steps = peak_steps(samples, "per_channel", bits)
    coarse, residual = (np.abs(rounded(samples, steps, bits, count) - samples) for count in (0, 4))
    # The finer step is a 16th; 8 of those either way reach every remainder of 4 bits but its very half.
    assert residual[..., :4].max() <= 1.01 * coarse[..., :4].max() / 8
    assert residual[..., :4].mean() < coarse[..., :4].mean() / 10
    np.testing.assert_array_equal(residual[..., 4:], coarse[..., 4:])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_minmax_clips_nothing(granularity: Granularity, bits: int) -> None:
    samples = np.random.default_rng(0).standard_t(3, (2, 400, 8))
    steps = peak_steps(samples, granularity, bits)
    assert (np.abs(rounded(samples, steps, bits) - samples) <= steps[:, None] / 2 + 1e-12).all()


def test_per_channel_loses_less_than_per_tensor_when_channels_differ() -> None:
    samples = np.random.default_rng(0).standard_normal((2, 400, 8)) * 2.0 ** np.arange(8)
    errors = {}
    for granularity in ("per_channel", "per_tensor"):
        steps = fit_steps(samples, even(samples), granularity, 4)
        errors[granularity] = np.square(rounded(samples, steps, 4) - samples)[..., 0].mean()
    assert errors["per_channel"] < 0.1 * errors["per_tensor"]


def test_weights_sum_to_1_and_give_sinks_their_attention() -> None:
    statistics = statistics_of(SPEC)
    weights = sample_weights(statistics, 0)
    body = statistics.key_samples.shape[2]
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_allclose(weights[:, body:].sum(1), statistics.sink_mass[0])


@pytest.mark.parametrize("stored", ["int8", "int4"])
def test_centring_lowers_the_error_when_keys_lie_far_from_zero(stored: Stored) -> None:
    statistics = statistics_of(SPEC)
    statistics = replace(statistics, key_samples=statistics.key_samples + 20, sink_keys=statistics.sink_keys + 17)
    errors = [
        key_rounding_error(statistics, 0, FullCache(stored=stored, centred=way), LayerEdit()) for way in (True, False)
    ]
    assert 0 < errors[0] < 0.5 * errors[1]
    plan = KvQuant(bits=8 if stored == "int8" else 4).decide(SPEC, statistics, Plan.identity(SPEC))
    cache = plan.layers[0].cache
    assert isinstance(cache, FullCache)
    assert cache.centred
    assert f"{1 - errors[0] / errors[1]:.0%}" in plan.layers[0].reason


def test_keys_stay_where_they_are_when_centring_is_not_wanted() -> None:
    statistics = statistics_of(SPEC)
    statistics = replace(statistics, key_samples=statistics.key_samples + 20, sink_keys=statistics.sink_keys + 17)
    plan = KvQuant(centre=False).decide(SPEC, statistics, Plan.identity(SPEC))
    caches = [layer.cache for layer in plan.layers if isinstance(layer.cache, FullCache)]
    assert len(caches) == SPEC.layers
    assert not any(cache.centred for cache in caches)
    assert all(edit.code.key_offset is None for edit in fit(SPEC, statistics, plan))


def test_offset_of_all_keys_changes_no_logits_when_nothing_is_rounded(tiny_llama: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of())
    tokens = tokens_of(prepared)
    before = torch_logits(prepared, tokens)
    spec = prepared.spec
    offset = np.random.default_rng(0).standard_normal((spec.kv_heads, spec.head_dim))
    prepared.install((LayerEdit(code=LinearCode(key_offset=offset)),) * spec.layers)
    np.testing.assert_allclose(torch_logits(prepared, tokens), before, atol=2e-5)


def test_residual_steps_clip_no_sample_of_the_coordinates_held_twice() -> None:
    statistics = statistics_of(SPEC)
    cache = FullCache(rank=16, residual=8, stored="int4")
    plan = Plan(layers=(LayerPlan(layer=0, cache=cache), LayerPlan(layer=1)))
    edit = fit(SPEC, statistics, plan, before=KvQuant.order)[0]
    steps = scaled(statistics, 0, cache, edit).rounding.key_scale
    assert steps is not None
    keys = np.concatenate([statistics.key_samples[0], statistics.sink_keys[0]], axis=1) @ edit.code.key_encoder
    worst = np.abs(keys[..., :8]).max(1)
    assert (worst <= 8 * steps[:, :8] + steps[:, :8] / 2).all()


def test_steps_hold_beyond_the_calibration_length_when_keys_turn(tiny_llama: Path) -> None:
    """Windows of 48 tokens; keys are those of any position up to the target context."""
    prepared = open_prepared(tiny_llama, recipe_of())
    short, long = windows_of(prepared, 20), np.random.default_rng(5).integers(0, prepared.spec.vocab_size, (1, 400))
    statistics = gather(prepared, short)
    plan = KvQuant().decide(prepared.spec, statistics, Plan.identity(prepared.spec))
    edits = fit(prepared.spec, statistics, plan)
    for layer, edit in enumerate(edits):
        keys = states(prepared, long, layer)["k"][0][:, 200:]
        keys = keys if edit.code.key_offset is None else keys - edit.code.key_offset[:, None]
        beyond = (np.abs(keys) > 128 * edit.rounding.key_scale[:, None]).mean()
        assert beyond < 1e-3
