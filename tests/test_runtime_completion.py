"""Prompts and conversations completed through one cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.completions import tokens_after
from support.tiny_tokenizer import byte_tokenizer
from support.tiny_writer import write_writer

from kvslim.errors import ArtifactError, NotFoundError, UsageError
from kvslim.runtime.completion import Completer, PromptEncoder
from kvslim.runtime.generate import load_tokenizer
from kvslim.runtime.session import DecodeSession


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_writer(tmp_path)


def completer(folder: Path, capacity: int = 64) -> Completer:
    return Completer(folder, load_tokenizer(folder), capacity=capacity)


def text_of(writer: Completer, ids: list[int], tokens: int = 12) -> str:
    return "".join(writer.stream(ids, tokens))


def test_completion_is_the_models_text_when_given_a_folder(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    ids = PromptEncoder(folder, 256).prompt("héllo")
    tokens = tokens_after(DecodeSession(folder, capacity=32), ids, 12)
    assert text_of(completer(folder), ids) == tokenizer.decode([*ids, *tokens])[len("héllo") :]


def test_completion_shows_text_when_the_rest_is_not_yet_run(folder: Path) -> None:
    writer = completer(folder)
    pieces = writer.stream([1, 2, 3], 40)
    next(pieces)
    assert writer._session.length < 30
    assert writer.usage is None


def test_completion_is_the_same_when_the_cache_is_kept(folder: Path) -> None:
    kept, first = completer(folder), [5, 6, 7, 8]
    answer = byte_tokenizer().encode(text_of(kept, first, 6)).ids
    for ids in ([*first, *answer, 9, 10], [*first, 1, 2], [*first, 1, 2], [3]):
        fresh = completer(folder)
        assert text_of(kept, ids) == text_of(fresh, ids)
        assert kept.usage is not None
        assert fresh.usage is not None
        assert fresh.usage.cached_tokens == 0 <= kept.usage.cached_tokens < len(ids)


def test_completion_uses_what_the_prompt_shares_with_the_cache(folder: Path) -> None:
    writer = completer(folder)
    cached = []
    for ids in ([5, 6, 7, 8], [5, 6, 7, 9, 9], [5, 6, 7, 9, 9], [1, 2]):
        text_of(writer, ids, 1)
        assert writer.usage is not None
        cached.append(writer.usage.cached_tokens)
    assert cached == [0, 3, 4, 0]


def test_completion_starts_anew_when_the_cache_cannot_go_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = text_of(completer(folder), [5, 6, 9])
    writer = completer(folder)
    text_of(writer, [5, 6, 7, 8])

    def moved(length: int) -> None:
        raise UsageError("a window has dropped tokens", where="rewind", fix="reset instead")

    monkeypatch.setattr(writer._session, "rewind", moved)
    assert text_of(writer, [5, 6, 9]) == expected
    assert writer.usage is not None
    assert writer.usage.cached_tokens == 0


@pytest.mark.parametrize("runs", [1, 2, 3, 4, 9])
def test_text_is_closed_between_any_two_runs_and_what_was_run_is_kept(folder: Path, runs: int) -> None:
    writer, ids = completer(folder, 2048), [5, 6, 7, 8] * 300  # three runs of at most 512 tokens
    pieces = writer.stream(ids, 20)
    for _ in range(runs):
        next(pieces)
    pieces.close()
    usage = writer.usage
    assert usage is not None
    assert (usage.finish_reason, usage.new_tokens) == ("interrupted", max(0, runs - 3))
    assert text_of(writer, ids) == text_of(completer(folder, 2048), ids)
    assert writer.usage is not None
    assert writer.usage.cached_tokens == min(512 * runs, len(ids) - 1)


def test_text_that_is_closed_at_its_end_was_not_interrupted(folder: Path) -> None:
    writer = completer(folder)
    pieces = writer.stream([1, 2, 3], 2)
    for _ in range(3):
        next(pieces)
    pieces.close()
    assert writer.usage is not None
    assert (writer.usage.finish_reason, writer.usage.new_tokens) == ("length", 2)


def test_usage_is_of_the_last_text_when_an_older_one_is_closed_late(folder: Path) -> None:
    writer = completer(folder)
    older = writer.stream([1, 2, 3], 9)
    next(older)
    text_of(writer, [1, 2], 5)
    older.close()
    assert writer.usage is not None
    assert (writer.usage.prompt_tokens, writer.usage.finish_reason) == (2, "length")


def test_text_cannot_go_on_after_another_has_begun(folder: Path) -> None:
    writer, expected = completer(folder), text_of(completer(folder), [9, 8, 7, 6], 20)
    older = writer.stream([1, 2, 3], 20)
    next(older)
    newer = writer.stream([9, 8, 7], 6)
    first = next(newer)
    with pytest.raises(UsageError, match="another text has begun"):
        next(older)
    assert first + "".join(newer) == text_of(completer(folder), [9, 8, 7], 6)
    assert text_of(writer, [9, 8, 7, 6], 20) == expected


def test_usage_counts_what_was_run(folder: Path) -> None:
    writer = completer(folder, capacity=20)
    text_of(writer, [1, 2, 3, 4], 5)
    usage = writer.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.new_tokens, usage.finish_reason) == (4, 5, "length")
    assert (usage.context_tokens, usage.context_capacity) == (9, 20)
    assert usage.kv_mib == 20 * 2 * (8 + 16) * 2 * 4 / 2**20
    assert usage.ttft_ms > 0
    assert usage.tokens_per_second is not None
    assert usage.tokens_per_second > 0


@pytest.mark.parametrize("many", [False, True])
def test_completion_ends_at_every_stop_token_of_the_config(folder: Path, many: bool) -> None:
    tokens = tokens_after(DecodeSession(folder, capacity=32), [1, 2, 3], 12)
    stop = next(token for index, token in enumerate(tokens[2:], start=2) if token not in tokens[:index])
    unused = next(token for token in range(256) if token not in tokens)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [unused, stop] if many else stop}))
    writer = completer(folder)
    text_of(writer, [1, 2, 3])
    assert writer.usage is not None
    assert (writer.usage.new_tokens, writer.usage.finish_reason) == (tokens.index(stop), "stop")


def test_completion_ends_where_the_cache_is_full(folder: Path) -> None:
    writer = completer(folder, capacity=3)
    text_of(writer, [1, 2])
    assert writer.usage is not None
    assert (writer.usage.new_tokens, writer.usage.finish_reason) == (1, "length")
    with pytest.raises(UsageError, match="3 tokens leave no room in a cache of 3"):
        writer.stream([1, 2, 3], 12)


@pytest.mark.parametrize(("text", "words"), [("", "no tokens"), ("a\ud800", "not Unicode")])
def test_prompt_is_refused_when_it_is_no_text(folder: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        PromptEncoder(folder, 256).prompt(text)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_completer_names_the_file_when_it_is_missing_or_broken(folder: Path, name: str) -> None:
    (folder / name).write_text("{")
    with pytest.raises(ArtifactError) as broken:
        completer(folder)
    (folder / name).unlink()
    with pytest.raises(NotFoundError) as missing:
        completer(folder)
    assert broken.value.where == missing.value.where == str(folder / name)
