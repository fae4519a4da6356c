"""Measuring codes in torch: replayed layers change no number, and a trial leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import open_prepared, recipe_of, tokens_of, torch_logits
from support.trials import refitted

from kvslim.caches import FullCache, WindowCache
from kvslim.methods import KvHdc, KvPca
from kvslim.methods.fitting import fit
from kvslim.planning.decide import planned
from kvslim.planning.refit import refit_where_it_pays
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.transform import compensate, kl_evaluator
from kvslim.transform.edits import Codes, LayerEdit
from kvslim.transform.kl_evaluator import KLEvaluator, held_out_windows, probe_windows
from kvslim.transform.recall_trials import AnswerTrials, RecallTrials, chained
from kvslim.transform.surgery import slim_modules, trial
from kvslim.types import LayerPlan, Plan
from kvslim.validation.recall import RecallItem


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def prepared(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> PreparedDecoder:
    return open_prepared(tiny_model(request.param), recipe_of())


def windows_of(prepared: PreparedDecoder, count: int = 3, length: int = 32) -> np.ndarray:
    return np.random.default_rng(7).integers(0, prepared.spec.vocab_size, (count, length))


def codes_of(prepared: PreparedDecoder, **changes: object) -> Codes:
    """All layers alike, with values and keys in half the rank unless said otherwise."""
    cache = FullCache.model_validate({"rank": 8, **changes})
    layers = tuple(LayerPlan(layer=layer, cache=cache) for layer in range(prepared.spec.layers))
    return fit(prepared.spec, prepared.statistics, Plan(layers=layers))


def answers_of(prepared: PreparedDecoder, items: Sequence[RecallItem]) -> AnswerTrials:
    return AnswerTrials(prepared.model, prepared.architecture, items)


def short_answers(prepared: PreparedDecoder) -> list[RecallItem]:
    """Of two texts, one answer of two tokens and one of one."""
    first, second = (tuple(window) for window in windows_of(prepared)[:2].tolist())
    return [RecallItem(first[:10], first[10:12]), RecallItem(second[:10], second[10:11])]


def probabilities_of(prepared: PreparedDecoder, items: Sequence[RecallItem]) -> list[float]:
    """What a whole pass over each text says of its answer."""
    found = []
    for item in items:
        said = torch.from_numpy(torch_logits(prepared, np.array(item.prompt + item.answer))).softmax(-1)
        places = range(len(item.prompt) - 1, len(item.prompt) + len(item.answer) - 1)
        found.append(float(np.mean([said[place, token] for place, token in zip(places, item.answer, strict=True)])))
    return found


def evaluator_of(prepared: PreparedDecoder, windows: np.ndarray) -> KLEvaluator:
    return KLEvaluator(prepared.model, prepared.architecture, windows)


def divergence(plain: np.ndarray, slim: np.ndarray) -> float:
    logs = [torch.from_numpy(logits).double().log_softmax(-1) for logits in (plain, slim)]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


def test_kl_is_zero_when_nothing_is_coded(prepared: PreparedDecoder) -> None:
    assert evaluator_of(prepared, windows_of(prepared)).kl((LayerEdit(),) * prepared.spec.layers) == 0.0


def test_kl_is_that_of_the_logits(prepared: PreparedDecoder) -> None:
    windows, codes = windows_of(prepared), codes_of(prepared, rotation=0, stored="int4")
    plain = [torch_logits(prepared, window) for window in windows]
    with trial(prepared.model, prepared.architecture, codes):
        slim = [torch_logits(prepared, window) for window in windows]
    expected = np.mean([divergence(*pair) for pair in zip(plain, slim, strict=True)])
    assert expected > 1e-3
    assert evaluator_of(prepared, windows).kl(codes) == pytest.approx(expected, rel=1e-4)


def test_replayed_layers_give_the_number_of_a_full_run(
    prepared: PreparedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes of the last layer alone: all layers before it are replayed, then none."""
    bare, last = (LayerEdit(),) * (prepared.spec.layers - 1), codes_of(prepared)[-1]
    monkeypatch.setattr(kl_evaluator, "BATCH", 40)  # of the windows of 32 tokens one at a time
    evaluator, runs = evaluator_of(prepared, windows_of(prepared)), []
    evaluator.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    replayed = evaluator.kl((*bare, last))
    assert replayed > 0
    assert runs == [1] * 3  # called, but to hand out what it gave before
    monkeypatch.setattr(kl_evaluator, "replaying", lambda *_: torch.inference_mode())
    assert evaluator.kl((*bare, last)) == pytest.approx(replayed, rel=1e-6)


def test_kl_is_repeatable_when_another_trial_lies_between(prepared: PreparedDecoder) -> None:
    evaluator = evaluator_of(prepared, windows_of(prepared))
    one, other = codes_of(prepared), codes_of(prepared, rotation=0, stored="int4")
    first = evaluator.kl(one)
    assert evaluator.kl(other) != first
    assert evaluator.kl(one) == first


def test_model_is_as_before_after_a_trial(prepared: PreparedDecoder) -> None:
    tokens, codes = tokens_of(prepared), codes_of(prepared, rotation=0, stored="int4", centred=True)
    before = torch_logits(prepared, tokens)
    with trial(prepared.model, prepared.architecture, codes):
        assert np.abs(torch_logits(prepared, tokens) - before).max() > 1e-3
    np.testing.assert_array_equal(torch_logits(prepared, tokens), before)


def test_attention_keeps_nothing_of_a_text_behind(prepared: PreparedDecoder) -> None:
    torch_logits(prepared, tokens_of(prepared))
    assert all(slim.hidden is None for slim in slim_modules(prepared.model, prepared.architecture))


def test_model_is_as_before_when_a_trial_or_its_installation_fails(prepared: PreparedDecoder) -> None:
    tokens, codes = tokens_of(prepared), codes_of(prepared)
    before = torch_logits(prepared, tokens)
    with pytest.raises(KeyError), trial(prepared.model, prepared.architecture, codes):
        raise KeyError
    np.testing.assert_array_equal(torch_logits(prepared, tokens), before)
    broken = (*codes[:-1], codes[-1].coded(value_decoder=None))
    with pytest.raises(ValueError, match="value code"), trial(prepared.model, prepared.architecture, broken):
        pytest.fail("such codes cannot be installed")
    np.testing.assert_array_equal(torch_logits(prepared, tokens), before)


def test_recall_is_whole_when_answers_are_what_the_model_says(prepared: PreparedDecoder) -> None:
    prompts = [tuple(window) for window in windows_of(prepared).tolist()]
    said = [int(torch_logits(prepared, np.array(prompt))[-1].argmax()) for prompt in prompts]
    right = [RecallItem(prompt, (answer,)) for prompt, answer in zip(prompts, said, strict=True)]
    wrong = [RecallItem(prompt, ((answer + 1) % 200,)) for prompt, answer in zip(prompts, said, strict=True)]
    found = [RecallTrials(prepared.model, prepared.architecture, items).plain for items in (right, wrong)]
    assert found == [1.0, 0.0]


def test_answers_have_the_probability_that_the_model_gives_them(prepared: PreparedDecoder) -> None:
    items = short_answers(prepared)
    np.testing.assert_allclose(answers_of(prepared, items).plain, probabilities_of(prepared, items), rtol=1e-4)


def test_probabilities_with_codes_are_those_of_the_whole_model(prepared: PreparedDecoder) -> None:
    """What lies before the first changed layer is not run again."""
    items = short_answers(prepared)
    trials = answers_of(prepared, items)
    codes = tuple(code if layer == 1 else LayerEdit() for layer, code in enumerate(codes_of(prepared)))
    with trial(prepared.model, prepared.architecture, codes):
        expected = probabilities_of(prepared, items)
    assert trials.probabilities(codes) == pytest.approx(expected, rel=1e-4)
    assert trials.probabilities(codes) != pytest.approx(trials.plain, rel=1e-3)
    assert trials.probabilities(tuple(LayerEdit() for _ in codes)) == trials.plain


@pytest.mark.parametrize(
    ("after", "lost"),
    [
        ([0.5, 0.5, 0.5, 0.5], 0.0),
        ([0.4, 0.4, 0.4, 0.4], 0.1),
        ([0.9, 0.1, 0.9, 0.3], 0.2061),
        ([0.6, 0.6, 0.6, 0.6], 0.0),
    ],
)
def test_answers_that_differ_count_as_a_possible_loss(
    prepared: PreparedDecoder, monkeypatch: pytest.MonkeyPatch, after: list[float], lost: float
) -> None:
    """In the third case they gain, by 0.05 in the mean, and nobody knows of other questions."""
    items = [RecallItem((1, 2), (3,))] * 4
    trials = answers_of(prepared, items)
    monkeypatch.setattr(AnswerTrials, "plain", [0.5] * 4)
    monkeypatch.setattr(AnswerTrials, "probabilities", lambda *_: after)
    assert trials.drop((LayerEdit(),)) == pytest.approx(lost, abs=1e-4)


def test_a_layer_moves_answers_as_far_as_what_it_forgets(prepared: PreparedDecoder) -> None:
    """Where the window holds all that an answer is predicted from, nothing moves."""
    text = tuple(windows_of(prepared, count=1).ravel().tolist())
    items = [RecallItem(text[:length], (1, 2)) for length in (6, 28)]
    trials = answers_of(prepared, items)
    edit = LayerEdit(cache=WindowCache(window=8, sinks=2))
    shifts = trials.shifts(edit, [1])
    assert list(shifts) == [1]
    codes = tuple(edit if layer == 1 else LayerEdit() for layer in range(prepared.spec.layers))
    states = []
    for each in (tuple(LayerEdit() for _ in codes), codes):
        kept: list[Any] = []
        hook = trials.layers[1].register_forward_hook(lambda *call, kept=kept: kept.append(call[2]))
        with trial(prepared.model, prepared.architecture, each):
            for tokens, _ in trials.texts:
                torch_logits(prepared, tokens.numpy())
        hook.remove()
        near, far = (each[0] if isinstance(each, tuple) else each for each in kept)
        states.append(torch.cat([near[0, 5:7], far[0, 27:29]]))
    plain, changed = states
    moved = (changed - plain).norm(dim=-1) / plain.norm(dim=-1)
    assert moved[:2].max() < 1e-5
    assert moved[2:].min() > 1e-4
    assert shifts[1] == pytest.approx(float(moved.mean()), rel=1e-4)


def test_questions_of_one_text_are_asked_in_one_run() -> None:
    text = tuple(range(20))
    items = [RecallItem((*text, 50, 51), (60, 61)), RecallItem((*text, 52, 53), (62,)), RecallItem((7, 8), (9,))]
    (shared, answers), (alone, answer) = chained(items)
    assert shared.tolist() == [*text, 50, 51, 60, 61, 52, 53, 62]
    assert [shared[places].tolist() for places in answers] == [[60, 61], [62]]
    assert (alone.tolist(), [places.tolist() for places in answer]) == ([7, 8, 9], [[2]])


def test_probe_windows_are_fewer_when_the_model_is_larger() -> None:
    windows = np.zeros((500, 600), np.int64)
    models = (2, False), (6, False), (32, False), (6, True), (22, True)
    assert [probe_windows(windows, layers, large=large).shape for layers, large in models] == [
        (64, 512),
        (7, 512),
        (2, 256),
        (7, 512),
        (1, 256),
    ]


def test_held_out_windows_are_fewer_when_the_vocabulary_is_larger() -> None:
    windows = np.zeros((500, 512), np.int64)
    assert [held_out_windows(windows, size).shape for size in (300, 50_000, 150_000)] == [(8, 512), (2, 512), (2, 512)]
    long = np.zeros((5, 4096), np.int64)
    assert [held_out_windows(long, size).shape for size in (300, 150_000)] == [(1, 4096), (1, 4096)]


def test_logits_are_compared_in_pieces_and_never_copied(
    prepared: PreparedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = KLEvaluator(prepared.model, prepared.architecture, windows_of(prepared)).kl(codes_of(prepared))
    seen: list[int] = []
    log_softmax = torch.Tensor.log_softmax
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda self, dim: seen.append(len(self)) or log_softmax(self, dim))
    monkeypatch.setattr(kl_evaluator, "COMPARED", 5 * prepared.spec.vocab_size)
    pieces = KLEvaluator(prepared.model, prepared.architecture, windows_of(prepared)).kl(codes_of(prepared))
    assert max(seen) == 5
    assert pieces == pytest.approx(whole, rel=1e-9)


def test_tokens_that_do_not_count_are_not_judged(prepared: PreparedDecoder) -> None:
    windows, codes = windows_of(prepared), codes_of(prepared)
    counted = np.random.default_rng(1).random(windows.shape) < 0.3
    plain = [torch_logits(prepared, window) for window in windows]
    with trial(prepared.model, prepared.architecture, codes):
        slim = [torch_logits(prepared, window) for window in windows]
    kept = [  # a token is predicted at the place before it
        np.concatenate([logits[:-1][after[1:]] for logits, after in zip(side, counted, strict=True)])
        for side in (plain, slim)
    ]
    evaluator = KLEvaluator(prepared.model, prepared.architecture, windows, counted)
    assert evaluator.kl(codes) == pytest.approx(divergence(*kept), rel=1e-4)
    assert evaluator.kl(codes) != pytest.approx(evaluator_of(prepared, windows).kl(codes), rel=1e-3)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_tokens_are_judged_when_all_count_or_none(prepared: PreparedDecoder, share: float) -> None:
    windows, codes = windows_of(prepared), codes_of(prepared)
    evaluator = KLEvaluator(prepared.model, prepared.architecture, windows, np.full(windows.shape, bool(share)))
    assert evaluator.kl(codes) == evaluator_of(prepared, windows).kl(codes)


def test_probing_judges_every_other_token_of_a_large_vocabulary(
    prepared: PreparedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows, codes = windows_of(prepared), codes_of(prepared)
    monkeypatch.setattr(kl_evaluator, "SMALL_VOCABULARY", 1)
    evaluator = KLEvaluator(prepared.model, prepared.architecture, windows, probing=True)
    plain = [torch_logits(prepared, window) for window in windows]
    with trial(prepared.model, prepared.architecture, codes):
        slim = [torch_logits(prepared, window) for window in windows]
    every_other = [divergence(*(logits[1::2] for logits in pair)) for pair in zip(plain, slim, strict=True)]
    assert evaluator.kl(codes) == pytest.approx(np.mean(every_other), rel=1e-4)


def test_probing_judges_all_tokens_when_none_that_count_is_among_every_other(
    prepared: PreparedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows, codes = windows_of(prepared), codes_of(prepared)
    counted = np.zeros(windows.shape, bool)
    counted[:, 5] = True  # is predicted at place 4
    expected = KLEvaluator(prepared.model, prepared.architecture, windows, counted).kl(codes)
    monkeypatch.setattr(kl_evaluator, "SMALL_VOCABULARY", 1)
    probing = KLEvaluator(prepared.model, prepared.architecture, windows, counted, probing=True)
    assert probing.kl(codes) == pytest.approx(expected, rel=1e-6)


def test_refitted_outputs_lower_the_kl_on_the_text_they_were_fitted_to(prepared: PreparedDecoder) -> None:
    windows, codes = windows_of(prepared, 16, 64), codes_of(prepared)
    again = refitted(prepared, codes, windows)
    evaluator = evaluator_of(prepared, windows)
    assert 0 < evaluator.kl(again) < 0.9 * evaluator.kl(codes)


def test_refitting_leaves_layers_without_codes_alone(prepared: PreparedDecoder) -> None:
    windows = windows_of(prepared)
    tokens, before = tokens_of(prepared), torch_logits(prepared, tokens_of(prepared))
    none = (LayerEdit(),) * prepared.spec.layers
    assert refitted(prepared, none, windows) == none
    mixed = (LayerEdit(), *codes_of(prepared)[1:])
    again = refitted(prepared, mixed, windows)
    assert [code.output is None for code in again] == [True, *[False] * (prepared.spec.layers - 1)]
    np.testing.assert_array_equal(torch_logits(prepared, tokens), before)


def test_refitting_changes_nothing_when_the_codes_lose_nothing(prepared: PreparedDecoder) -> None:
    windows, full = windows_of(prepared), codes_of(prepared, rank=16)
    evaluator = evaluator_of(prepared, windows)
    assert evaluator.kl(refitted(prepared, full, windows)) < 1e-7


def test_layers_run_one_by_one_give_what_the_model_gives(prepared: PreparedDecoder) -> None:
    ids = torch.from_numpy(tokens_of(prepared)[None])
    model, architecture = prepared.model, prepared.architecture
    last = model.get_submodule(architecture.layers)[-1]
    with trial(model, architecture, codes_of(prepared)):
        given: object = None
        for layer in range(prepared.spec.layers):
            one = compensate._Refit(model, architecture, layer, layer, [], {})
            given = one._run(ids, given, "output").output
        seen: list[object] = []
        hook = last.register_forward_hook(lambda *call: seen.append(call[2]))
        model(input_ids=ids, use_cache=False)
        hook.remove()
    torch.testing.assert_close(given, seen[0])


def test_compensation_stays_off_when_it_does_not_help(
    prepared: PreparedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    statistics = prepared.statistics
    plan = KvHdc(bits=4).decide(prepared.spec, statistics, Plan.identity(prepared.spec))
    trials = prepared.trials()
    codes = trials.codes(plan)
    monkeypatch.setattr(trials, "refitting", lambda _: iter([codes]))
    kept, kl = refit_where_it_pays(trials, plan)
    assert kept == plan
    assert kl > 0
    monkeypatch.setattr(trials, "refitting", lambda _: iter([tuple(LayerEdit() for _ in codes)]))
    refit, better = refit_where_it_pays(trials, plan)
    assert better == 0.0
    assert all(layer.refit and "100%" in layer.reason for layer in refit.layers)


def test_compensation_ends_half_way_where_it_loses(prepared: PreparedDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = tuple(layer.with_cache(stored="int4", rank=16) for layer in Plan.identity(prepared.spec).layers)
    plan = Plan(layers=layers)
    trials, done = prepared.trials(), []
    worse = trials.codes(Plan(layers=tuple(layer.with_cache(stored="int4", rank=8) for layer in layers)))

    def refitting(codes: Any) -> Iterator[Any]:
        for layer in range(prepared.spec.layers):
            done.append(layer)
            yield (*worse[: layer + 1], *codes[layer + 1 :])

    monkeypatch.setattr(trials, "refitting", refitting)
    assert refit_where_it_pays(trials, plan) == (plan, trials.loss(trials.codes(plan)))
    assert done == list(range(prepared.spec.layers // 2))


@pytest.mark.parametrize(("cache", "tried"), [({"stored": "int8"}, False), ({"stored": "int8", "rank": 8}, True)])
def test_compensation_is_not_tried_when_whole_caches_are_rounded_to_8_bits(
    prepared: PreparedDecoder, monkeypatch: pytest.MonkeyPatch, cache: dict[str, Any], tried: bool
) -> None:
    layers = tuple(layer.with_cache(**cache) for layer in Plan.identity(prepared.spec).layers)
    trials, asked = prepared.trials(), []
    monkeypatch.setattr(trials, "refitting", lambda codes: asked.append(codes) or iter([codes]))
    plan, kl = refit_where_it_pays(trials, Plan(layers=layers))
    assert plan.layers == layers
    assert kl > 0
    assert bool(asked) is tried


def test_compensation_stays_off_when_the_recipe_says_so(
    prepared: PreparedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"compensate": False, "methods": (KvPca(rank=8),)}
    monkeypatch.setattr(prepared, "recipe", prepared.recipe.model_copy(update=changes))
    summary = planned(prepared)
    assert [(layer.cache, layer.refit) for layer in summary.plan.layers] == [
        (FullCache(rank=8), False)
    ] * prepared.spec.layers
    assert summary.kl > 0


def test_uncompressed_plan_is_not_compensated(prepared: PreparedDecoder) -> None:
    plan = Plan.identity(prepared.spec)
    assert refit_where_it_pays(prepared.trials(), plan) == (plan, 0.0)
