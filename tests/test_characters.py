"""Text that comes in pieces: whole characters, and stop strings over the borders of pieces."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from support.streams import stream_text
from support.tiny_artifact import describe
from support.tiny_tokenizer import byte_tokenizer, fallback_tokenizer, metaspace_tokenizer
from support.tiny_writer import write_writer
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

import kvslim
from kvslim.cli import app
from kvslim.runtime.characters import _BYTES
from kvslim.runtime.stops import StopStrings

TEXTS = [
    "a plain sentence, with  two spaces",
    "naïve café ☕ — 日本語のテキスト",
    "emoji 👩‍👩‍👧 and 🇨🇭 flags",
    " leading and trailing ",
    "hello😀😁é hello",
    "a literal \N{REPLACEMENT CHARACTER} stays",
]


def with_added_bytes() -> Tokenizer:
    """The same as some converters write it, whose tokens for bytes are among the added ones."""
    tokenizer = fallback_tokenizer()
    tokenizer.add_tokens([AddedToken(f"<0x{byte:02X}>", normalized=False) for byte in range(256)])
    return tokenizer


MAKERS = {"bytes": byte_tokenizer, "fallback": fallback_tokenizer, "added bytes": with_added_bytes}
STOPPED = [
    ("abcd", [], "abcd"),
    ("abcd", ["bc"], "a"),
    ("abxd", ["bc"], "abxd"),
    ("one\ntwo", ["\n"], "one"),
    ("xSTO", ["STOP"], "xSTO"),
    ("a1b2", ["2", "1"], "a"),
    ("abcd", ["abcd", "bc"], "a"),  # which is complete first
    ("abcd", ["bc", "abc"], ""),  # complete at once
    ("aaab", ["aab"], "a"),
    ("ababac", ["abac"], "ab"),
    ("so 😀 it ends", ["😀 it"], "so "),
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_stream_gives_the_whole_characters_that_tokens_add_wherever_it_starts(
    make: Callable[[], Tokenizer], text: str
) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text).ids
    for split in range(len(ids) + 1):
        before = stream_text(tokenizer, [], ids[:split])
        pieces = list(stream_text(tokenizer, ids[:split], ids[split:]))
        assert "".join(before) + "".join(pieces) == text.removeprefix(" " * (make is not byte_tokenizer))
        assert all(pieces)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_stream_shows_each_character_once_it_is_whole_and_never_part_of_one(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    ids = tokenizer.encode("é☕👩").ids
    assert list(stream_text(tokenizer, [], ids)) == ["é", "☕", "👩"]
    assert list(stream_text(tokenizer, [], ids[:-1])) == ["é", "☕"]
    assert list(stream_text(tokenizer, ids[:3], ids[3:6])) == ["☕"]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_bytes_of_no_character_are_marked_and_spoil_no_other(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    good, bad = tokenizer.encode("é").ids, tokenizer.encode("👩").ids[1:2]
    for ids in ([*good, *bad, *good, *good], [*good, *tokenizer.encode("👩").ids[:2], *good, *good]):
        assert "".join(stream_text(tokenizer, [], ids)) == "é\N{REPLACEMENT CHARACTER}éé"


def test_stream_leaves_out_special_and_unknown_tokens_and_keeps_added_ones() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.add_tokens([AddedToken("<tool  é>", normalized=False)])
    special, added = (tokenizer.token_to_id(text) for text in ("<end>", "<tool  é>"))
    ids = [*tokenizer.encode("a").ids, special, added, 5000, *tokenizer.encode("☕").ids]
    assert list(stream_text(tokenizer, [], ids)) == ["a", "<tool  é>", "☕"]


def test_stream_keeps_the_space_when_the_decoder_strips_the_first_one() -> None:
    pieces = list(stream_text(metaspace_tokenizer(), [0], [1, 2, 3, 0]))
    assert pieces == [" old", " cat", "s", " the"]
    tokenizer = fallback_tokenizer()
    ids = [tokenizer.token_to_id(text) for text in ("<s>", "▁hello", "<0xC3>", "<0xA9>", "▁hello")]
    assert list(stream_text(tokenizer, ids[:1], ids[1:])) == ["hello", "é", " hello"]


def test_letters_of_bytes_are_those_of_the_tokenizers() -> None:
    assert set(_BYTES) == set(pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.parametrize(("text", "stops", "expected"), STOPPED)
def test_text_ends_before_the_first_stop_string_however_it_is_cut(text: str, stops: list[str], expected: str) -> None:
    cuts = (places for count in range(len(text)) for places in combinations(range(1, len(text)), count))
    for places in cuts:
        found, shown = StopStrings(stops), ""
        for start, end in pairwise([0, *places, len(text)]):
            shown += "" if found.found else found.push(text[start:end])
            assert expected.startswith(shown)
        assert shown + found.rest() == expected


def test_text_is_shown_as_soon_as_no_stop_string_can_begin_in_it() -> None:
    stops = StopStrings(["bc"])
    assert [stops.push(piece) for piece in ("ab", "x", "d")] == ["a", "bx", "d"]


ANSWER = "☕😀👩‍👩‍👧"


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact with byte fallback that always writes the same emoji."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    write_writer(folder)
    fallback_tokenizer().save(str(folder / "tokenizer.json"))
    describe(folder)

    class Writer:
        def __init__(self, *_: object) -> None:
            self._tokens = iter(fallback_tokenizer().encode(ANSWER).ids)

        def draw(self, _: object) -> int:
            return next(self._tokens)

    monkeypatch.setattr("kvslim.runtime.writing.Sampler", Writer)
    return folder


@pytest.mark.parametrize(("tokens", "shown"), [(3, "☕"), (5, "☕"), (7, "☕😀"), (10, "☕😀"), (14, "☕😀👩‍")])
def test_every_way_to_generate_shows_whole_characters(
    artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tokens: int, shown: str
) -> None:
    def printed(*arguments: str, verb: str = "generate", stdin: str = "") -> str:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
        assert app.run([verb, str(artifact), "-n", str(tokens), *arguments]) == 0
        return capsys.readouterr().out

    assert printed("-p", "é") == f"é{shown}\n"
    assert json.loads(printed("-p", "é", "--json"))["completion"] == shown
    assert printed(verb="chat", stdin="é\né\n") == f"{shown}\n{shown}\n"
    assert json.loads(printed("--file", "-", stdin='{"prompt": "é"}'))["completion"] == shown
    text = kvslim.load(artifact)
    pieces = list(text.generate("é", max_new_tokens=tokens))
    assert pieces == list(shown)
    assert text.generate_batch(["é", "éé"], max_new_tokens=tokens) == [shown] * 2
