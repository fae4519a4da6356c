"""The examples of docs/ci.md: the script runs from a clean directory, the workflow runs the same commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from kvslim.cli.console import schema_id
from kvslim.measures import Measures
from kvslim.report.compare import Column, Comparison

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "ci.md").read_text()
RECIPE = """
methods: [{{kv_quant: {{bits: 8}}}}]
compensate: false
calibration: {{samples: 2, length: 48, context: 128}}
validation: {{samples: 2, length: 32, recall_items: 2, recall_distance: 64, prompts: [8], contexts: [8], repeats: 3}}
gates: {{max_kl: {max_kl}}}
"""


def block(language: str) -> str:
    (text,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return str(text)


def run_script(folder: Path, max_kl: float) -> tuple[int, str]:
    """Runs the page's script in a new folder that holds a recipe; returns the exit code and what it said."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE.format(max_kl=max_kl))
    given = {"MODEL": "demo", "RECIPE": "recipe.yaml", "UPLOAD_URL": (folder / "uploaded.tar.gz").as_uri()}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", block("sh")],
        cwd=folder,
        env={**os.environ, **given, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.thorough
@pytest.mark.golden
@pytest.mark.timeout(900)  # minutes on a busy machine
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_script_uploads_the_artifact_when_its_gates_hold(tmp_path: Path) -> None:
    column = Column(
        model="demo",
        recipe="recipe",
        context=128,
        passed=True,
        gates=(),
        artifact=Measures(kv_bytes_per_token=6144, kl_mean=0.1),
        ratio=Measures(),
    )
    good = tmp_path / "good"
    good.mkdir()
    (good / "baseline.json").write_text(Comparison(artifacts={"slim": column}).model_dump_json())
    code, said = run_script(good, max_kl=0.1)
    assert code == 0, said
    assert "nothing is worse than the baseline baseline.json" in said
    measured = json.loads((good / "measured.json").read_text())
    assert (measured["schema"], set(measured["artifacts"])) == (schema_id("compare"), {"slim"})
    assert failures(good) == "0"
    subprocess.run(["tar", "-xzf", good / "uploaded.tar.gz", "-C", tmp_path], check=True)
    assert (tmp_path / "slim" / "model.onnx").read_bytes() == (good / "slim" / "model.onnx").read_bytes()


@pytest.mark.golden
@pytest.mark.timeout(900)  # minutes on a busy machine
def test_script_exits_3_and_uploads_nothing_when_a_gate_fails(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    code, said = run_script(bad, max_kl=1e-12)
    assert code == 3, said
    assert "gate failed: max_kl" in said
    assert failures(bad) == "1"
    assert {path.name for path in bad.iterdir()} == {"recipe.yaml", "slim", "gates.xml"}


def failures(folder: Path) -> str | None:
    return ElementTree.parse(folder / "gates.xml").getroot().get("failures")


def test_workflow_runs_the_commands_of_the_script() -> None:
    (job,) = yaml.safe_load(block("yaml"))["jobs"].values()
    steps = [step["run"] for step in job["steps"] if "run" in step]
    said = [line for line in block("sh").splitlines() if "kvslim " in line]
    assert [line for line in steps if not line.startswith("pip install")] == said
    assert set(job["env"]) == {"MODEL", "RECIPE"}
