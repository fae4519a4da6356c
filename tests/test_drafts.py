"""Drafts from end to end: what `compress` makes of them, and who uses them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from support.server import Server
from support.tiny_chat import completed, write_chat
from support.verbs import Run, give_stdin, runner

import kvslim
from kvslim.cli import app
from kvslim.errors import NotFoundError
from kvslim.export.manifest import SPECULATIVE_GRAPH, read_manifest
from kvslim.serve.app import create_app
from kvslim.serve.engine import Engine
from kvslim.serve.model import ServedModel
from kvslim.speculative.estimates import FreeRuns
from kvslim.types import Draft

LOOKUP = Draft(kind="lookup")
BRIEF = (
    "calibration.samples=4",
    "calibration.length=48",
    "validation.samples=2",
    "validation.length=64",
    "validation.recall_items=2",
    "validation.recall_distance=16",
    "validation.prompts=[16]",
    "validation.contexts=[16]",
    "validation.repeats=3",
    "weights=fp32",
)
PROMPT, TOKENS = "abcab" * 6, "40"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys)


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact with a draft, on a machine where runs of several tokens cost next to nothing."""
    monkeypatch.setattr("kvslim.speculative.speculator.RunCosts", FreeRuns)
    return write_chat(tmp_path / "artifact", draft=LOOKUP)


def compress(model: Path, out: Path, *options: str) -> int:
    changes = [part for change in BRIEF for part in ("--set", change)]
    return app.run(["compress", str(model), "-r", "lossless", "-o", str(out), *changes, *options])


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (["--draft", "lookup"], "lookup"),
        (["--draft", "auto", "--context", "1k"], "window"),
        (["--draft", "none"], None),
    ],
    ids=["lookup", "auto", "none"],
)
def test_compress_makes_the_draft_that_is_asked_for(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], kind: str | None
) -> None:
    assert compress(tiny_llama, tmp_path / "out", *options) == 0
    manifest, said = read_manifest(tmp_path / "out"), capsys.readouterr().err
    assert manifest.report is not None
    assert (manifest.draft and manifest.draft.kind) == kind
    assert (
        (tmp_path / "out" / SPECULATIVE_GRAPH).exists() == (SPECULATIVE_GRAPH in manifest.files) == (kind is not None)
    )
    assert (manifest.report.speculation is not None) == ("the texts are the model's own" in said) == (kind is not None)
    if manifest.report.speculation is not None:
        assert manifest.report.speculation.differing == 0
        assert manifest.report.speculation.checked > 0
        assert manifest.report.speculation.tokens == 2 * 32
        assert f"draft: {kind}, " in said
    assert "warning" not in said
    capsys.readouterr()
    assert app.run(["inspect", str(tmp_path / "out")]) == 0
    assert (f"draft: {kind}, " in capsys.readouterr().out) == (kind is not None)
    assert app.run(["inspect", str(tmp_path / "out"), "--json"]) == 0
    inspected = json.loads(capsys.readouterr().out)
    assert (inspected["draft"] and inspected["draft"]["kind"]) == kind
    assert (inspected["speculation"] is None) == (kind is None)


def test_compress_says_why_there_is_no_window_draft(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    windowed = 'methods=[{"kv_window": {"window": 32, "sinks": 4}}]'
    assert compress(tiny_llama, tmp_path / "out", "--draft", "window", "--set", windowed) in (0, 3)
    said = capsys.readouterr().err
    reason = "warning: the draft is lookup, not window: it reads rows of full caches, and layer 0 keeps a cache of kind"
    assert f"{reason} window" in said
    assert "draft: lookup, " in said


def test_artifact_fails_when_a_text_is_not_the_models(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvslim.validation.speculation._differs", lambda *_: True)
    assert compress(tiny_llama, tmp_path / "out", "--draft", "window") == 3
    assert "2 texts are not those that the model writes without it" in capsys.readouterr().err
    draft = read_manifest(tmp_path / "out").draft
    assert draft is not None
    assert draft.kind == "window"


def generated(run: Run, artifact: Path, *options: str) -> dict[str, Any]:
    code, out, _ = run("generate", artifact, "-p", PROMPT, "-n", TOKENS, "--json", *options)
    assert code == 0
    return dict(json.loads(out))


def check_rounds(drafted: dict[str, Any], plain: dict[str, Any]) -> None:
    """What is told of a text with a draft, and of the same one without."""
    assert drafted["completion"] == plain["completion"]
    assert 0 < drafted["accepted_tokens"] <= drafted["proposed_tokens"]
    assert drafted["tokens_per_round"] > 1
    assert drafted["acceptance"][0] > 0
    assert (plain["proposed_tokens"], plain["tokens_per_round"], plain["acceptance"]) == (0, None, [])


def test_generate_uses_the_draft_unless_told_not_to(run: Run, artifact: Path) -> None:
    check_rounds(generated(run, artifact), generated(run, artifact, "--speculative", "none"))
    _, _, err = run("generate", artifact, "-p", PROMPT, "-n", TOKENS)
    assert re.search(r"[1-9]\.\d\d a run, \d+ of \d+ proposals right \(\d+%\), first after ", err)
    _, _, err = run("generate", artifact, "-p", PROMPT, "-n", "2")
    assert ", nothing proposed, first after " in err  # the last token needs no run that verifies more
    _, _, err = run("generate", artifact, "-p", PROMPT, "-n", TOKENS, "--speculative", "none")
    assert not re.search("propos| a run", err)


def test_validate_misses_the_graph_of_the_draft_before_it_measures(
    run: Run, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvslim.pipeline.origin", lambda *_: pytest.fail("the model is looked for"))
    (artifact / SPECULATIVE_GRAPH).unlink()
    code, _, err = run("validate", artifact)
    assert code == NotFoundError.exit_code
    assert f"the artifact lacks {SPECULATIVE_GRAPH}" in err
    assert f"where: {artifact / SPECULATIVE_GRAPH}" in err
    assert "fix: compress again" in err


def test_graph_of_the_draft_is_not_opened_when_it_is_not_used(run: Run, artifact: Path) -> None:
    (artifact / SPECULATIVE_GRAPH).unlink()
    text = completed(artifact, PROMPT, int(TOKENS))
    assert generated(run, artifact, "--speculative", "none")["completion"] == text
    assert "".join(kvslim.load(artifact, speculative="none").generate(PROMPT, max_new_tokens=8)) == text[:8]
    code, _, err = run("generate", artifact, "-p", PROMPT)
    assert (code, "--speculative none" in err) == (5, True)
    with pytest.raises(NotFoundError):
        kvslim.load(artifact)


def test_lines_of_a_file_use_the_draft_one_by_one(run: Run, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_stdin(monkeypatch, "\n".join([json.dumps({"prompt": PROMPT})] * 2))
    _, out, _ = run("generate", artifact, "--file", "-", "-n", TOKENS)
    lines, alone = [json.loads(line) for line in out.splitlines()], generated(run, artifact)
    assert len(lines) == 2
    assert all(alone["completion"].startswith(line["completion"]) for line in lines)  # the cache of a file is smaller
    assert all(line["accepted_tokens"] > 0 for line in lines)


def test_lines_side_by_side_do_without_the_draft(run: Run, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "\n".join([json.dumps({"prompt": PROMPT})] * 2)
    give_stdin(monkeypatch, rows)
    _, out, _ = run("generate", artifact, "--file", "-", "-n", "6", "--batch", "2")
    assert [json.loads(line)["tokens_per_round"] for line in out.splitlines()] == [None, None]


def test_chat_uses_the_draft_unless_told_not_to(run: Run, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for options in ((), ("--speculative", "none")):
        give_stdin(monkeypatch, PROMPT)
        code, out, _ = run("chat", artifact, "-n", TOKENS, "--context", "200", "--json", *options)
        assert code == 0
        answers.append(json.loads(out))
    check_rounds(*answers)


def test_loaded_artifact_tells_what_its_draft_did(artifact: Path) -> None:
    drafted, plain = kvslim.load(artifact), kvslim.load(artifact, speculative="none")
    assert drafted.usage is None
    texts = ["".join(text.generate(PROMPT, max_new_tokens=30)) for text in (drafted, plain)]
    assert texts[0] == texts[1]
    assert drafted.usage is not None
    assert plain.usage is not None
    assert drafted.usage.accepted_tokens > 0
    assert (drafted.usage.new_tokens, plain.usage.tokens_per_round) == (30, None)


def test_server_counts_predictions(artifact: Path) -> None:
    model = ServedModel(artifact, None, None, None)
    with Engine(model.completer, lambda _: None, lambda _: None) as engine:
        client = TestClient(create_app(model, engine, ["testserver"]))
        asked = {"model": artifact.name, "prompt": PROMPT, "max_tokens": 30, "temperature": 0}
        answer = client.post("/v1/completions", json=asked).json()
    assert answer["choices"][0]["text"] == completed(artifact, PROMPT, 30)
    counts = answer["usage"]["completion_tokens_details"]
    assert counts["accepted_prediction_tokens"] > 0


def test_server_does_without_the_draft_when_told(tmp_path: Path) -> None:
    artifact = write_chat(tmp_path / "artifact", draft=LOOKUP)
    (artifact / SPECULATIVE_GRAPH).unlink()
    with Server(artifact, tmp_path / "stderr", "--speculative", "none") as server:
        answer = server.client().completions.create(model=artifact.name, prompt=PROMPT, max_tokens=30, temperature=0)
    assert answer.choices[0].text == completed(artifact, PROMPT, 30)
    assert answer.usage is not None
    counts = answer.usage.completion_tokens_details
    assert counts is not None
    assert counts.accepted_prediction_tokens == counts.rejected_prediction_tokens == 0
