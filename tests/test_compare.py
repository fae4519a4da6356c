"""`kvslim compare`: artifacts side by side from their manifests, and what got worse since a baseline."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from support.tiny_report import manifest

from kvslim.cli import app
from kvslim.errors import GateError, NotFoundError, UsageError
from kvslim.export.manifest import write_manifest
from kvslim.report.compare import compared, comparison_table, regressions, short_names
from kvslim.types import Manifest

SIZE = manifest().kv_layout.bytes_per_token(4096)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = app.run(["compare", *(str(argument) for argument in arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def folder(path: Path, content: Manifest) -> Path:
    path.mkdir(parents=True)
    write_manifest(path, content)
    return path


@pytest.fixture
def artifacts(tmp_path: Path) -> tuple[Path, Path]:
    return folder(tmp_path / "a", manifest()), folder(tmp_path / "b", manifest(kl=0.02, recall=0.9))


def worse(now: Manifest, before: Manifest) -> list[str]:
    return [one.measure for one in regressions(compared({"a": now}), compared({"a": before}))]


def test_table_has_a_column_for_each_artifact(run: Run, artifacts: tuple[Path, Path]) -> None:
    code, out, _ = run(*artifacts)
    cells = (re.split(r" {2,}", line.strip()) for line in out.splitlines())
    rows = {name: values for name, *values in cells}
    assert code == 0
    assert rows["Weights"] == ["int4 (k_quant)"] * 2
    assert rows["Recall"] == ["97.0%", "90.0%"]
    assert rows["KL to plain, mean"] == ["0.004", "0.02"]
    assert rows["Gate max_kl"] == ["passed: 0.004, limit 0.01", "FAILED: 0.02, limit 0.01"]
    assert rows["KV cache, smaller than fp32"] == rows["KV cache, smaller than fp32"][:1] * 2
    assert float(rows["KV cache, smaller than fp16"][0][:-1]) == pytest.approx(2560 / 2 / SIZE, abs=0.05)
    assert rows["Time per token, to plain, at 8192"] == ["0.417x", "0.417x"]


def test_best_value_of_each_row_is_marked() -> None:
    found = {"a": manifest(), "b": manifest(kl=0.002, recall=0.9), "c": manifest(slowness=2)}
    table = comparison_table(compared(found))
    marked = {table.rows[row][0]: [] for row, _ in table.best}
    for row, column in sorted(table.best):
        marked[table.rows[row][0]].append(table.header[column])
    assert marked["KL to plain, mean"] == ["b"]
    assert marked["Recall"] == ["a", "c"]
    assert marked["Time per token, to plain, at 1024"] == ["a", "b"]
    assert "Files, MiB" not in marked  # all are equal
    assert "Time per token, ms, context of 1024" not in marked  # of different runs
    busy = comparison_table(compared({"a": manifest(), "b": manifest(slowness=2, busy=True)}))
    assert not [row for row, _ in busy.best if busy.rows[row][0].startswith("Time")]
    bold = [segment.text.strip() for segment in Console().render(table.rich()) if segment.style and segment.style.bold]
    assert "0.002" in bold


def test_names_of_artifacts_leave_out_the_folders_that_they_share() -> None:
    assert short_names(["/tmp/x/old/demo", "/tmp/x/new/demo"]) == {
        "/tmp/x/old/demo": "old/demo",
        "/tmp/x/new/demo": "new/demo",
    }
    assert short_names(["a", "b"]) == {"a": "a", "b": "b"}
    assert short_names(["/tmp/a"]) == {"/tmp/a": "a"}
    assert short_names(["out/a", "out/a/b"]) == {"out/a": "a", "out/a/b": "a/b"}


def test_artifacts_of_one_name_are_told_by_their_paths(run: Run, tmp_path: Path) -> None:
    twice = [folder(tmp_path / name / "demo", manifest()) for name in ("old", "new")]
    assert set(json.loads(run(*twice, "--json")[1])["artifacts"]) == {str(path) for path in twice}
    header = run(*twice)[1].splitlines()[1].split()
    assert header == ["old/demo", "new/demo"]
    run(*twice, "--html", tmp_path / "page.html")
    assert str(twice[0]) not in (tmp_path / "page.html").read_text()


def test_json_is_a_baseline_that_nothing_is_worse_than(run: Run, artifacts: tuple[Path, Path], tmp_path: Path) -> None:
    baseline = tmp_path / "baseline.json"
    baseline.write_text(run(*artifacts, "--json")[1])
    code, out, _ = run(*artifacts, "--against", baseline, "--fail-on-regression", "--json")
    assert code == 0
    assert json.loads(out)["regressions"] == []
    baseline.write_text(out)
    assert run(*artifacts, "--against", baseline)[0] == 0


def test_regression_exits_3_and_is_named_when_asked_for(run: Run, artifacts: tuple[Path, Path], tmp_path: Path) -> None:
    baseline = tmp_path / "baseline.json"
    baseline.write_text(run(artifacts[0], "--json")[1])
    code, out, err = run(artifacts[1], "--against", baseline, "--fail-on-regression", "--json")
    assert code == GateError.exit_code
    assert {one["measure"] for one in json.loads(out)["regressions"]} == {"kl_mean", "recall", "gate max_kl"}
    assert "b: kl_mean, b: recall, b: gate max_kl" in err
    assert run(artifacts[1], "--against", baseline)[0] == 0


def test_page_has_the_comparison_and_the_regressions(run: Run, artifacts: tuple[Path, Path], tmp_path: Path) -> None:
    baseline, page = tmp_path / "baseline.json", tmp_path / "page.html"
    baseline.write_text(run(artifacts[0], "--json")[1])
    run(artifacts[1], "--against", baseline, "--html", page)
    html = page.read_text()
    assert "Against the baseline" in html
    assert "<td>kl_mean</td>" in html
    run(*artifacts, "--html", page)
    assert "Against the baseline" not in page.read_text()


@pytest.mark.parametrize(
    ("now", "measures"),
    [
        (manifest(kl=0.00449), []),
        (manifest(kl=0.0046), ["kl_mean"]),
        (manifest(recall=0.961), []),
        (manifest(recall=0.959), ["recall"]),
        (manifest(slowness=1.45), []),
        (manifest(slowness=1.55), [f"tpot_ms to plain at {length}" for length in (128, 1024, 8192)]),
        (manifest(kl=0.001, recall=1.0, slowness=0.5), []),
        (manifest(limit=0.001), ["gate max_kl"]),
    ],
)
def test_regressions_are_what_exceeds_its_tolerance(now: Manifest, measures: list[str]) -> None:
    assert worse(now, manifest()) == measures


def test_regressions_name_what_is_not_measured_any_more() -> None:
    before, now = manifest(), manifest()
    assert now.report is not None
    blind = now.report.artifact.model_copy(update={"recall": None})
    now = now.model_copy(update={"report": now.report.model_copy(update={"artifact": blind})})
    assert worse(now, before) == ["recall"]
    assert worse(before, now) == []


def test_regressions_are_refused_when_there_is_no_counterpart() -> None:
    two = compared({"a": manifest(), "b": manifest()})
    assert regressions(compared({"new": manifest()}), compared({"old": manifest()})) == ()
    with pytest.raises(UsageError, match="no artifact 'c'"):
        regressions(compared({"c": manifest()}), two)
    with pytest.raises(UsageError, match="8,192 tokens, but at 4,096 in the baseline"):
        regressions(compared({"a": manifest().model_copy(update={"context": 8192})}), two)


@pytest.mark.parametrize(
    ("text", "code"),
    [(None, NotFoundError.exit_code), ("{", 2), ("[]", 2), ("{}", 2), ('{"artifacts": {"a": {}}}', 2)],
)
def test_baseline_is_refused_when_it_is_none(
    run: Run, artifacts: tuple[Path, Path], tmp_path: Path, text: str | None, code: int
) -> None:
    baseline = tmp_path / "baseline.json"
    if text is not None:
        baseline.write_text(text)
    found, out, err = run(artifacts[0], "--against", baseline)
    assert (found, out) == (code, "")
    assert "kvslim compare ARTIFACT... --json" in err


def test_compare_refuses_what_cannot_work(run: Run, artifacts: tuple[Path, Path], tmp_path: Path) -> None:
    assert run(artifacts[0], "--fail-on-regression")[0] == UsageError.exit_code
    assert run(tmp_path / "nowhere")[0] == NotFoundError.exit_code
    assert run(artifacts[0], "--html", tmp_path / "no" / "page.html")[0] == UsageError.exit_code
