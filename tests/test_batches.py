"""Several prompts of different lengths at once: each is completed as if it were alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.batches import check_batch
from support.models import export_slim, open_prepared, recipe_of
from support.tiny_artifact import describe
from support.tiny_tokenizer import byte_tokenizer
from support.tiny_writer import write_writer

import kvslim
from kvslim.caches.buffers import LayerBuffers
from kvslim.cli import app
from kvslim.errors import UsageError
from kvslim.runtime.opening import layout_of, open_session
from kvslim.runtime.session import DecodeSession

PROMPTS = ["a", "something much longer than all the others are", "héllo", "hello 😀", "hello"]


def test_windows_of_a_model_keep_sequences_of_different_lengths_apart(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    export_slim(open_prepared(tiny_model("mistral"), recipe_of()), tmp_path / "graph")
    assert {tensor.window for tensor in layout_of(open_session(tmp_path / "graph")).tensors} == {16}
    check_batch(tmp_path / "graph")


def test_session_refuses_a_batch_beyond_its_capacity_and_goes_on_after_a_reset(tmp_path: Path) -> None:
    write_writer(tmp_path)
    session = DecodeSession(tmp_path, capacity=8, batch=2)
    with pytest.raises(UsageError, match="9 tokens exceed the cache of 8"):
        session.prefill_each([[1, 2], list(range(9))])
    session.reset()
    expected = session.step([[1, 2], [3, 4]])[:, -1]
    np.testing.assert_allclose(session.prefill_each([[1, 2], [3, 4]]), expected, atol=1e-5)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    folder.mkdir()
    write_writer(folder)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    # The end token comes early in some of the texts.
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": byte_tokenizer().encode("e").ids}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    describe(folder)
    return folder


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.3, "seed": 5},
    {"temperature": 0.7, "repetition_penalty": 1.5},
    {"temperature": 2.0, "seed": 1, "stop": ["x", "zq", "1"]},
    {"max_new_tokens": 1},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_batch_gives_the_text_of_each_prompt_alone(artifact: Path, options: dict[str, Any]) -> None:
    text = kvslim.load(artifact, context=64)
    prompts: list[Any] = [*PROMPTS, [{"role": "user", "content": "hello"}]]
    options = {"max_new_tokens": 30, **options}
    alone = ["".join(text.generate(prompt, **options)) for prompt in prompts]
    assert text.generate_batch(prompts, **options) == alone
    assert len(set(alone)) > 2
    assert text.generate_batch(prompts[:2], **options) == alone[:2]
    assert "".join(text.generate(prompts[0], **options)) == alone[0]
    assert text.generate_batch([], **options) == []


def test_penalty_makes_a_text_repeat_less(artifact: Path) -> None:
    text = kvslim.load(artifact, context=128)
    varied = [len(set("".join(text.generate("ab", max_new_tokens=60, repetition_penalty=p)))) for p in (1.0, 2.0)]
    assert varied[0] < varied[1]


def test_batch_of_a_file_gives_the_same_answers_in_order(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt, "id": index}) for index, prompt in enumerate(PROMPTS)))
    found = []
    for batch in (1, 2, 16):
        command = ["generate", str(artifact), "--file", str(path), "--max-new-tokens", "20", "--batch", str(batch)]
        assert app.run([*command, "--stop", "i", "--stop", "w", "--repetition-penalty", "1.2"]) == 0
        found.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    timeless = [[{**answer, "ttft_ms": 0, "tokens_per_second": 0} for answer in answers] for answers in found]
    assert timeless[0] == timeless[1] == timeless[2]
    assert [answer["id"] for answer in found[0]] == list(range(len(PROMPTS)))
    assert {answer["finish_reason"] for answer in found[0]} == {"stop", "length"}
    assert not {"i", "w"} & set("".join(answer["completion"] for answer in found[0]))


def test_stop_string_ends_an_answer_with_its_reason(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(artifact), "-p", "so ", "--max-new-tokens", "40", "--json"]
    assert app.run(command) == 0
    whole = json.loads(capsys.readouterr().out)["completion"]
    stop = whole[6:8]
    assert app.run([*command, "--stop", "never", "--stop", stop]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["completion"], answer["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    assert app.run([*command[:-1], "--stop", stop]) == 0
    assert capsys.readouterr().out == "so " + whole[: whole.index(stop)] + "\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "a", "--batch", "2"], "a batch needs a file"),
        (["--file", "-", "--batch", "0"], "--batch"),
        (["--file", "-", "--batch", "9223372036854775807"], "--batch"),
        (["-p", "a", "--stop", ""], "a stop string is empty"),
        (["-p", "a", "--repetition-penalty", "0"], "--repetition-penalty"),
        (["-p", "a", "--repetition-penalty", "nan"], "--repetition-penalty"),
        (["-p", "a", "--repetition-penalty", "1e300"], "--repetition-penalty"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    artifact: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert app.run(["generate", str(artifact), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err


def test_batch_is_refused_before_any_answer_when_the_cache_holds_one_sequence(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LayerBuffers, "single_sequence", ("packed codes are for one", "use a batch of 1"))
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n')
    assert app.run(["generate", str(artifact), "--file", str(path), "--batch", "2"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, "fix: use a batch of 1" in captured.err) == ("", True)
    with pytest.raises(UsageError, match="packed codes are for one"):
        kvslim.load(artifact).generate_batch(["a", "b"])


@pytest.mark.parametrize("bad", ["", "x" * 70, "\udc80"])
def test_batch_names_the_prompt_that_is_wrong(artifact: Path, bad: str) -> None:
    with pytest.raises(UsageError) as caught:
        kvslim.load(artifact, context=64).generate_batch(["a", bad])
    assert caught.value.where == "prompts[1]"
