"""Every benchmark runs on a tiny model, its rows say where they come from, and its table renders."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT
from support.tiny_decoders import save_decoder
from support.tiny_encoders import save_encoder

from benchmarks import registry, render, rows, runner
from benchmarks.memory.group import missing
from benchmarks.models import OpenModel
from benchmarks.subjects import SUBJECTS, Source, Subject
from kvslim.types import Plan

BENCHMARKS = registry.load()
SHARING = BENCHMARKS.keys() - {"families"}  # its graphs must be those of its own plans
LONG = {"recipes", "real", "encoder", "encoder-heads", "device-bound", "vs-builder"}
LONG |= {"beyond-memory", "cache-memory", "export-memory", "least-memory", "session-options"}
LIMITED = {"beyond-memory", "least-memory"}
MODULES = sorted((ROOT / "benchmarks").rglob("*.py"))
ADAPTERS = {"models.py", "encoders.py", "planners.py", "plans.py"}
INNER = ("kvslim.caches", "kvslim.prepared", "kvslim.planning", "kvslim.transform", "kvslim.export")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models, one of each kind; some layer of the decoder is neither first nor last."""
    folder = tmp_path_factory.mktemp("tiny")
    save_decoder("qwen3", folder / "families" / "qwen3", num_hidden_layers=1)
    return {
        "decoder": save_decoder("llama", folder / "decoder", num_hidden_layers=3, intermediate_size=128),
        "encoder": save_encoder("bert", "feature-extraction", folder / "encoder"),
        "families": folder / "families",
    }


@pytest.fixture
def graphs(graphs_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Export takes seconds, so two graphs of a model stand for those of all plans: the plain one and an int8 one."""
    export = OpenModel.export

    def shared(model: OpenModel, plan: Plan | None = None, codes: Any = None, companions: bool = False) -> Path:
        weights, slim = model.recipe.weights, plan not in (None, model.identity)
        folder = graphs_folder / f"{Path(model.source.model).name}-{weights.type}-{slim}"
        if not folder.exists():
            shutil.move(export(model, model.decided("kv_quant") if slim else None, companions=True), folder)
        return folder

    monkeypatch.setattr(OpenModel, "export", shared)


@pytest.fixture(scope="session")
def graphs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture
def quick_rows(models: dict[str, Path], tmp_path: Path) -> Callable[[str], list[rows.Row]]:
    """Rows of a benchmark's quick run on a tiny model."""

    def run(name: str) -> list[rows.Row]:
        benchmark, path = BENCHMARKS[name], tmp_path / "rows.jsonl"
        kind = SUBJECTS[benchmark.subjects[0]].kind
        subject = Subject("tiny", "a tiny model", lambda folder: Source(str(models[kind]), folder), kind=kind)
        runner.run(benchmark, subject, path, quick=True)
        found = rows.latest(path)
        assert len(found) == len(path.read_text().splitlines()) > 0
        return found

    return run


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.benchmarks] * (name in LONG)) for name in sorted(SHARING)]
)
def test_quick_run_leaves_rows_and_a_table(
    name: str, quick_rows: Callable[[str], list[rows.Row]], tmp_path: Path
) -> None:
    if name in LIMITED and (reason := missing()):
        pytest.skip(reason)
    found = quick_rows(name)
    _check(name, found)
    plot = BENCHMARKS[name].plot
    if plot is not None:
        render.draw(plot, found, tmp_path / "plot.svg")
        assert "</svg>" in (tmp_path / "plot.svg").read_text()


@pytest.mark.benchmarks
def test_families_compares_the_graphs_of_its_plans(quick_rows: Callable[[str], list[rows.Row]]) -> None:
    (row,) = found = quick_rows("families")
    _check("families", found)
    assert 0 < row.values["plain"] < 1e-4
    assert 0 < row.values["slim"] < 1e-2


def _check(name: str, found: list[rows.Row]) -> None:
    """Rows say where they come from, and render as a table."""
    settings = json.loads(json.dumps(BENCHMARKS[name].settings(quick=True)))
    for row in found:
        assert (row.benchmark, row.subject, row.settings) == (name, "tiny", settings)
        assert row.values
        assert list(row.versions) == list(rows.VERSIONED)
        assert row.machine.cores > 0
        assert row.machine.memory_gib > 0
    header, rule, *body = [line for line in BENCHMARKS[name].table(found).splitlines() if line.startswith("|")]
    assert header.count("|") == rule.count("|") > 2
    assert set(rule) <= set("|-: ")
    assert body


def _row(subject: str = "demo", run: int = 0, **values: object) -> rows.Row:
    return rows.row("sample", subject, {}, dict(values), rows.now() + timedelta(seconds=run))


def test_table_repeats_columns_and_shows_ranges() -> None:
    each = (render.Column("kl", "KL at {}x", ".2g"),)
    table = render.Table((render.Column("plan", "plan"),), pivot="ratio", each=each)
    found = [_row(plan="all", ratio=8, kl=0.5), _row(plan="all", ratio=16, kl=(1, 3)), _row(plan="less", ratio=8, kl=2)]
    assert table(found) == (
        "| plan | KL at 8x | KL at 16x |\n| --- | ---: | ---: |\n| all | 0.5 | 2 (1 - 3) |\n| less | 2 | - |\n"
    )


def test_several_subjects_have_a_table_each() -> None:
    table = render.Table((render.Column("plan", "plan"),))
    text = table([_row("demo", plan="a"), _row("books", plan="b")])
    assert text.startswith("The demo model, on stories:\n\n| plan |")
    assert "\n\nBooks-llama, on prose:\n\n| plan |\n| --- |\n| b |\n" in text


def test_last_run_of_each_subject_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for row in (_row("demo", plan="old"), _row("books", 1, plan="other"), _row("demo", 2, plan="new")):
        rows.append(path, row)
    assert [row.values["plan"] for row in rows.latest(path)] == ["other", "new"]


def test_list_names_benchmarks_and_why_a_subject_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("benchmarks.subjects.SMOLLM2", tmp_path / "none.gguf")
    runner.main(["--list"])
    text = capsys.readouterr().out
    assert [name for name in (*BENCHMARKS, *SUBJECTS) if f"\n{name} " not in f"\n{text}"] == []
    assert "(skipped: no build/real/smollm2.gguf" in text


def test_subject_that_is_not_here_is_skipped_or_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("benchmarks.subjects.SMOLLM2", tmp_path / "none.gguf")
    benchmark = registry.Benchmark("sample", ("smollm2", "demo"), iter, str, {})
    assert [subject.name for subject in runner.subjects_of(benchmark, None)] == ["demo"]
    assert "smollm2 skipped" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"no build/real/smollm2\.gguf"):
        runner.subjects_of(benchmark, "smollm2")
    with pytest.raises(SystemExit, match="does not take families"):
        runner.subjects_of(benchmark, "families")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_benchmarks_use_public_names_alone(path: Path) -> None:
    tree = ast.parse(path.read_text())
    private = [f"{node.lineno}: {node.attr}" for node in ast.walk(tree) if _reaches_in(node)]
    imported = [name for module, name in _imports(tree) if module.startswith("kvslim") and name.startswith("_")]
    assert private + imported == []


@pytest.mark.parametrize("path", [path for path in MODULES if path.name not in ADAPTERS], ids=lambda path: path.stem)
def test_few_modules_know_inner_parts(path: Path) -> None:
    imports = list(_imports(ast.parse(path.read_text())))
    assert [module for module, _ in imports if module.startswith(INNER)] == []
    assert "LayerPlan" not in [name for _, name in imports]


def _reaches_in(node: ast.AST) -> bool:
    """Whether an expression takes a private attribute of anything but its own object."""
    if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
        return False
    if node.attr in {"_asdict", "_replace"}:  # public parts of a named tuple
        return False
    return not (isinstance(node.value, ast.Name) and node.value.id == "self")


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Module and name of each import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
