"""Weights are trained to a compressed cache: what is rounded is what the kernel rounds, and a kill loses nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import cached_logits, open_prepared, recipe_of, tokens_of, torch_logits
from support.tiny_decoders import save_decoder

from kvslim.caches import LinearCache, SharedCache, WindowCache
from kvslim.errors import UsageError
from kvslim.healing import distil, held_out, recompute
from kvslim.healing.changes import Changes
from kvslim.healing.distil import healed
from kvslim.healing.held_out import LOST, HeldOut
from kvslim.healing.schedule import LAST, LEAST_STEPS, WARM_UP, batch_of, is_evaluated, rate_of, steps_within
from kvslim.healing.student import Student
from kvslim.healing.text import Text, Texts, parts_of
from kvslim.methods import KvHdc, KvPca, KvQuant
from kvslim.planning.decide import decide
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.progress import Silent
from kvslim.settings import Heal
from kvslim.transform.edits import Codes
from kvslim.transform.straight_through import through
from kvslim.transform.surgery import trial
from kvslim.types import Healing, LayerPlan, Plan

ModelOf = Callable[[str], Path]
STEPS = 6


def texts_of(prepared: PreparedDecoder, length: int = 32) -> Texts:
    """The same text for all three: a random model learns nothing from one random text about another."""
    windows = np.random.default_rng(0).integers(0, prepared.spec.vocab_size, (8, length))
    return Texts(*(Text(windows, None) for _ in range(3)))


def planned(prepared: PreparedDecoder) -> tuple[Plan, Codes]:
    plan = decide(prepared.recipe, prepared.spec, prepared.statistics)
    return plan, prepared.codes(plan)


def heal(
    prepared: PreparedDecoder, codes: Codes, folder: Path, texts: Texts | None = None, **settings: Any
) -> tuple[Codes, Healing]:
    wanted = Heal.model_validate({"steps": STEPS, "rate": 2e-2, **settings})
    of = prepared.model, prepared.architecture, codes
    return healed(*of, texts or texts_of(prepared), wanted, 0, folder, Silent())


def test_gradients_pass_through_rounding_and_numbers_do_not_change() -> None:
    exact = torch.linspace(-3, 3, 50, requires_grad=True)
    rounded = through(exact, exact.round())
    assert torch.equal(rounded, exact.detach().round())
    (rounded * torch.arange(50.0)).sum().backward()
    assert exact.grad is not None
    assert torch.equal(exact.grad, torch.arange(50.0))
    with torch.no_grad():
        plain = exact.round()
        assert through(exact, plain) is plain


# Projections apart and packed in either way, norms of queries and of outputs, scaled queries, learned positions.
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "opt", "phi3"])
def test_student_is_the_model_with_codes_and_all_its_projections_learn(tiny_model: ModelOf, family: str) -> None:
    methods = (KvQuant(),) if family == "gemma2" else (KvPca(rank=8), KvHdc(bits=8))  # whose windows take no such rank
    prepared = open_prepared(tiny_model(family), recipe_of(methods))
    _, codes = planned(prepared)
    tokens = torch.from_numpy(tokens_of(prepared)[None])
    with trial(prepared.model, prepared.architecture, codes), torch.no_grad():
        expected = prepared.model(tokens).logits
    plain = prepared.model(tokens).logits.detach()
    student = Student(prepared.model, prepared.architecture, codes)
    found = student.model(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.log_softmax(-1)[..., 0].mean().backward()
    assert len(student.weights) >= 4 * prepared.spec.layers
    for name, weight in student.weights.items():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0 or name[1].endswith("bias"), name  # a bias of keys moves no softmax
    assert torch.equal(prepared.model(tokens).logits, plain)  # the teacher is as it was


CACHES: dict[str, Callable[[int], LayerPlan]] = {
    "window": lambda layer: LayerPlan(layer=layer, cache=WindowCache(window=8, sinks=2)),
    "shared": lambda layer: LayerPlan(layer=layer, cache=SharedCache(source=0)) if layer else LayerPlan(layer=layer),
    "no attention": lambda layer: LayerPlan(layer=layer, heads=() if layer else None),
    "fewer heads": lambda layer: LayerPlan(layer=layer, heads=(0, 1)),
    "no block": lambda layer: LayerPlan(layer=layer, heads=() if layer else None, mlp=not layer),
}


@pytest.mark.parametrize("kind", CACHES)
def test_any_cache_heals_and_its_graph_says_what_torch_says(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    prepared = open_prepared(tiny_llama, recipe_of())
    plan = Plan(layers=tuple(CACHES[kind](layer) for layer in range(prepared.spec.layers)))
    texts = texts_of(prepared)
    codes, found = heal(prepared, prepared.codes(plan), tmp_path / "state", texts, steps=12)
    assert found.kept
    assert found.kl_after < found.kl_before
    assert any("mlp." in name for code in codes for name in code.weights) == (kind in ("no attention", "no block"))
    check_graph(prepared, plan, codes, tmp_path / "graph")


def check_graph(prepared: PreparedDecoder, plan: Plan, codes: Codes, folder: Path) -> None:
    prepared.install(codes)
    folder.mkdir()
    prepared.export(plan, folder)
    tokens = tokens_of(prepared)
    expected = torch_logits(prepared, tokens)
    assert np.abs(cached_logits(folder, tokens) - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["shared", "fewer heads", "no block"])
def test_layers_that_are_computed_again_learn_the_same(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    prepared = open_prepared(tiny_llama, recipe_of())
    codes = prepared.codes(Plan(layers=tuple(CACHES[kind](layer) for layer in range(prepared.spec.layers))))
    whole, _ = heal(prepared, codes, tmp_path / "whole")
    calls: list[int] = []
    again = recompute.checkpoint
    monkeypatch.setattr(recompute, "checkpoint", lambda *call, **how: (calls.append(1), again(*call, **how))[1])
    monkeypatch.setattr(distil, "free_bytes", lambda _: 0)
    little, _ = heal(prepared, codes, tmp_path / "little")
    assert calls
    assert same(little, whole)


def test_state_shared_cache_and_narrower_mlp_heal_together(tmp_path: Path) -> None:
    model = save_decoder("llama", tmp_path / "model", num_hidden_layers=3, intermediate_size=128)
    prepared = open_prepared(model, recipe_of((KvQuant(),)))
    layers = (
        LayerPlan(layer=0).with_cache(stored="int8"),
        LayerPlan(layer=1, cache=SharedCache(source=0), mlp_width=64),
        LayerPlan(layer=2, cache=LinearCache(window=8, sinks=2, features=4)),
    )
    codes, found = heal(prepared, prepared.codes(Plan(layers=layers)), tmp_path / "state")
    assert found.kept
    names = [set(code.weights) for code in codes]
    assert [any("mlp." in name for name in each) for each in names] == [False, True, False]
    assert [any("features" in name for name in each) for each in names] == [False, False, True]
    assert [any("k_proj" in name for name in each) for each in names] == [True, False, True]
    check_graph(prepared, Plan(layers=layers), codes, tmp_path / "graph")


def test_bytes_left_for_the_gradients_grow_with_the_text_and_not_where_layers_are_computed_again(
    tiny_llama: Path,
) -> None:
    prepared = open_prepared(tiny_llama, recipe_of((KvQuant(bits=4),)))
    _, codes = planned(prepared)
    student = Student(prepared.model, prepared.architecture, codes)
    tokens = torch.from_numpy(texts_of(prepared).trained.windows)
    few, many = (recompute.left_bytes(student.model, student.layers, tokens[:count]) for count in (2, 8))
    hidden = 4 * tokens.numel() * prepared.spec.hidden_size
    assert many == pytest.approx(4 * few, rel=0.05)
    assert many > 10 * prepared.spec.layers * hidden  # what norms, projections and the activation read
    recompute.recompute(student.layers)
    assert recompute.left_bytes(student.model, student.layers, tokens) == prepared.spec.layers * hidden


def test_healing_lowers_the_kl_of_codes_and_keeps_the_best(tiny_llama: Path, tmp_path: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of((KvPca(rank=8), KvHdc(bits=4))))
    _, codes = planned(prepared)
    trained, found = heal(prepared, codes, tmp_path, steps=30)
    assert found.kept
    assert found.steps == 30
    assert found.tokens == 30 * 8 * 32
    assert found.kl_after < 0.8 * found.kl_before
    assert [look.step for look in found.watched] == [0, *range(3, 31, 3)]
    again, repeated = heal(prepared, codes, tmp_path, steps=30)  # all of it lies on the disk
    assert same(again, trained)
    assert repeated == found


def same(left: Codes, right: Codes) -> bool:
    return all(
        mine.weights.keys() == other.weights.keys()
        and all(np.array_equal(mine.weights[name], other.weights[name]) for name in mine.weights)
        for mine, other in zip(left, right, strict=True)
    )


class KilledError(Exception):
    pass


@pytest.mark.parametrize("killed_at", [2, 5])
def test_killed_training_ends_with_the_same_weights(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    prepared = open_prepared(tiny_llama, recipe_of((KvQuant(bits=4),)))
    _, codes = planned(prepared)
    texts = texts_of(prepared)
    whole, _ = heal(prepared, codes, tmp_path / "whole", texts)
    step = distil._Training._step
    taken: list[int] = []

    def killing(training: Any, number: int) -> None:
        if number == killed_at and not taken.count(killed_at):
            taken.append(number)
            raise KilledError
        taken.append(number)
        step(training, number)

    monkeypatch.setattr(distil._Training, "_step", killing)
    with pytest.raises(KilledError):
        heal(prepared, codes, tmp_path / "killed", texts)
    resumed, found = heal(prepared, codes, tmp_path / "killed", texts)
    assert taken == [*range(killed_at), killed_at, *range(killed_at, STEPS)]
    assert same(resumed, whole)
    assert not same(resumed, codes)
    assert found.steps == STEPS


def test_training_begins_again_when_its_state_is_damaged(tiny_llama: Path, tmp_path: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of((KvQuant(bits=4),)))
    _, codes = planned(prepared)
    texts = texts_of(prepared)
    whole, _ = heal(prepared, codes, tmp_path, texts)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    (tmp_path / "state.safetensors.1.partial").touch()  # of a training that was killed while it wrote
    again, _ = heal(prepared, codes, tmp_path, texts)
    assert same(again, whole)
    assert list(tmp_path.iterdir()) == [state]


@pytest.mark.parametrize(("judged", "kept"), [((0.1, 0.2), False), ((0.1, 0.1), False), ((0.2, 0.1), True)])
def test_codes_stay_as_they_were_where_text_that_was_not_seen_loses(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judged: tuple[float, float], kept: bool
) -> None:
    prepared = open_prepared(tiny_llama, recipe_of((KvQuant(bits=4),)))
    _, codes = planned(prepared)
    texts = texts_of(prepared)
    said, kl = iter(judged), HeldOut.kl

    def made_up(held_out: HeldOut, student: Any) -> float:
        is_judge = sum(len(batch) for batch, _ in held_out._batches) == 1
        return next(said) if is_judge else kl(held_out, student)

    monkeypatch.setattr(HeldOut, "kl", made_up)
    found, healing = heal(prepared, codes, tmp_path, texts._replace(judged=texts.judged.part(0, 1)))
    assert healing.kept == kept
    assert (found is codes) != kept
    assert (healing.kl_before, healing.kl_after) == judged


def test_training_stops_early_when_it_gets_no_better(tiny_llama: Path, tmp_path: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of((KvQuant(bits=8),)))
    _, codes = planned(prepared)
    _, found = heal(prepared, codes, tmp_path, rate=1.0, steps=60)
    assert found.steps < 60
    assert len(found.watched) == distil.PATIENCE + 1


def test_weights_that_are_no_numbers_any_more_are_taken_back(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = open_prepared(tiny_llama, recipe_of((KvQuant(bits=4),)))
    _, codes = planned(prepared)
    loss = distil._Training._loss
    monkeypatch.setattr(distil._Training, "_loss", lambda *arguments: torch.nan * loss(*arguments))
    kept, found = heal(prepared, codes, tmp_path)
    assert [look.kl for look in found.watched[1:]] == [LOST] * distil.PATIENCE
    assert found.kl_after == found.kl_before
    assert kept is codes
    assert Healing.model_validate_json(found.model_dump_json()) == found


def test_held_out_text_counts_where_its_few_completions_are(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large vocabulary every other token is looked at, but not where none of those counts."""
    monkeypatch.setattr(held_out, "SMALL_VOCABULARY", 0)
    prepared = open_prepared(tiny_llama, recipe_of((KvQuant(bits=4),)))
    _, codes = planned(prepared)
    windows = texts_of(prepared).judged.windows
    counted = np.zeros(windows.shape, bool)
    counted[:, 7] = True  # what is said at place 6
    student = Student(prepared.model, prepared.architecture, codes).model
    assert HeldOut(prepared.model, windows, counted).kl(student) > 0


def test_steps_are_the_same_share_of_a_weight_however_codes_scale_it() -> None:
    rng = np.random.default_rng(0)
    plain = torch.from_numpy(rng.choice([-1.0, 1.0], (6, 4)))
    rows, columns = (torch.from_numpy(10 ** rng.uniform(-3, 3, count)) for count in plain.shape)
    scale = torch.outer(rows, columns)
    found = []
    for by, by_rows in (
        (torch.ones_like(scale), torch.ones_like(rows)),
        (scale, rows * columns.square().mean().sqrt()),
    ):
        weights = {(0, "v.weight"): plain * by, (0, "v.bias"): by_rows.clone()}
        changes = Changes(weights)
        for weight, size in zip(weights.values(), (by, by_rows), strict=True):
            weight.grad = 1 / size
        changes.take_gradients()
        for value in changes.values:
            assert value.grad is not None
            value.data -= 0.1 * value.grad
        changes.apply()
        found.append([weight / size for weight, size in zip(weights.values(), (by, by_rows), strict=True)])
    for weight, scaled in zip(*found, strict=True):
        torch.testing.assert_close(scaled, weight)
    torch.testing.assert_close(found[0][0], plain - 0.1)


def test_steps_that_make_it_worse_are_taken_back_and_made_smaller(tiny_llama: Path, tmp_path: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of((KvQuant(bits=4),)))
    _, codes = planned(prepared)
    _, found = heal(prepared, codes, tmp_path, rate=0.2, steps=48)
    kls = [look.kl for look in found.watched]
    assert kls[1] > kls[0] > min(kls)  # too large at first, and still of use


def test_completions_alone_are_learnt_where_text_has_prompts(tiny_llama: Path, tmp_path: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of((KvQuant(bits=4),)))
    _, codes = planned(prepared)
    texts = texts_of(prepared)
    counted = np.zeros(texts.trained.windows.shape, bool)
    counted[:, 20:] = True
    whole, _ = heal(prepared, codes, tmp_path / "whole", texts)
    masked, _ = heal(prepared, codes, tmp_path / "masked", texts._replace(trained=Text(texts.trained.windows, counted)))
    assert not same(masked, whole)


def test_rate_rises_and_falls() -> None:
    rates = [rate_of(step, 40) for step in range(40)]
    assert rates[:WARM_UP] == [(step + 1) / WARM_UP for step in range(WARM_UP)]
    assert rates[WARM_UP:] == sorted(rates[WARM_UP:], reverse=True)
    assert LAST < rates[-1] < 0.1
    assert [rate_of(step, None) for step in range(WARM_UP)] == rates[:WARM_UP]


def test_budget_of_time_is_counted_in_steps() -> None:
    assert steps_within(600, [20.0, 5.0, 6.0, 5.0], 5.0) == (600 - 12 * 5) // 5
    assert steps_within(1, [20.0, 5.0, 5.0, 5.0], 5.0) == LEAST_STEPS
    assert [step for step in range(1, 26) if is_evaluated(step, 25)] == [3, 6, 9, 12, 15, 18, 21, 24, 25]


def test_every_window_comes_once_in_a_round() -> None:
    seen = np.concatenate([batch_of(step, 6, 2, seed=3) for step in range(6)])
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    assert list(seen[:6]) != list(seen[6:])


def test_time_budget_heals_and_has_what_is_done_around_the_steps(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = open_prepared(tiny_llama, recipe_of((KvQuant(bits=4),)))
    _, codes = planned(prepared)
    now, left = itertools.count(), list[float]()
    monkeypatch.setattr("time.monotonic", lambda: float(next(now)))
    counting = distil.steps_within
    monkeypatch.setattr(distil, "steps_within", lambda *of: left.append(of[0]) or counting(*of))
    _, found = heal(prepared, codes, tmp_path, steps=None, minutes=1)
    # Each look at the clock is a second: two around the judge, two around the first evaluation, and one each at the
    # beginning and before the steps; the judge comes once more in the end.
    assert left == [60 - 5 - 1]
    assert found.steps == 54 - 12


def test_text_is_parted_without_overlap() -> None:
    windows = np.arange(64 * 512).reshape(64, 512)
    parts = parts_of(Text(windows, None))
    assert [len(part.windows) for part in parts] == [48, 8, 8]
    assert np.array_equal(np.concatenate([part.windows for part in parts]), windows)
    with pytest.raises(UsageError, match="3 windows"):
        parts_of(Text(windows[:2], None))
