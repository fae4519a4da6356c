"""Judging codes in torch: replayed layers change no number, and a trial leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import open_workshop, recipe_of, tokens_of, torch_logits

from kvslim.methods import KvHdc
from kvslim.methods.fitting import fit
from kvslim.transform import compensate
from kvslim.transform import judge as judge_module
from kvslim.transform.edits import LayerEdit
from kvslim.transform.judge import Judge, judged_windows, probe_windows
from kvslim.transform.surgery import trial
from kvslim.types import LayerPlan, Plan
from kvslim.validate.recall import RecallItem
from kvslim.workshop import Workshop

Codes = tuple[LayerEdit, ...]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def workshop(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Workshop:
    return open_workshop(tiny_model(request.param), recipe_of())


def windows_of(workshop: Workshop, count: int = 3, length: int = 32) -> np.ndarray:
    return np.random.default_rng(7).integers(0, workshop.spec.vocab_size, (count, length))


def codes_of(workshop: Workshop, **layer: object) -> Codes:
    """All layers alike, with values and keys in half the rank unless said otherwise."""
    entries = {"rank": 8, **layer}
    layers = tuple(LayerPlan.model_validate({"layer": i, **entries}) for i in range(workshop.spec.layers))
    return fit(workshop.spec, workshop.statistics(), Plan(layers=layers))


def judge_of(workshop: Workshop, windows: np.ndarray) -> Judge:
    return Judge(workshop.model, workshop.architecture, windows)


def refitted_on(workshop: Workshop, codes: Codes, windows: np.ndarray) -> Codes:
    return compensate.refitted(workshop.model, workshop.architecture, codes, windows, iter)


def divergence(plain: np.ndarray, slim: np.ndarray) -> float:
    logs = [torch.from_numpy(logits).double().log_softmax(-1) for logits in (plain, slim)]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


def test_kl_is_zero_when_nothing_is_coded(workshop: Workshop) -> None:
    assert judge_of(workshop, windows_of(workshop)).kl((LayerEdit(),) * workshop.spec.layers) == 0.0


def test_kl_is_that_of_the_logits(workshop: Workshop) -> None:
    windows, codes = windows_of(workshop), codes_of(workshop, roles=0, cache="int4")
    plain = [torch_logits(workshop, window) for window in windows]
    with trial(workshop.model, workshop.architecture, codes):
        slim = [torch_logits(workshop, window) for window in windows]
    expected = np.mean([divergence(*pair) for pair in zip(plain, slim, strict=True)])
    assert expected > 1e-3
    assert judge_of(workshop, windows).kl(codes) == pytest.approx(expected, rel=1e-4)


def test_replayed_layers_give_the_number_of_a_full_run(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of the last layer alone: all layers before it are replayed, then none."""
    bare, last = (LayerEdit(),) * (workshop.spec.layers - 1), codes_of(workshop)[-1]
    monkeypatch.setattr(judge_module, "BATCH", 40)  # of the windows of 32 tokens one at a time
    judge, runs = judge_of(workshop, windows_of(workshop)), []
    judge.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    replayed = judge.kl((*bare, last))
    assert replayed > 0
    assert runs == [1] * 3  # called, but to hand out what it gave before
    monkeypatch.setattr(judge_module, "replaying", lambda *_: torch.inference_mode())
    assert judge.kl((*bare, last)) == pytest.approx(replayed, rel=1e-6)


def test_kl_is_repeatable_when_another_trial_lies_between(workshop: Workshop) -> None:
    judge = judge_of(workshop, windows_of(workshop))
    one, other = codes_of(workshop), codes_of(workshop, roles=0, cache="int4")
    first = judge.kl(one)
    assert judge.kl(other) != first
    assert judge.kl(one) == first


def test_model_is_as_before_after_a_trial(workshop: Workshop) -> None:
    tokens, codes = tokens_of(workshop), codes_of(workshop, roles=0, cache="int4", centred=True)
    before = torch_logits(workshop, tokens)
    with trial(workshop.model, workshop.architecture, codes):
        assert np.abs(torch_logits(workshop, tokens) - before).max() > 1e-3
    np.testing.assert_array_equal(torch_logits(workshop, tokens), before)


def test_model_is_as_before_when_a_trial_or_its_installation_fails(workshop: Workshop) -> None:
    tokens, codes = tokens_of(workshop), codes_of(workshop)
    before = torch_logits(workshop, tokens)
    with pytest.raises(KeyError), trial(workshop.model, workshop.architecture, codes):
        raise KeyError
    np.testing.assert_array_equal(torch_logits(workshop, tokens), before)
    broken = (*codes[:-1], replace(codes[-1], value_decoder=None))
    with pytest.raises(ValueError, match="value code"), trial(workshop.model, workshop.architecture, broken):
        pytest.fail("such codes cannot be installed")
    np.testing.assert_array_equal(torch_logits(workshop, tokens), before)


def test_recall_is_whole_when_answers_are_what_the_model_says(workshop: Workshop) -> None:
    judge = judge_of(workshop, windows_of(workshop))
    prompts = [tuple(window) for window in windows_of(workshop).tolist()]
    said = [int(torch_logits(workshop, np.array(prompt))[-1].argmax()) for prompt in prompts]
    right = [RecallItem(prompt, (answer,)) for prompt, answer in zip(prompts, said, strict=True)]
    wrong = [RecallItem(prompt, ((answer + 1) % 200,)) for prompt, answer in zip(prompts, said, strict=True)]
    assert (judge.recall((), right), judge.recall((), wrong)) == (1.0, 0.0)


def test_probe_windows_are_fewer_when_the_model_is_larger() -> None:
    windows = np.zeros((500, 600), np.int64)
    assert [probe_windows(windows, layers).shape for layers in (2, 6, 32)] == [(64, 512), (7, 512), (2, 256)]


def test_judged_windows_are_fewer_when_the_vocabulary_is_larger() -> None:
    windows = np.zeros((500, 512), np.int64)
    assert [judged_windows(windows, size).shape for size in (300, 50_000, 150_000)] == [(8, 512), (5, 512), (2, 512)]
    long = np.zeros((5, 4096), np.int64)
    assert [judged_windows(long, size).shape for size in (300, 150_000)] == [(1, 4096), (1, 4096)]


def test_tokens_that_do_not_count_are_not_judged(workshop: Workshop) -> None:
    windows, codes = windows_of(workshop), codes_of(workshop)
    counted = np.random.default_rng(1).random(windows.shape) < 0.3
    plain = [torch_logits(workshop, window) for window in windows]
    with trial(workshop.model, workshop.architecture, codes):
        slim = [torch_logits(workshop, window) for window in windows]
    kept = [  # a token is predicted at the place before it
        np.concatenate([logits[:-1][after[1:]] for logits, after in zip(side, counted, strict=True)])
        for side in (plain, slim)
    ]
    judge = Judge(workshop.model, workshop.architecture, windows, counted)
    assert judge.kl(codes) == pytest.approx(divergence(*kept), rel=1e-4)
    assert judge.kl(codes) != pytest.approx(judge_of(workshop, windows).kl(codes), rel=1e-3)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_tokens_are_judged_when_all_count_or_none(workshop: Workshop, share: float) -> None:
    windows, codes = windows_of(workshop), codes_of(workshop)
    judge = Judge(workshop.model, workshop.architecture, windows, np.full(windows.shape, bool(share)))
    assert judge.kl(codes) == judge_of(workshop, windows).kl(codes)


def test_probing_judges_every_other_token_of_a_large_vocabulary(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows, codes = windows_of(workshop), codes_of(workshop)
    monkeypatch.setattr(judge_module, "SMALL_VOCABULARY", 1)
    judge = Judge(workshop.model, workshop.architecture, windows, probing=True)
    plain = [torch_logits(workshop, window) for window in windows]
    with trial(workshop.model, workshop.architecture, codes):
        slim = [torch_logits(workshop, window) for window in windows]
    every_other = [divergence(*(logits[1::2] for logits in pair)) for pair in zip(plain, slim, strict=True)]
    assert judge.kl(codes) == pytest.approx(np.mean(every_other), rel=1e-4)


def test_refitted_outputs_lower_the_kl_on_the_text_they_were_fitted_to(workshop: Workshop) -> None:
    windows, codes = windows_of(workshop, 16, 64), codes_of(workshop)
    again = refitted_on(workshop, codes, windows)
    judge = judge_of(workshop, windows)
    assert 0 < judge.kl(again) < 0.9 * judge.kl(codes)


def test_refitting_leaves_layers_without_codes_alone(workshop: Workshop) -> None:
    windows = windows_of(workshop)
    tokens, before = tokens_of(workshop), torch_logits(workshop, tokens_of(workshop))
    none = (LayerEdit(),) * workshop.spec.layers
    assert refitted_on(workshop, none, windows) == none
    mixed = (LayerEdit(), *codes_of(workshop)[1:])
    again = refitted_on(workshop, mixed, windows)
    assert [code.output_weight is None for code in again] == [True, *[False] * (workshop.spec.layers - 1)]
    np.testing.assert_array_equal(torch_logits(workshop, tokens), before)


def test_refitting_changes_nothing_when_the_codes_lose_nothing(workshop: Workshop) -> None:
    windows, full = windows_of(workshop), codes_of(workshop, rank=16)
    judge = judge_of(workshop, windows)
    assert judge.kl(refitted_on(workshop, full, windows)) < 1e-7


def test_layers_run_one_by_one_give_what_the_model_gives(workshop: Workshop) -> None:
    ids = torch.from_numpy(tokens_of(workshop)[None])
    model, architecture = workshop.model, workshop.architecture
    last = model.get_submodule(architecture.layers)[-1]
    with trial(model, architecture, codes_of(workshop)):
        given: object = None
        for layer in range(workshop.spec.layers):
            one = compensate._Refit(model, architecture, layer, layer, [], {})
            given = one._run(ids, given, "output").output
        seen: list[object] = []
        hook = last.register_forward_hook(lambda *call: seen.append(call[2]))
        model(input_ids=ids, use_cache=False)
        hook.remove()
    torch.testing.assert_close(given, seen[0])


def test_compensation_stays_off_when_it_does_not_help(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = workshop.statistics()
    plan = KvHdc(bits=4).decide(workshop.spec, statistics, Plan.identity(workshop.spec))
    codes = workshop.codes(statistics, plan)
    monkeypatch.setattr(workshop, "refitted", lambda *_: codes)
    kept, kl = workshop.compensated(statistics, workshop.held_out_judge(statistics), plan)
    assert kept == plan
    assert kl > 0
    monkeypatch.setattr(workshop, "refitted", lambda *_: tuple(LayerEdit() for _ in codes))
    refit, better = workshop.compensated(statistics, workshop.held_out_judge(statistics), plan)
    assert better == 0.0
    assert all(layer.refit and "100%" in layer.reason for layer in refit.layers)


def test_compensation_stays_off_when_the_recipe_says_so(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = workshop.statistics()
    plan = Plan(layers=tuple(LayerPlan(layer=layer, rank=8) for layer in range(workshop.spec.layers)))
    monkeypatch.setattr(workshop, "recipe", workshop.recipe.model_copy(update={"compensate": False}))
    kept, kl = workshop.compensated(statistics, workshop.held_out_judge(statistics), plan)
    assert kept == plan
    assert kl > 0


def test_uncompressed_plan_is_not_compensated(workshop: Workshop) -> None:
    plan, statistics = Plan.identity(workshop.spec), workshop.statistics()
    assert workshop.compensated(statistics, workshop.held_out_judge(statistics), plan) == (plan, 0.0)
