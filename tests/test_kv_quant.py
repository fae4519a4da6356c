"""`kv_quant`: how steps are chosen."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from support.numbers_of_a_model import SPEC, statistics_of

from kvslim.caches import Cache, FullCache, WindowCache
from kvslim.checks import check_plan
from kvslim.contract import Granularity
from kvslim.errors import UsageError
from kvslim.methods.kv_pca import KvPca
from kvslim.methods.kv_quant import KvQuant
from kvslim.methods.rounding import HEADROOM, fit_steps, peak_steps, rounded
from kvslim.transform.edits import LayerEdit
from kvslim.types import LayerPlan, Plan

MOST = {8: 127, 4: 7}


def fourth_power(samples: np.ndarray, steps: np.ndarray, weights: np.ndarray, bits: int) -> float:
    return float(((rounded(samples, steps, bits) - samples) ** 4 * weights[..., None]).sum())


@pytest.fixture
def samples() -> np.ndarray:
    """Heavy tails: the case in which the largest value is a poor clip."""
    values = np.random.default_rng(0).standard_t(4, (2, 2000, 8))
    values[:, 0] *= 3
    return values


@pytest.mark.parametrize("bits", [8, 4])
def test_steps_lose_less_than_minmax_in_the_fourth_power_of_the_error(samples: np.ndarray, bits: int) -> None:
    weights = np.full(samples.shape[:2], 1 / samples.shape[1])
    minmax = peak_steps(samples, "per_channel", bits)
    fitted = fit_steps(samples, weights, "per_channel", bits) / (HEADROOM if bits == 8 else 1)
    assert (fitted <= minmax * (1 + 1e-6)).all()
    assert fourth_power(samples, fitted, weights, bits) < fourth_power(samples, minmax, weights, bits)


def test_per_tensor_gives_one_step_when_channels_differ(samples: np.ndarray) -> None:
    steps = fit_steps(samples * np.arange(1, 9), np.full(samples.shape[:2], 1e-3), "per_tensor", 4)
    assert np.unique(steps).size == 1


def test_clip_spares_a_sample_when_its_weight_is_large() -> None:
    values = np.random.default_rng(0).uniform(-1, 1, (1, 500, 1))
    values[0, 0, 0] = 3.0
    weights = np.full((1, 500), 1e-9)
    weights[0, 0] = 1.0
    assert fit_steps(values, weights, "per_channel", 4)[0, 0] * MOST[4] == pytest.approx(3.0, rel=0.02)


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("bits", [8, 4])
def test_steps_are_positive_when_a_channel_is_silent(granularity: Granularity, bits: int) -> None:
    silent = np.zeros((1, 10, 8))
    assert (fit_steps(silent, np.full((1, 10), 0.1), granularity, bits) > 0).all()
    assert (peak_steps(silent, granularity, bits) > 0).all()


def test_sinks_are_within_range_when_attention_rests_on_them() -> None:
    statistics = statistics_of(SPEC)
    method = KvQuant(centre=False)
    plan = method.decide(SPEC, statistics, Plan.identity(SPEC))
    edits = method.apply(SPEC, statistics, plan, (LayerEdit(),) * SPEC.layers)
    for layer, edit in enumerate(edits):
        key_scale = edit.rounding.key_scale
        assert key_scale is not None
        worst = np.abs(statistics.sink_keys[layer]).max(axis=1) - key_scale * MOST[8]
        assert (worst <= 0.1 * np.abs(statistics.sink_keys[layer]).max()).all()


WINDOWED = SPEC.model_copy(update={"windows": (None, 8)})


def test_int4_is_refused_when_a_window_needs_larger_heads() -> None:
    statistics, plan = statistics_of(SPEC), Plan.identity(SPEC)
    with pytest.raises(UsageError, match="16 numbers per head in int4 do not fit the window of layer 1") as caught:
        KvQuant(bits=4).decide(WINDOWED, statistics, plan)
    assert "multiple of 32" in caught.value.fix
    KvQuant(bits=8).decide(WINDOWED, statistics, plan)


@pytest.mark.parametrize(
    ("cache", "fits"),
    [
        (FullCache(rank=16, stored="int4", residual=0), False),
        (FullCache(rank=16, stored="int4", residual=16), True),
        (WindowCache(rank=16, stored="int4", window=4), True),
    ],
)
def test_plan_in_int4_is_judged_by_the_width_of_its_heads(cache: Cache, fits: bool) -> None:
    plan = Plan(layers=(LayerPlan(layer=0), LayerPlan(layer=1, cache=cache)))
    with contextlib.nullcontext() if fits else pytest.raises(UsageError, match="numbers per head in int4"):
        check_plan(plan, WINDOWED)


def test_scales_are_those_of_the_coded_cache_when_pca_comes_before() -> None:
    statistics = statistics_of(SPEC)
    plan, edits = Plan.identity(SPEC), (LayerEdit(),) * SPEC.layers
    for method in (KvPca(rank=8), KvQuant(granularity="per_tensor")):
        plan = method.decide(SPEC, statistics, plan)
        edits = method.apply(SPEC, statistics, plan, edits)
    for layer, edit in zip(plan.layers, edits, strict=True):
        assert edit.rounding.key_scale is not None
        assert edit.rounding.key_scale.shape == (SPEC.kv_heads, 8)
        assert isinstance(layer.cache, FullCache)
        assert layer.cache.granularity == "per_tensor"
        assert np.unique(edit.rounding.key_scale).size == np.unique(edit.rounding.value_scale).size == 1
    assert plan.layers[0].cache.dtype == "int8"
    assert "rank 8" in plan.layers[0].reason
    assert "int8" in plan.layers[0].reason
