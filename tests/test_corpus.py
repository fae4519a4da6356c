"""Where calibration and validation text comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.models import open_prepared, recipe_of
from support.tiny_graph import write_tiny

from kvslim.calibrate import own_text
from kvslim.calibrate.corpus import loss_mask, text_windows
from kvslim.calibrate.own_text import OwnText, self_windows
from kvslim.calibrate.text_source import check_source, source_digest
from kvslim.errors import UnsupportedError, UsageError
from kvslim.methods import KvQuant
from kvslim.prepared.text import TextSource
from kvslim.progress import Silent
from kvslim.runtime.session import DecodeSession
from kvslim.settings import Calibration, TextUse, Validation
from kvslim.transform.recall_trials import chained
from kvslim.validation.measure import DecoderEvaluation
from kvslim.validation.recall import capacity_for


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return open_prepared(tiny_llama, recipe_of()).tokenizer


def test_windows_are_spread_over_the_text(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number:04d} " for number in range(1000)))
    windows = text_windows(str(path), tokenizer, samples=5, length=50)
    assert windows.shape == (5, 50)
    texts = [tokenizer.decode(window) for window in windows]
    assert texts[0].startswith("0000")
    assert texts[-1].endswith("0999 ")
    assert len(set(texts)) == 5


def test_windows_are_fewer_when_text_is_short(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 12)
    assert text_windows(str(path), tokenizer, samples=64, length=50).shape == (2, 50)


def test_shares_of_one_text_do_not_overlap(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a" * 800 + "b" * 200)
    first = text_windows(str(path), tokenizer, samples=99, length=20, share=(0.0, 0.8))
    last = text_windows(str(path), tokenizer, samples=99, length=20, share=(0.8, 1.0))
    assert set(tokenizer.decode(first.ravel())) == {"a"}
    assert set(tokenizer.decode(last.ravel())) == {"b"}


def test_one_file_for_both_uses_is_split(tmp_path: Path, tiny_llama: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a" * 800 + "b" * 200)
    recipe = recipe_of().model_copy(
        update={
            "calibration": Calibration(source=str(path), samples=4, length=40),
            "validation": Validation(source=str(path), samples=4, length=40),
        }
    )
    prepared = open_prepared(tiny_llama, recipe)
    texts = [
        prepared.tokenizer.decode(windows.reshape(-1), skip_special_tokens=True)
        for windows in (prepared.text.calibration_windows, prepared.text.held_out_windows)
    ]
    assert [set(text) for text in texts] == [{"a"}, {"b"}]


def test_jsonl_gives_texts_and_completed_prompts(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "text.jsonl"
    records = [{"text": "abcd" * 5}, {"prompt": "efgh" * 5, "completion": "ijkl" * 5}]
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    (window,) = text_windows(str(path), tokenizer, samples=1, length=60)
    assert tokenizer.decode(window) == "abcd" * 5 + "\n\n" + "efgh" * 5 + "ijkl" * 4 + "ij"


def test_completions_alone_count(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "text.jsonl"
    records = [{"text": "abcd"}, {"prompt": "efgh", "completion": "ijkl"}, {"prompt": "mn", "completion": "op"}]
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    sizes = {"samples": 1, "length": 20}
    (window,), (counted,) = (part(str(path), tokenizer, **sizes) for part in (text_windows, loss_mask))
    assert tokenizer.decode(window) == "abcd\n\nefghijkl\n\nmnop"
    assert tokenizer.decode(window[counted]) == "abcdijklop"


def test_windows_and_what_counts_of_them_are_cut_alike(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"prompt": "p" * n, "completion": "c" * n}) + "\n" for n in range(1, 40)))
    sizes = {"samples": 7, "length": 33, "share": (0.2, 0.9)}
    windows, counted = (part(str(path), tokenizer, **sizes) for part in (text_windows, loss_mask))
    assert windows.shape == counted.shape == (7, 33)
    assert set(tokenizer.decode(windows[counted])) == {"c"}
    assert "c" not in tokenizer.decode(windows[~counted])


def test_digest_tells_a_prompt_from_a_completion(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text(json.dumps({"prompt": "ab", "completion": "c"}))
    second.write_text(json.dumps({"prompt": "a", "completion": "bc"}))
    assert source_digest(str(first)) != source_digest(str(second))


def test_self_samples_repeat_when_the_seed_does(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model.onnx")
    draw = lambda seed: self_windows(tmp_path, 5, [OwnText(11, 20, seed)], Silent())[0]  # noqa: E731
    first, again, other = draw(0), draw(0), draw(1)
    assert first.shape == (11, 20)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert (first[:, 0] == 5).all()
    assert len(np.unique(first, axis=0)) == 11


def test_a_self_sample_is_the_same_whatever_else_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other texts beside it, shorter or longer, and fewer windows at once."""
    write_tiny(tmp_path / "model.onnx")
    wanted, other = OwnText(5, 20, 3), OwnText(4, 30, 1)
    (alone,) = self_windows(tmp_path, 5, [wanted], Silent())
    monkeypatch.setattr(own_text, "SELF_BATCH", 4)
    beside = self_windows(tmp_path, 5, [other, wanted], Silent())
    assert [found.shape for found in beside] == [(4, 30), (5, 20)]
    np.testing.assert_array_equal(beside[1], alone)
    np.testing.assert_array_equal(beside[0], self_windows(tmp_path, 5, [other], Silent())[0])


def test_self_samples_keep_to_the_memory_for_their_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path / "model.onnx")
    row = DecodeSession(tmp_path, capacity=20).layout.bytes_at(20)
    monkeypatch.setattr(own_text, "usable_memory", lambda: 3 * row * own_text.CACHE_SHARE)
    allocated = list[int]()
    allocate = DecodeSession.allocate
    monkeypatch.setattr(
        DecodeSession, "allocate", lambda session, batch: (allocated.append(batch), allocate(session, batch))[1]
    )
    (windows,) = self_windows(tmp_path, 5, [OwnText(8, 20, 0)], Silent())
    assert windows.shape == (8, 20)
    assert max(allocated) == 3


def test_self_samples_follow_the_models_own_distribution(tmp_path: Path) -> None:
    """Frequencies of the second token, and of the third after the most frequent second one."""
    graph = write_tiny(tmp_path / "model.onnx")
    (windows,) = self_windows(tmp_path, 5, [OwnText(4000, 3, 0)], Silent())
    session = DecodeSession(graph, capacity=2)
    for context in ([5], [5, int(np.bincount(windows[:, 1]).argmax())]):
        session.reset()
        logits = session.step(context)[-1]
        expected = np.exp(logits) / np.exp(logits).sum()
        following = windows[(windows[:, : len(context)] == context).all(1), len(context)]
        found = np.bincount(following, minlength=24) / len(following)
        error = np.sqrt(expected * (1 - expected) / len(following))
        assert (np.abs(found - expected) < 4 * error + 1e-3).all()


@pytest.mark.parametrize("use", ["calibration", "validation"])
def test_text_that_is_too_short_is_refused_before_weights_are_read(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: TextUse
) -> None:
    (tmp_path / "text.txt").write_text("A few words.")
    recipe = recipe_of([KvQuant()])
    short = getattr(recipe, use).model_copy(update={"source": str(tmp_path / "text.txt")})
    monkeypatch.setattr("kvslim.prepared.decoder.load_model", lambda _: pytest.fail("weights were read"))
    with pytest.raises(UsageError, match="less than one window"):
        open_prepared(tiny_llama, recipe.model_copy(update={use: short}), use)


def test_decoder_calibrates_on_its_own_text_when_the_source_is_self(tiny_llama: Path) -> None:
    prepared = open_prepared(tiny_llama, recipe_of())
    windows = prepared.text.calibration_windows
    assert windows.shape == (4, 48)
    assert len(np.unique(windows[:, 1:])) > 10
    np.testing.assert_array_equal(windows, prepared.text.calibration_windows)
    assert not np.array_equal(windows[:2], prepared.text.held_out_windows)


@pytest.mark.parametrize(
    ("source", "context", "expected"), [("self", 100, 96), ("text", 100, 96), ("text", 4096, 192), ("self", 64, 0)]
)
def test_held_out_text_reaches_the_target_context(
    tiny_llama: Path, tmp_path: Path, source: str, context: int, expected: int
) -> None:
    if source == "text":
        source = str(tmp_path / "text.txt")
        Path(source).write_text(" ".join(f"word{number}" for number in range(3000)), encoding="utf-8")
    validation = Validation(source=source, samples=6, length=32, recall_items=9, recall_distance=16)
    update = {"calibration": Calibration(context=context), "validation": validation}
    evaluation = open_prepared(tiny_llama, recipe_of().model_copy(update=update)).evaluation()
    assert [len(window) for window in evaluation.windows] == [32] * 6 + [expected] * bool(expected)
    np.testing.assert_array_equal(
        evaluation.windows[0], evaluation.windows[-1][:32] if expected else evaluation.windows[0]
    )
    far = [item for item in evaluation.items if item.reach > 16]
    assert len(far) == expected // 64
    assert all(expected / 2 <= item.reach for item in far)
    assert capacity_for(evaluation.items) <= max(expected, 64)


@pytest.mark.parametrize(("context", "count"), [(120, 1), (256, 4), (48, 9)])
def test_windows_are_judged_by_questions_over_the_target_context(tiny_llama: Path, context: int, count: int) -> None:
    """Where the context is too short for such a text, by those that all else is judged by."""
    validation = Validation(samples=2, length=48, recall_items=9, recall_distance=16)
    update = {"calibration": Calibration(samples=4, length=48, context=context), "validation": validation}
    trials = open_prepared(tiny_llama, recipe_of().model_copy(update=update)).trials()
    items = trials.far_items
    assert len(items) == count
    if context < 64:
        assert {item.reach for item in items} == {16}
        return
    (tokens, places), *others = chained(items)
    assert not others
    assert len(tokens) <= context
    assert items[0].reach > 0.6 * context
    assert all(tokens[answer].tolist() == list(item.answer) for answer, item in zip(places, items, strict=True))
    text = tokens.tolist()
    for answer, item in zip(places, items, strict=True):
        first, second = (at for at in range(len(text)) if tuple(text[at : at + len(item.answer)]) == item.answer)
        assert second == int(answer[0])
        assert second - first >= context / 4


def test_held_out_text_goes_on_behind_the_target_context(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{number}" for number in range(3000)), encoding="utf-8")
    validation = Validation(source=str(text), samples=6, length=32, recall_items=9, recall_distance=16)

    def evaluation(context: int) -> DecoderEvaluation:
        update = {"calibration": Calibration(context=context), "validation": validation}
        return open_prepared(tiny_llama, recipe_of().model_copy(update=update)).evaluation()

    found = evaluation(128)
    assert len(found.windows[-1]) == 128 + 32
    assert all(item.reach <= 128 for item in found.items)
    most = open_prepared(tiny_llama, recipe_of()).spec.max_context
    assert max(len(window) for window in evaluation(most).windows) <= most


def test_digest_follows_the_text_not_the_name(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    for path in (first, second):
        path.write_text("same words")
    assert source_digest(str(first)) == source_digest(str(second))
    second.write_text("other words")
    assert source_digest(str(first)) != source_digest(str(second))


def test_hub_source_is_refused_early_when_the_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UnsupportedError, match="extra"):
        check_source("hub:wikitext", "recipe: calibration.source")


def test_weights_are_fitted_to_the_same_part_of_a_text_when_another_one_judges_later(
    tiny_llama: Path, tmp_path: Path
) -> None:
    both, other = tmp_path / "both.txt", tmp_path / "other.txt"
    both.write_text("".join(f"The lamp of house {number} is red. " for number in range(400)))
    other.write_text("".join(f"House {number} has a blue lamp. " for number in range(400)))
    calibration, same, another = Calibration(source=str(both)), *map(_judged_on, (both, other))
    prepared = open_prepared(tiny_llama, recipe_of())
    made = TextSource(prepared, calibration, same)
    later = TextSource(prepared, calibration, another, made_for=same)
    assert later.identity == made.identity != TextSource(prepared, calibration, another).identity
    np.testing.assert_array_equal(later.calibration_windows, made.calibration_windows)
    np.testing.assert_array_equal(later.held_out_windows, TextSource(prepared, calibration, another).held_out_windows)


def _judged_on(path: Path) -> Validation:
    return Validation(source=str(path), samples=2, length=32)
