"""`kv_hdc`: rotations lose nothing, spread evenly, and few bits of them come through the graph as torch has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.models import export_slim, open_prepared, original_logits, recipe_of, tokens_of, torch_logits
from support.numbers_of_a_model import SPEC, statistics_of

from kvslim.caches import FullCache
from kvslim.checks import check_methods
from kvslim.errors import UsageError
from kvslim.methods import KvHdc, KvPca, KvQuant
from kvslim.methods.fitting import fit
from kvslim.methods.rounding import rounded
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.runtime.opening import layout_of, open_session
from kvslim.runtime.session import DecodeSession
from kvslim.transform.edits import LayerEdit
from kvslim.types import KVLayout, LayerPlan, Plan

ModelOf = Callable[[str], Path]


def same(**cache: object) -> Plan:
    """All layers of the small model alike."""
    kept = FullCache.model_validate(cache)
    return Plan(layers=tuple(LayerPlan(layer=index, cache=kept) for index in range(SPEC.layers)))


def logits_with(model: Path, plan: Plan) -> np.ndarray:
    prepared = open_prepared(model, recipe_of())
    prepared.install(prepared.codes(plan))
    return torch_logits(prepared, tokens_of(prepared))


def test_rotation_changes_no_logits_when_nothing_is_rounded(tiny_llama: Path) -> None:
    tokens = tokens_of(open_prepared(tiny_llama, recipe_of()))
    plain = original_logits(tiny_llama, tokens)
    np.testing.assert_allclose(logits_with(tiny_llama, same(rank=16, rotation=0)), plain, atol=1e-4)
    cut = logits_with(tiny_llama, same(rank=8))
    assert np.abs(cut - plain).max() > 1e-2
    np.testing.assert_allclose(logits_with(tiny_llama, same(rank=8, rotation=3)), cut, atol=1e-4)


def key_powers(edit: LayerEdit, moment: np.ndarray) -> np.ndarray:
    """[heads, rank] variance of each component of the coded keys."""
    encoder = np.asarray(edit.code.key_encoder)
    return np.einsum("hdr,hde,her->hr", encoder, moment, encoder)


def test_power_is_even_over_components_after_rotation() -> None:
    statistics = statistics_of(SPEC)
    bare, rotated = (fit(SPEC, statistics, same(rank=16, rotation=seed))[0] for seed in (None, 0))
    before, after = (key_powers(edit, statistics.key_moment[0]) for edit in (bare, rotated))
    assert (before.max(1) > 3 * before.min(1)).all()
    # Damping makes the balanced basis diagonalise a little more than the moment, hence not exactly even.
    assert (after.max(1) < 1.2 * after.min(1)).all()
    np.testing.assert_allclose(after.sum(1), before.sum(1))


def test_residual_components_are_rotated_among_themselves() -> None:
    statistics = statistics_of(SPEC)
    cache = {"rank": 16, "residual": 8, "stored": "int4"}
    bare, rotated = (fit(SPEC, statistics, same(**cache, rotation=seed))[0] for seed in (None, 0))
    for side in ("key_encoder", "value_encoder"):
        coded, turned = (np.asarray(getattr(edit.code, side)) for edit in (bare, rotated))
        for part in (slice(0, 8), slice(8, 16)):
            spans = (coded[..., part] @ coded[..., part].swapaxes(1, 2) for coded in (coded, turned))
            np.testing.assert_allclose(*spans, atol=1e-9)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("stored", ["int8", "int4"])
@pytest.mark.parametrize("rotation", [None, 0])
def test_one_step_for_a_side_costs_coded_coordinates_nothing(rotation: int | None, stored: str, centred: bool) -> None:
    statistics = statistics_of(SPEC)
    apart, one = (
        same(rank=16, rotation=rotation, stored=stored, centred=centred, granularity=granularity)
        for granularity in ("per_channel", "per_tensor")
    )
    bits = {"int8": 8, "int4": 4}[stored]
    read = []
    for plan, steps in ((apart, 16), (one, 1)):
        edit = fit(SPEC, statistics, plan)[0]
        code, rounding = edit.code, edit.rounding
        keys = statistics.key_samples[0] @ code.key_encoder
        keys = keys - code.key_offset[:, None] if centred else keys
        values = statistics.value_samples[0] @ code.value_encoder
        group = SPEC.group_size
        read.append(rounded(keys, rounding.key_scale, bits) @ code.query_encoder[::group].swapaxes(1, 2))
        read.append(rounded(values, rounding.value_scale, bits) @ code.value_decoder[::group])
        assert (edit.cache.granularity == "per_tensor") == (steps == 1)
        for scale in (rounding.key_scale, rounding.value_scale):
            assert len(np.unique(np.asarray(scale)[0])) == steps
            assert steps > 1 or len(np.unique(scale)) == 1
    np.testing.assert_allclose(read[2], read[0], atol=1e-9)
    np.testing.assert_allclose(read[3], read[1], atol=1e-9)


def test_rank_of_a_method_before_is_kept_and_told() -> None:
    statistics = statistics_of(SPEC)
    plan = KvPca(rank=8).decide(SPEC, statistics, Plan.identity(SPEC))
    for layer in KvHdc(bits=4, seed=2).decide(SPEC, statistics, plan).layers:
        cache = layer.cache
        assert isinstance(cache, FullCache)
        assert (cache.rank, cache.rotation, cache.stored, cache.granularity) == (8, 2, "int4", "per_tensor")
        assert [word for word in ("rank 8", "rotated by a Hadamard matrix", "int4") if word not in layer.reason] == []


@pytest.mark.parametrize("bits", [8, 2])
def test_rank_without_rotation_is_refused(bits: int) -> None:
    wide = SPEC.model_copy(update={"head_dim": 256})
    with pytest.raises(UsageError, match="there is no Hadamard matrix of order 184"):
        KvHdc.model_validate({"bits": bits}).decide(wide, statistics_of(wide), same(rank=184))


def test_kv_hdc_is_refused_beside_kv_quant_and_in_attention24() -> None:
    with pytest.raises(UsageError, match="both choose how the cache is stored"):
        check_methods(recipe_of([KvHdc(), KvQuant()]))
    with pytest.raises(UsageError, match="attention24 has no integer cache"):
        check_methods(recipe_of([KvHdc()]).model_copy(update={"layout": "attention24"}))
    check_methods(recipe_of([KvPca(), KvHdc()]))


def exported(model: Path, folder: Path, bits: int) -> tuple[PreparedDecoder, Plan]:
    prepared = open_prepared(model, recipe_of([KvHdc.model_validate({"bits": bits, "window": 12, "sinks": 3})]))
    return prepared, export_slim(prepared, folder)


@pytest.mark.parametrize("bits", [3, 2, 1])
def test_packed_codes_come_through_the_cache_as_torch_has_them(tiny_llama: Path, tmp_path: Path, bits: int) -> None:
    prepared, plan = exported(tiny_llama, tmp_path / "slim", bits)
    tokens = tokens_of(prepared, 80)
    assert layout_of(open_session(tmp_path / "slim")) == KVLayout.of(prepared.spec, plan)
    session = DecodeSession(tmp_path / "slim", capacity=len(tokens), all_positions=True)
    cached = np.concatenate([session.step(chunk) for chunk in np.split(tokens, 5)])
    slim, plain = torch_logits(prepared, tokens), original_logits(tiny_llama, tokens)
    error, effect = (np.abs(logits - slim).max(1) for logits in (cached, plain))
    # A component on the edge between two levels may fall to either side, which moves what follows a little.
    assert np.median(error) < 1e-4
    assert error.max() < 0.5 * effect.max()
    np.testing.assert_allclose(cached[:16], plain[:16], atol=1e-4)


def test_packed_codes_lose_less_when_they_have_more_bits(tiny_llama: Path) -> None:
    errors = []
    for bits in (1, 2, 3):
        prepared = open_prepared(tiny_llama, recipe_of([KvHdc.model_validate({"bits": bits, "window": 4, "sinks": 1})]))
        statistics, tokens = prepared.statistics, tokens_of(prepared, 200)
        plan = prepared.recipe.methods[0].decide(prepared.spec, statistics, Plan.identity(prepared.spec))
        before = torch_logits(prepared, tokens)
        prepared.install(prepared.codes(plan))
        errors.append(float(np.square(torch_logits(prepared, tokens) - before).mean()))
    assert errors[0] > errors[1] > errors[2] > 0
