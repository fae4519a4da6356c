"""Conversations as calibration and validation text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.models import open_prepared, recipe_of

from kvslim.calibrate import text_source
from kvslim.calibrate.corpus import loss_mask, text_windows
from kvslim.calibrate.text_source import check_source, source_digest, source_pieces, source_text
from kvslim.errors import UsageError

FRAMED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Earlier answers lose what the last one keeps, as with models that think.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}(hm) {% endif %}{{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('a user comes first') }}{% endif %}" + FRAMED
ASK, SAY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
MORE = [{"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "6"}]


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    found = open_prepared(tiny_llama, recipe_of()).tokenizer
    found.chat_template = FRAMED
    return found


def written(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_answers_alone_count(tmp_path: Path, tokenizer: Any) -> None:
    source = written(tmp_path / "chat.jsonl", {"messages": [ASK, SAY, *MORE]}, {"text": "and more"})
    sizes = {"samples": 1, "length": 58}
    (window,), (counted,) = (part(source, tokenizer, **sizes) for part in (text_windows, loss_mask))
    assert tokenizer.decode(window) == "<user>2+2?\n<assistant>4\n<user>3+3?\n<assistant>6\n\n\nand more"
    assert tokenizer.decode(window[counted]) == "4\n6\nand more"


@pytest.mark.parametrize(
    ("template", "messages"),
    [(FORGETFUL, [ASK, SAY, *MORE]), (FRAMED, [ASK])],
    ids=["a template that rewrites earlier answers", "no answer"],
)
def test_all_counts_where_answers_cannot_be_told_apart(
    tmp_path: Path, tokenizer: Any, template: str, messages: list[Any]
) -> None:
    tokenizer.chat_template = template
    (piece,) = source_pieces(written(tmp_path / "chat.jsonl", {"messages": messages}), tokenizer)
    assert piece == (tokenizer.apply_chat_template(messages, tokenize=False), True)


def test_last_answer_is_told_apart_by_a_template_that_rewrites_earlier_ones(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETFUL
    pieces = source_pieces(written(tmp_path / "chat.jsonl", {"messages": [ASK, SAY]}), tokenizer)
    assert pieces == [("<user>2+2?\n<assistant>", False), ("(hm) 4\n", True), ("", False)]


@pytest.mark.parametrize("adds", [True, False], ids=["the tokenizer too", "the template alone"])
def test_token_that_starts_a_text_stands_in_it_once(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, adds: bool
) -> None:
    """Where the tokenizer starts texts with it too, each window has it. SmolLM's starts each message, and no text."""
    tokenizer.bos_token, tokenizer.chat_template = "<|endoftext|>", "{{ bos_token }}" + FRAMED
    start = np.array([tokenizer.bos_token_id] if adds else [], dtype=np.int64)
    monkeypatch.setattr(text_source, "start_of_text", lambda _: start)
    (frame, *_) = source_pieces(written(tmp_path / "chat.jsonl", {"messages": [ASK, SAY]}), tokenizer)
    assert frame.text == ("" if adds else "<|endoftext|>") + "<user>2+2?\n<assistant>"


def test_contents_in_parts_are_read(tmp_path: Path, tokenizer: Any) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]}
    (piece,) = source_pieces(written(tmp_path / "chat.jsonl", {"messages": [parts]}), tokenizer)
    assert piece.text == "<user>2+\n2?\n"


def test_sentences_come_from_what_is_said(tmp_path: Path) -> None:
    source = written(tmp_path / "chat.jsonl", {"messages": [ASK, SAY]}, {"messages": MORE})
    assert source_text(source) == "2+2?\n\n4\n\n3+3?\n\n6"


def test_digest_tells_who_speaks(tmp_path: Path) -> None:
    other = [{**ASK, "role": "system"}, SAY]
    sources = [written(tmp_path / f"{n}.jsonl", {"messages": said}) for n, said in enumerate(([ASK, SAY], other))]
    assert len({source_digest(source) for source in sources}) == 2


@pytest.mark.parametrize(
    ("messages", "message", "where"),
    [
        ([], "not a list of role and content", "line 1"),
        ("hello", "not a list of role and content", "line 1"),
        (["hello"], "not a list of role and content", "line 1"),
        ([{"content": "hello"}], "not a list of role and content", "line 1"),
        ([ASK, {"role": "user", "content": 5}], "the content is not a text", r"line 1: messages\[1\]"),
        ([{"role": "user", "content": [{"type": "image"}]}], "'image', not text", r"messages\[0\].content\[0\]"),
        ([{"role": "user", "content": " "}], "the text is empty", "chat.jsonl"),
    ],
)
def test_bad_messages_are_named(tmp_path: Path, messages: object, message: str, where: str) -> None:
    source = written(tmp_path / "chat.jsonl", {"messages": messages})
    with pytest.raises(UsageError, match=message) as caught:
        check_source(source, "recipe: calibration.source")
    assert caught.value.where is not None
    assert where.replace("\\", "") in caught.value.where


@pytest.mark.parametrize(
    ("template", "message"), [(None, "no chat template"), (STRICT, "a user comes first")], ids=["none", "refused"]
)
def test_template_that_is_missing_or_refuses_is_named(
    tmp_path: Path, tokenizer: Any, template: str | None, message: str
) -> None:
    tokenizer.chat_template = template
    source = written(tmp_path / "chat.jsonl", {"messages": [ASK, SAY]}, {"messages": [SAY]})
    with pytest.raises(UsageError, match=message) as caught:
        source_pieces(source, tokenizer)
    assert caught.value.where == f"{source}, line {1 if template is None else 2}"


class Rows(list[dict[str, Any]]):
    """Rows of a data set."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0])

    def select_columns(self, names: list[str]) -> list[dict[str, Any]]:
        return [{name: row[name] for name in names} for row in self]


def test_data_set_of_conversations_is_read(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    rows = Rows([{"id": 1, "messages": [ASK, SAY]}, {"id": 2, "messages": MORE}])
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: rows))
    window = text_windows("hub:org/chat:train", tokenizer, samples=1, length=40)
    assert window.dtype == np.int64
    assert tokenizer.decode(window[0]) == "<user>2+2?\n<assistant>4\n\n\n<user>3+3?\n<as"


def test_data_set_without_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows([{"prompt": "a", "answer": "b"}])
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: rows))
    with pytest.raises(UsageError, match="no text"):
        source_text("hub:org/other")
