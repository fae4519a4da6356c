"""The usual words on the command line: options that every verb has alike, help, completion, verbs of other tools."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT
from support.tiny_artifact import fill
from support.tiny_report import manifest
from support.verbs import Run, runner

from kvslim.cli.peers import VERBS
from kvslim.errors import GateError, UsageError
from kvslim.recipe import Recipe
from kvslim.report.card import model_card
from kvslim.report.page import artifact_page
from kvslim.types import Healing, Manifest


class StoppedError(Exception):
    """What was asked for is known."""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command; returns exit code, stdout and stderr."""

    return runner(capsys)


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes that verbs ask the pipeline for, which then stops."""
    asked: list[Recipe] = []

    def noted(_: str, recipe: Recipe, *__: object, **___: object) -> None:
        asked.append(recipe)
        raise StoppedError

    for verb in ("compress", "plan", "analyze"):
        monkeypatch.setattr(f"kvslim.pipeline.{verb}", noted)
    return asked


@pytest.mark.parametrize("verb", [("compress", "demo", "-o", "out"), ("plan", "demo")])
@pytest.mark.parametrize(
    ("options", "path", "value"),
    [
        (["--weights", "int4"], "weights.type", "int4"),
        (["--weights", "int4", "--set", "weights.method=gptq"], "weights.method", "gptq"),
        (["--context", "16k"], "calibration.context", 16384),
        (["--context", "16k", "--set", "calibration.context=64"], "calibration.context", 64),
        (["--calibration", "my: text.txt"], "calibration.source", "my: text.txt"),
        (["--kv-ratio", "8"], "budget.kv_ratio", 8),
        (["--kv-ratio", "8"], "gates.max_kl", 0.1),
        (["--kv-ratio", "8", "--set", "gates.max_kl=0.5"], "gates.max_kl", 0.5),
        (["--kv-ratio", "8", "--set", "gates.max_kv_ratio=0.5"], "gates.max_kv_ratio", 0.5),
        (["--max-kl", "0.02"], "gates.max_kv_ratio", None),
        (["--max-kl", "0.02"], "name", "budget"),
        (["--max-kl", "0.02", "-r", "balanced"], "gates.max_kv_ratio", 0.25),
        (["--kv-mib-at", "1k=4"], "calibration.context", 1024),
        (["--memory-mib", "16k=300"], "budget.memory_mib", 300),
        (["--memory-mib", "16k=300"], "calibration.context", 16384),
        (["--memory-mib", "16k=300"], "gates.max_memory_mib", 300),
        (["--memory-mib", "16k=300"], "weights.type", "auto"),
        (["--file-mib", "90"], "weights.file_mib", 90),
        (["--file-ratio", "6", "--weights", "int4", "--set", "weights.method=gptq"], "weights.file_ratio", 6),
    ],
)
def test_words_are_keys_of_the_recipe(
    run: Run, recipes: list[Recipe], verb: tuple[str, ...], options: list[str], path: str, value: object
) -> None:
    run(*verb, *options)
    (found,) = recipes
    part: Any = found
    for name in path.split("."):
        part = getattr(part, name)
    assert part == value


def test_analyze_takes_the_same_words(run: Run, recipes: list[Recipe]) -> None:
    run("analyze", "demo", "--weights", "int4", "--context", "1k", "--calibration", "a.txt")
    run("analyze", "demo", "--data", "a.txt")
    assert [(each.calibration.source, each.calibration.context, each.weights.type) for each in recipes] == [
        ("a.txt", 1024, "int4"),
        ("a.txt", None, "auto"),
    ]


def test_validation_text_and_gates_of_the_user_count(run: Run, recipes: list[Recipe]) -> None:
    run("compress", "demo", "-o", "out", "--validation", "hub:some", "--kv-ratio", "8", "--gate", "max_kl=0.3")
    assert (recipes[0].validation.source, recipes[0].gates.max_kl) == ("hub:some", 0.3)


@pytest.mark.parametrize(
    ("option", "value", "hint"),
    [("--context", "16q", "'16q'"), ("--context", "4", "greater than or equal to 8"), ("--weights", "int5", "int5")],
)
@pytest.mark.parametrize("verb", [("compress", "demo", "-o", "out"), ("plan", "demo")])
def test_word_is_named_when_it_is_wrong(run: Run, verb: tuple[str, ...], option: str, value: str, hint: str) -> None:
    code, _, err = run(*verb, option, value)
    assert code == UsageError.exit_code
    assert option in err
    assert hint in err


def test_context_beyond_the_positions_is_refused(run: Run) -> None:
    code, _, err = run("plan", "demo", "--context", "16k")
    assert code == UsageError.exit_code
    assert "calibration.context needs 16384 positions; the model has 2048" in err


def test_validate_measures_on_the_text_and_context_that_are_given(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def validate(*_: object, **given: Any) -> None:
        asked.append(given)
        raise StoppedError

    monkeypatch.setattr("kvslim.pipeline.validate", validate)
    run("validate", "out", "--context", "8k", "--validation", "text.txt")
    run("validate", "out")
    changes = ["calibration.context=8192", 'validation.source="text.txt"']
    assert [given["changes"] for given in asked] == [changes, []]


def test_validate_names_the_context_that_is_wrong(run: Run, tmp_path: Path) -> None:
    fill(tmp_path)
    code, _, err = run("validate", tmp_path, "--context", "4")
    assert code == UsageError.exit_code
    assert "where: calibration.context=4\n" in err


@pytest.mark.parametrize("verb", ["", "compress", "validate", "recipes"])
def test_h_is_help(run: Run, verb: str) -> None:
    asked = [verb] if verb else []
    short, long = run(*asked, "-h"), run(*asked, "--help")
    assert short == long
    assert short[0] == 0
    assert "Usage: kvslim" in short[1]


def completed(words: str) -> list[str]:
    """What bash is told to offer behind these words."""
    environment = {**os.environ, "_KVSLIM_COMPLETE": "complete_bash", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(len(words.split(" ")) - 1)
    command = [sys.executable, "-m", "kvslim.cli.app"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("kvslim comp", {"compress", "compare"}),
        ("kvslim plan demo -r ", {"balanced", "encoder", "lossless", "small"}),
        ("kvslim plan demo --device raspberry-pi-4", {"raspberry-pi-4-4gb"}),
        ("kvslim plan demo --weights i", {"int8", "int4"}),
        ("kvslim validate out --gate max_kv", {"max_kv_ratio=", "max_kv_mib="}),
    ],
)
def test_shell_completion_offers_verbs_and_values(words: str, offered: set[str]) -> None:
    assert set(completed(words)) == offered


def test_script_for_completion_is_shown() -> None:
    """For a shell that is named; which one runs the tests is not known."""
    command = [sys.executable, "-m", "kvslim.cli.app", "--show-completion", "bash"]
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "complete -o default -F _kvslim_completion kvslim" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_verb_of_another_tool_leads_to_one_that_exists(run: Run, verb: str) -> None:
    code, out, err = run(verb, "model")
    assert (code, out) == (UsageError.exit_code, "")
    if verb in {"push", "upload"}:
        assert "fix: here that is `hf upload USER/NAME ARTIFACT .`" in err
        return
    (command,) = re.findall(r"fix: here that is `kvslim ([^`]+)`", err)
    code, out, _ = run(shlex.split(command)[0], "--help")
    assert code == 0
    assert all(option in out for option in re.findall(r" (--?[a-z-]+)", command))


def test_other_unknown_verb_is_not_taken_for_one(run: Run) -> None:
    assert "see `kvslim --help`" in run("frobnicate")[2]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[[Manifest], None]:
    """Has `compress` give a manifest."""
    return lambda given: monkeypatch.setattr("kvslim.pipeline.compress", lambda *_, **__: given)


def test_compress_ends_with_a_verdict_and_what_to_do_next(run: Run, made: Callable[[Manifest], None]) -> None:
    made(manifest(kl=0.004))
    code, _, err = run("compress", "demo", "-o", "my out")
    assert code == 0
    lines = err.splitlines()
    assert lines[0] == (
        "passed, 1 of 1 gates hold: the cache is 5.7x smaller than fp32, 2.9x than fp16, 1.5x than q8_0, "
        "KL 0.004, recall 97.0% (plain 98.0%)"
    )
    assert re.fullmatch(r"written to my out in \d+:\d\d", lines[1])
    assert lines[2:] == ["next: open 'my out'/report.html", "      kvslim generate 'my out' -p \"Once upon a time\""]


@pytest.mark.parametrize(
    ("before", "after", "kept", "told"),
    [
        (0.04, 0.03, True, "healed in 20 steps: KL 0.04 -> 0.03 on"),
        (0.04, 0.05, False, "not healed: 20 steps gained nothing (KL 0.04 -> 0.05 on"),
        (None, None, False, "not healed: the plan changes nothing that could heal"),
    ],
)
def test_compress_tells_what_healing_gave(
    run: Run, made: Callable[[Manifest], None], before: float | None, after: float, kept: bool, told: str
) -> None:
    numbers = {"kl_before": before, "kl_after": after, "kept": kept}
    healing = None if before is None else Healing(steps=20, tokens=20480, seconds=60.0, watched=(), **numbers)
    plain = manifest()
    assert "healed" not in (made(plain), run("compress", "demo", "-o", "out")[2])[1]
    asked = plain.model_copy(update={"healing": healing, "recipe": {**plain.recipe, "heal": {"steps": 20}}})
    made(asked)
    assert run("compress", "demo", "-o", "out")[2].splitlines()[0].startswith(told)
    assert f"- Training: {told}" in model_card(asked)
    assert told.partition(" ->")[0] in artifact_page(asked)
    assert all("healed" not in page(plain) for page in (model_card, artifact_page))


def test_next_is_a_chat_where_the_tokenizer_has_a_template(
    run: Run, made: Callable[[Manifest], None], tmp_path: Path
) -> None:
    made(manifest())
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert run("compress", "demo", "-o", tmp_path)[2].splitlines()[-1] == f"      kvslim chat {tmp_path}"


def test_failed_gate_names_the_whole_command_that_is_expected_to_pass(
    run: Run, made: Callable[[Manifest], None]
) -> None:
    made(manifest(kl=0.02, limit=0.01))
    options = ["--kv-ratio", "16", "--weights", "int4", "--set", "validation.samples=4", "--json"]
    code, _, err = run("compress", "a model", "-o", "out", "--gate", "max_kl=0.01", *options)
    assert code == GateError.exit_code
    assert "1 of 1 gates FAILED" in err
    kept = "-o out --weights int4 --gate max_kl=0.01 --set validation.samples=4"
    assert f"run `kvslim compress 'a model' {kept} -r small --force --kv-ratio 4`, the nearest size" in err
