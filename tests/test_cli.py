"""The command line: fast help, exit codes, one JSON object, results on stdout and the rest on stderr."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from support.tiny_artifact import SPEC, fill
from support.verbs import Run, runner

from kvslim.cli import keyboard
from kvslim.cli.inputs import read_plan, write_text
from kvslim.cli.lengths import read_lengths
from kvslim.errors import GateError, OutputError, UsageError
from kvslim.export.manifest import read_manifest, verify
from kvslim.export.package import check_output, staging
from kvslim.measures import GateResult, Measures, Report
from kvslim.recipe import Recipe, shipped_recipes
from kvslim.report.card import write_card
from kvslim.settings import Gates
from kvslim.types import Plan
from kvslim.validation.tasks import Score, TaskScores

ROOT = Path(__file__).parent.parent
VERBS = (
    "compress",
    "plan",
    "analyze",
    "sweep",
    "validate",
    "compare",
    "bench",
    "generate",
    "chat",
    "inspect",
    "verify",
    "methods",
    "recipes",
    "bundle",
    "doctor",
    "eval",
)
HEAVY = ("torch", "transformers", "onnxruntime", "onnx", "numpy", "matplotlib", "optimum")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command; returns exit code, stdout and stderr."""

    return runner(capsys)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    with staging(tmp_path / "artifact") as folder:
        fill(folder)
    return tmp_path / "artifact"


def report(passed: bool) -> Report:
    """A report with one gate and every kind of metric."""
    measured = Measures(kv_bytes_per_token=192, kl_mean=0.002, recall=0.99, tpot_ms={"128": 1.5, "1024": 2.5})
    gate = GateResult(name="max_kl", value=0.02, limit=0.01, passed=passed)
    plain, floor = measured.model_copy(update={"kv_bytes_per_token": 512.0}), Measures(kl_mean=1e-9)
    ratio = Measures(kv_bytes_per_token=0.375, tpot_ms={"128": 1.0, "1024": 1.0})
    return Report(passed=passed, gates=(gate,), plain=plain, floor=floor, artifact=measured, ratio=ratio)


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        f"import sys; from kvslim.cli.app import run; run(['--help']); print([m for m in {HEAVY} if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert done.stdout.splitlines()[-1] == "[]"
    assert min(seconds) < 0.5


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_tells_its_options(run: Run, verb: str) -> None:
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert "--json" in out


@pytest.mark.parametrize(
    ("verb", "count"), [("compress", 2), ("plan", 1), ("analyze", 1), ("validate", 1), ("bench", 1)]
)
def test_help_tells_of_the_same_texts_as_errors(run: Run, verb: str, count: int) -> None:
    _, _, err = run("analyze", "demo", "--calibration", "nowhere.txt")
    (forms,) = re.findall("fix: give self, (.+)", err)
    assert " ".join(run(verb, "--help")[1].split()).count(forms) == count


def test_help_lists_every_verb(run: Run) -> None:
    _, out, _ = run("--help")
    assert all(f"\n  {verb} " in out for verb in VERBS)


def test_version_is_the_one_in_pyproject(run: Run) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert run("--version") == (0, f"{project['version']}\n", "")


def test_packages_of_the_wheel_are_all_that_exist() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = (path.parent.relative_to(ROOT) for path in (ROOT / "kvslim").rglob("__init__.py"))
    assert set(listed) == {".".join(path.parts) for path in found} | {"kvslim.recipes"}


def test_wheel_takes_every_file_that_is_no_module() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    taken = {
        path
        for name, globs in listed.items()
        for glob in globs
        for path in ROOT.glob(f"{name.replace('.', '/')}/{glob}")
    }
    files = {path for path in (ROOT / "kvslim").rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}}
    assert files - taken == set()


@pytest.mark.parametrize(
    ("arguments", "where", "hint"),
    [
        (["comprss"], "kvslim", "compress"),
        (["compress", "demo", "--ouput", "x"], "kvslim compress", "--out"),
        (["compress", "demo"], "kvslim compress", "--out"),
        (["compress"], "kvslim compress", "MODEL"),
        (["bench", "x", "--repeats", "1"], "kvslim bench", "--repeats"),
        (["generate", "x", "-p", "y", "--max-new-tokens", "-3"], "kvslim generate", "--max-new-tokens"),
    ],
)
def test_usage_errors_name_the_command_and_a_way_out(run: Run, arguments: list[str], where: str, hint: str) -> None:
    code, out, err = run(*arguments)
    what, place, fix = err.splitlines()
    assert (code, out) == (2, "")
    assert what.startswith("error: ")
    assert hint in what
    assert place == f"  where: {where}"
    assert fix == f"  fix: see `{where} --help`"


def test_no_command_prints_the_help_and_fails(run: Run) -> None:
    code, out, _ = run()
    assert code == 2
    assert "Commands:" in out


def test_errors_are_one_json_object_when_asked(run: Run) -> None:
    code, out, err = run("recipes", "lossles", "--json")
    error = json.loads(out)["error"]
    assert code == error["exit_code"] == 5
    assert "lossless" in error["fix"]
    assert err.startswith("error: ")


def test_bugs_are_one_line_and_exit_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("by zero\nand more")

    monkeypatch.setattr("kvslim.cli.machine.examine", broken)
    code, out, err = run("doctor")
    assert (code, out) == (1, "")
    assert err.splitlines()[0] == "error: ZeroDivisionError: by zero"
    assert "KVSLIM_DEBUG=1" in err
    assert "Traceback" not in err


def test_bugs_show_the_traceback_when_debugging(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setenv("KVSLIM_DEBUG", "1")
    monkeypatch.setattr("kvslim.cli.machine.examine", broken)
    assert "in broken" in run("doctor")[2]


def test_interrupt_exits_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvslim.cli.machine.examine", interrupted)
    code, out, err = run("doctor")
    assert (code, out) == (130, "")
    assert "interrupted" in err


def test_compress_keeps_the_artifact_and_exits_3_when_a_gate_fails(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipeline = pytest.importorskip("kvslim.pipeline")
    monkeypatch.setattr(pipeline, "compress", fake_compress(passed=False))
    code, out, err = run("compress", "demo", "-o", tmp_path / "new")
    assert code == GateError.exit_code
    assert "FAILED" in out
    assert "max_kl 0.02 against 0.01" in err
    assert "expected to pass, or set the gates to what the task needs (--gate); the artifact is kept and marked" in err
    assert verify(tmp_path / "new") == ()


@pytest.mark.parametrize(
    ("command", "option"),
    [(["validate"], "--gate"), (["eval", "--tasks", "piqa", "--min-accuracy", "0.6"], "--min-accuracy")],
)
def test_verbs_that_measure_again_name_their_own_option_when_a_gate_fails(
    run: Run, artifact: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], option: str
) -> None:
    scores = {"piqa": TaskScores(items=3, shots=0, metrics={"acc": Score(value=0.5, stderr=None)})}
    monkeypatch.setattr("kvslim.pipeline.validate", lambda *_, **__: report(passed=False))
    monkeypatch.setattr("kvslim.validation.tasks.evaluate", lambda *_, **__: scores)
    code, _, err = run(*command, artifact)
    assert code == GateError.exit_code
    fix = err.partition("fix: ")[2].rstrip()
    assert fix.startswith("use a milder recipe, or set ")
    assert re.findall(r"--[a-z-]+", fix) == [option]
    assert "marked" not in fix


def test_draft_that_changes_texts_is_told_when_no_gate_fails(
    run: Run, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = report(passed=True).model_copy(update={"passed": False})
    monkeypatch.setattr("kvslim.pipeline.validate", lambda *_, **__: failed)
    code, _, err = run("validate", artifact)
    assert code == GateError.exit_code
    assert "error: texts with the draft are not those that the model writes" in err
    assert "fix: compress with --draft none" in err


def test_compress_prints_one_json_object_when_libraries_chatter(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipeline = pytest.importorskip("kvslim.pipeline")
    monkeypatch.setattr(pipeline, "compress", fake_compress(passed=True))
    code, out, err = run("compress", "demo", "-o", tmp_path / "new", "--json", "--set", "weights=int4")
    printed = json.loads(out)
    assert code == 0
    assert printed["passed"] is True
    assert set(printed) >= {"gates", "plain", "floor", "artifact", "ratio"}
    assert printed["artifact"]["perplexity"] is None
    assert "chatter" in err


def test_compress_writes_the_gates_as_junit_when_one_fails_too(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipeline = pytest.importorskip("kvslim.pipeline")
    monkeypatch.setattr(pipeline, "compress", fake_compress(passed=False))
    gates = tmp_path / "gates.xml"
    assert run("compress", "demo", "-o", tmp_path / "new", "--junit", gates)[0] == GateError.exit_code
    suite = ElementTree.parse(gates).getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == ("1", "1")


def test_validate_writes_the_gates_as_junit(
    run: Run, artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipeline = pytest.importorskip("kvslim.pipeline")
    monkeypatch.setattr(pipeline, "validate", lambda *_, **__: report(passed=True))
    assert run("validate", artifact, "--junit", tmp_path / "gates.xml")[0] == 0
    assert 'failures="0"' in (tmp_path / "gates.xml").read_text()


def test_validate_hands_gates_on(run: Run, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Gates] = []

    def validate(*_: Any, gates: Gates, **__: Any) -> Report:
        asked.append(gates)
        return report(passed=True)

    monkeypatch.setattr(pytest.importorskip("kvslim.pipeline"), "validate", validate)
    assert run("validate", artifact, "--gate", "max_kl=1e-3", "--gate", "max_recall_drop=0.02")[0] == 0
    assert asked == [Gates(max_kl=0.001, max_recall_drop=0.02)]


def test_gates_that_are_set_replace_those_of_the_recipe() -> None:
    recipe = Recipe(name="mine", gates=Gates(max_kl=0.1, max_kv_ratio=0.5))
    assert recipe.gated(Gates(max_kl=0.2)).gates == Gates(max_kl=0.2, max_kv_ratio=0.5)


@pytest.mark.parametrize(
    ("gate", "where", "hint"),
    [
        ("max_lk=1", "--gate", "did you mean 'max_kl'?"),
        ("max_kl", "--gate", "write --gate max_kl=0.01"),
        ("max_kl=much", "--gate max_kl", "valid number"),
        ("max_kl=-1", "--gate max_kl", "greater than or equal to 0"),
        ("max_kl=nan", "--gate max_kl", "finite"),
    ],
)
def test_gate_is_refused_before_any_work_when_it_is_none(
    run: Run, tmp_path: Path, gate: str, where: str, hint: str
) -> None:
    code, out, err = run("validate", tmp_path / "gone", "--gate", gate)
    assert (code, out) == (UsageError.exit_code, "")
    assert f"where: {where}\n" in err
    assert hint in err


@pytest.mark.parametrize("verb", [("compress", "demo", "-o", "out"), ("validate", "out")])
def test_junit_is_refused_before_any_work_when_it_cannot_be_written(
    run: Run, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    code, out, err = run(*verb, "--junit", tmp_path / "gone" / "gates.xml")
    assert (code, out) == (OutputError.exit_code, "")
    assert "give another --junit" in err


def fake_compress(passed: bool) -> Callable[..., Any]:
    """Stands for the pipeline: writes a small artifact with a report, and prints what it should not."""

    def compress(model: str, recipe: Any, out: Path, *, overwrite: bool, progress: Any, **_: Any) -> Any:
        print("chatter")
        progress.stage("validate")
        with staging(out, overwrite) as folder:
            fill(folder, report=report(passed))
        return read_manifest(out)

    return compress


def test_verify_exits_0_when_whole_and_4_when_not(run: Run, artifact: Path) -> None:
    assert run("verify", artifact)[0] == 0
    (artifact / "model.onnx").write_text("other")
    (artifact / "model.onnx_data").unlink()
    (artifact / "notes.txt").write_text("mine")
    code, out, err = run("verify", artifact)
    assert (code, out) == (4, "")
    problems = ("model.onnx: changed", "model.onnx_data: missing", "notes.txt: not part of this artifact")
    assert all(problem in err for problem in problems)
    code, out, _ = run("verify", artifact, "--json")
    assert (code, json.loads(out)["problems"]) == (4, list(problems))


def test_inspect_reads_a_config_without_weights(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    code, out, err = run("inspect", tmp_path, "--context", "1k,16k", "--json")
    memory = json.loads(out)
    assert (code, err) == (0, "")
    assert memory["kv_bytes_per_token"] == {"fp32": 512, "fp16": 256, "int8": 128, "int4": 64}
    assert memory["mib"]["16384"] == {"fp32": 8, "fp16": 4, "int8": 2, "int4": 1}
    assert [layer["key_dim"] for layer in memory["layers"]] == [16, 16]


def test_inspect_reads_an_artifact_from_its_manifest(run: Run, artifact: Path) -> None:
    _, out, _ = run("inspect", artifact, "--json")
    assert json.loads(out)["kv_bytes_per_token"] == {"plain": 512, "as it is": 2 * 2 * 8 + 2 * 2 * 16 * 4}


def test_inspect_hints_when_the_context_is_beyond_the_model(run: Run, artifact: Path) -> None:
    code, out, err = run("inspect", artifact, "--context", "4k")
    assert code == 0
    assert "4,096" in out
    assert "hint" in err


def test_methods_lists_the_registry(run: Run) -> None:
    assert set(json.loads(run("methods", "--json")[1])["methods"]) >= {"kv_pca", "kv_quant"}
    assert "kv_pca.rank" in run("methods")[1]


def test_recipes_lists_and_prints(run: Run) -> None:
    listed = set(json.loads(run("recipes", "--json")[1])["recipes"])
    assert listed == set(shipped_recipes()) >= {"lossless", "balanced", "small"}
    assert "balanced" in run("recipes")[1]
    assert yaml.safe_load(run("recipes", "balanced")[1])["budget"]
    assert yaml.safe_load(run("recipes", "small")[1])["budget"] == {"kv_ratio": 8}
    plain, as_json = (run("recipes", "smal", *options) for options in ([], ["--json"]))
    assert (plain[0], plain[2]) == (as_json[0], as_json[2])
    assert "where: NAME" in plain[2]


def test_doctor_finds_the_kernels(run: Run) -> None:
    code, out, _ = run("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert checks["attention, int8 cache"]["ok"]
    assert checks["attention, float32 cache"]["ok"]
    assert code == (0 if all(check["ok"] for check in checks.values()) else 4)


def test_doctor_exits_4_when_a_check_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvslim.cli.machine.MIN_DISK_GIB", 1e9)
    code, out, err = run("doctor")
    assert code == 4
    assert "FAILED" in out
    assert "disk" in err


@pytest.mark.parametrize(("text", "lengths"), [("512", (512,)), ("512,4k,16K", (512, 4096, 16384))])
def test_read_lengths_knows_k(text: str, lengths: tuple[int, ...]) -> None:
    assert read_lengths(text, "--context") == lengths


@pytest.mark.parametrize("text", ["", "0", "-1", "4,", "k", "4m", "1e3", "²"])
def test_read_lengths_refuses_what_is_no_length(text: str) -> None:
    with pytest.raises(UsageError, match="number of tokens"):
        read_lengths(text, "--context")


def test_plan_survives_its_file(tmp_path: Path) -> None:
    plan = Plan.identity(SPEC)
    write_text(tmp_path / "plan.json", plan.model_dump_json(), "--out")
    assert read_plan(tmp_path / "plan.json") == plan
    with pytest.raises(OutputError):
        write_text(tmp_path / "plan.json" / "below", "", "--out")


def test_tables_show_what_was_measured_and_nothing_else() -> None:
    from kvslim.report.tables import report_table

    markdown = report_table(report(passed=True)).markdown()
    assert "| KV cache, bytes per token | 512 | 192 | 0.375x | - |" in markdown
    assert markdown.index("context of 128") < markdown.index("context of 1024")
    assert "Perplexity" not in markdown


def test_card_has_front_matter_and_tells_of_a_failed_gate(tmp_path: Path) -> None:
    fill(tmp_path, report=report(passed=False))
    write_card(tmp_path, read_manifest(tmp_path))
    _, front, body = (tmp_path / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "text-generation"
    assert "A gate failed" in body
    assert "| max_kl | 0.02 | 0.01 | FAILED |" in body


def test_kvslim_passes_its_exit_code_on() -> None:
    command = [sys.executable, "-m", "kvslim.cli.app", "nonsense"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


def test_ctrl_c_inside_a_finalizer_is_heard_once_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    keyboard.hear_every_interrupt()
    with pytest.raises(KeyboardInterrupt):
        Dying()
        time.sleep(10)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 3.0])
@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_compress_leaves_nothing_that_looks_finished_when_killed(
    tiny_llama: Path, tmp_path: Path, kill: signal.Signals, delay: float
) -> None:
    # The recall questions alone take longer than the delays, so the signal always comes in time.
    options = ["--set", "validation.recall_items=100000", "--set", "calibration.samples=2"]
    command = [
        sys.executable,
        "-m",
        "kvslim.cli.app",
        "compress",
        str(tiny_llama),
        "-o",
        str(tmp_path / "out"),
        *options,
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not any(tmp_path.iterdir()):
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(kill)
        out, err = process.communicate()
    assert (process.returncode, out) == (130 if kill == signal.SIGINT else -kill, ""), err
    assert not (tmp_path / "out").exists()
    check_output(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
