"""`kvslim generate`: one prompt, a file of prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_chat import completed, write_chat
from support.verbs import Run, give_stdin, runner

from kvslim.cli.schemas import output_type

FIELDS = (
    "prompt_tokens",
    "cached_tokens",
    "new_tokens",
    "finish_reason",
    "ttft_ms",
    "tokens_per_second",
    "proposed_tokens",
    "accepted_tokens",
    "tokens_per_round",
    "acceptance",
    "context_tokens",
    "context_capacity",
    "kv_mib",
)
SHORT = ("-n", "6")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_chat(tmp_path / "artifact")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The artifact of a model without a chat template."""
    return write_chat(tmp_path / "base", template=None)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `kvslim generate` with the given stdin; returns exit code, stdout and stderr."""

    def call(*arguments: object, stdin: str | bytes = "") -> tuple[int, str, str]:
        give_stdin(monkeypatch, stdin)
        return runner(capsys, "generate")(*arguments)

    return call


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_text_goes_to_stdout_and_what_it_took_to_stderr(run: Run, artifact: Path) -> None:
    code, out, err = run(artifact, "-p", "héllo", *SHORT)
    assert (code, out) == (0, "héllo" + completed(artifact, "héllo") + "\n")
    assert err.startswith("6 prompt tokens, 6 new at ")
    assert "context 12 of 12, KV cache " in err
    assert len(err.splitlines()) == 1


def test_json_has_what_it_took_as_fields(run: Run, artifact: Path) -> None:
    code, out, err = run(artifact, "-p", "hello", *SHORT, "--json")
    answer = json.loads(out)
    output_type("generate").model_validate(answer)
    assert (code, err) == (0, "")
    assert tuple(answer) == ("schema", "prompt", "completion", *FIELDS)
    assert answer["completion"] == completed(artifact, "hello")


def test_context_gives_the_cache_room(run: Run, artifact: Path) -> None:
    _, out, _ = run(artifact, "-p", "hello", *SHORT, "--json", "--context", "100")
    assert json.loads(out)["context_capacity"] == 100
    _, out, _ = run(artifact, "-p", "hello", *SHORT, "--json", "--context", "7")
    assert json.loads(out)["new_tokens"] == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--chat"], "<user>hello\n<assistant>"),
        (["--system", "Be kind."], "<system>Be kind.\n<user>hello\n<assistant>"),
    ],
)
def test_chat_answers_the_template_of_the_prompt(run: Run, artifact: Path, options: list[str], text: str) -> None:
    code, out, _ = run(artifact, "-p", "hello", *SHORT, *options)
    assert (code, out) == (0, completed(artifact, text) + "\n")


@pytest.mark.parametrize("options", [["--chat"], ["--system", "Be kind."], ["--chat", "--system", "Be kind."]])
def test_chat_is_refused_when_there_is_no_template(run: Run, base: Path, options: list[str]) -> None:
    code, out, err = run(base, "-p", "hello", *options)
    assert (code, out) == (2, "")
    assert "the tokenizer has no chat template" in err
    named = " and ".join(option for option in options if option.startswith("--"))
    assert f"fix: leave out {named}\n" in err


def test_file_gives_one_object_per_line(run: Run, artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "two"}]
    rows = [{"prompt": "one", "id": 7}, {"messages": chat}, {"prompt": "one"}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    code, out, err = run(artifact, "--file", path, *SHORT)
    answers = lines(out)
    assert (code, err) == (0, "")
    assert [tuple(answer) for answer in answers] == [(*row, "completion", *FIELDS) for row in rows]
    expected = [completed(artifact, text) for text in ("one", "<system>S\n<user>two\n<assistant>", "one")]
    assert [answer["completion"] for answer in answers] == expected
    assert {answer["cached_tokens"] for answer in answers} == {0}
    assert {answer["context_capacity"] for answer in answers} == {64}


def test_file_is_put_into_the_template_when_asked(run: Run, artifact: Path) -> None:
    rows = '{"prompt": "one"}\n{"messages": [{"role": "user", "content": "one"}]}\n'
    code, out, _ = run(artifact, "--file", "-", "--system", "S", *SHORT, stdin=rows)
    assert code == 0
    expected = completed(artifact, "<system>S\n<user>one\n<assistant>")
    assert [answer["completion"] for answer in lines(out)] == [expected, expected]


BAD_LINES = {
    "{": "not JSON",
    "[" * 100_000: "not JSON",
    '{"prompt": "\\ud800"}': "not JSON",
    '{"prompt": "a", "weight": NaN}': "not JSON",
    '{"prompt": "a", "weight": 1e999}': "not JSON",
    '["prompt"]': "must hold an object",
    '{"text": "a"}': "either prompt or messages",
    '{"prompt": "a", "messages": []}': "either prompt or messages",
    '{"prompt": 3}': "prompt is not a text",
    '{"prompt": ""}': "no tokens",
    '{"prompt": "' + "a" * 64 + '"}': "64 tokens leave no room in a cache of 64",
    '{"messages": []}': "not a list of role and content",
    '{"messages": ["hello"]}': "not a list of role and content",
}


def test_file_names_each_line_that_cannot_be_completed_and_goes_on(run: Run, artifact: Path) -> None:
    rows = ["", *BAD_LINES, '{"prompt": "one"}']
    code, out, err = run(artifact, "--file", "-", *SHORT, stdin="\n".join(rows).encode() + b"\n\xff\n")
    *failed, answer, last = lines(out)
    assert code == 2
    assert answer["completion"] == completed(artifact, "one")
    assert [row["line"] for row in failed] == list(range(2, 2 + len(BAD_LINES)))
    for row, words in zip([*failed, last], [*BAD_LINES.values(), "not UTF-8"], strict=True):
        assert words in row["error"]["message"]
        assert row["error"]["where"] == f"stdin, line {row['line']}"
    assert err.count("error: ") == len(failed) + 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "give one of --prompt and --file"),
        (["-p", "a", "--file", "a"], 2, "give one of"),
        (["-p", ""], 2, "the prompt is empty"),
        (["-p", "\udcff"], 2, "not Unicode"),
        (["-p", "a" * 512], 2, "the prompt has 512 tokens, but the model has only 512 positions"),
        (["-p", "a", "--context", "513"], 2, "more than the model's 512 positions"),
        (["-p", "a", "--context", "0"], 2, "not a number of tokens"),
        (["-p", "a", "--context", "9" * 5000], 2, "not a number of tokens"),
        (["--file", "nowhere.jsonl"], 5, "nowhere.jsonl"),
        (["-p", "a", "--temperature", "nan"], 2, "--temperature"),
    ],
)
def test_generate_refuses_when_it_cannot_begin(
    run: Run, artifact: Path, arguments: list[str], code: int, words: str
) -> None:
    found, out, err = run(artifact, *arguments)
    assert (found, out) == (code, "")
    assert words in err


@pytest.mark.parametrize("option", ["-i", "--interactive"])
def test_conversation_is_a_verb_of_its_own(run: Run, artifact: Path, option: str) -> None:
    code, out, err = run(artifact, option)
    assert (code, out) == (2, "")
    assert f"fix: `kvslim chat {artifact}`" in err
