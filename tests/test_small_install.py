"""The small install: what runs with it, and what the other verbs say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.paths import ROOT
from support.tiny_artifact import describe
from support.tiny_writer import write_writer

from kvslim.cli import app, machine
from kvslim.cli.kernel import _graph as model_of_kernel
from kvslim.export.manifest import read_manifest, write_manifest
from kvslim.loading.source import resolve
from kvslim.packages import beyond_small, is_installed, missing_package, required, small_install
from kvslim.types import Source

PINS = dict(pin.split("==") for pin in small_install())
DOWNLOADS = "huggingface-hub"  # of tokenizers, whose own import does without
NEVER = {"torch", "transformers", "onnx", "onnx-ir", "scipy", "sympy"}
# Run by another Python, in which nothing but the small install can be imported or is said to be installed.
ONLY_SMALL = """
import importlib, json, pkgutil, sys
from importlib import metadata
from packaging.utils import canonicalize_name

pins, commands = json.loads(sys.argv[1])
owners = metadata.packages_distributions()
find = metadata.distribution

class Only:
    def find_spec(self, name, path=None, target=None):
        names = {canonicalize_name(owner) for owner in owners.get(name.partition(".")[0], ())}
        if names and not names & {*pins, "kvslim"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def distribution(name):
    if canonicalize_name(name) not in {*pins, "kvslim"}:
        raise metadata.PackageNotFoundError(name)
    return find(name)

sys.meta_path.insert(0, Only())
metadata.distribution = distribution

from kvslim import caches, methods, runtime, serve
from kvslim.cli import app

EXCEPT = {"kvslim.caches.attention", "kvslim.runtime.evaluation"}  # for torch, and for those who validate
for package in (caches, methods, runtime, serve):
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if module.name not in EXCEPT:
            importlib.import_module(module.name)
for command in commands:
    print("code", app.run(command), file=sys.stderr, flush=True)
"""


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An artifact whose graph runs, and that says that it was made from the demo model."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    write_writer(folder)
    describe(folder)
    source = Source(model="demo", revision=None, sha256=resolve("demo").sha256)
    write_manifest(folder, read_manifest(folder).model_copy(update={"source": source}))
    return folder


def run_with_small(*commands: list[str]) -> list[tuple[int, str]]:
    """Exit code of each command, and what it wrote to stderr."""
    argument = json.dumps([PINS, commands])
    done = subprocess.run(
        [sys.executable, "-c", ONLY_SMALL, argument], input="Hello\n", capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    parts = re.split(r"^code (\d+)\n", done.stderr, flags=re.MULTILINE)
    return [(int(code), text) for text, code in zip(parts[:-1:2], parts[1::2], strict=True)]


def test_verbs_that_run_an_artifact_import_nothing_beyond_the_small_install(artifact: Path, tmp_path: Path) -> None:
    name = str(artifact)
    commands = [
        ["generate", name, "-p", "Hello", "--max-new-tokens", "2"],
        ["chat", name, "-n", "2"],
        ["bench", name, "--context", "16", "--prompt", "8", "--repeats", "3"],
        ["inspect", name, "--device", "raspberry-pi-5-8gb"],
        ["verify", name],
        ["compare", name, name, "--html", str(tmp_path / "page.html")],
        ["doctor", "--json"],
        ["methods"],
        ["recipes"],
    ]
    found = run_with_small(*commands)
    assert [code for code, _ in found] == [0] * len(commands), found


@pytest.mark.parametrize(
    "command",
    [
        ["compress", "demo", "-o", "out"],
        ["plan", "demo"],
        ["analyze", "demo"],
        ["validate", "ARTIFACT", "--against", "demo"],
        ["eval", "ARTIFACT", "--tasks", "recall.jsonl"],
        ["inspect", "demo"],
    ],
    ids=lambda command: command[0],
)
def test_other_verbs_say_what_to_install(artifact: Path, tmp_path: Path, command: list[str]) -> None:
    data = tmp_path / "recall.jsonl"
    data.write_text('{"prompt": "One two", "completion": " three"}\n')
    places = {"ARTIFACT": str(artifact), "out": str(tmp_path / "out"), "recall.jsonl": str(data)}
    ((code, text),) = run_with_small([places.get(word, word) for word in command])
    assert code == 4, text
    if command[0] == "eval":
        assert "fix: pip install 'kvslim[eval]'" in text
    else:
        assert "packages that the small install leaves out" in text
        assert "torch, transformers" in text
        assert "fix: pip install kvslim, or" in text
    assert not (tmp_path / "out").exists()


def test_help_of_every_verb_needs_no_more(artifact: Path) -> None:
    verbs = ("compress", "plan", "analyze", "validate", "eval")
    assert [code for code, _ in run_with_small(*([verb, "--help"] for verb in verbs))] == [0] * len(verbs)


def test_small_install_is_complete_and_no_larger() -> None:
    """What its packages ask for in turn, and of what KVSlim asks for all that verbs imported above."""
    asked: set[str] = set()
    for name in PINS:
        requirements = (Requirement(text) for text in metadata.requires(name) or [])
        asked |= {
            canonicalize_name(one.name)
            for one in requirements
            if one.marker is None or one.marker.evaluate({"extra": ""})
        }
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    own = {canonicalize_name(one.name) for one in (*required(), *map(Requirement, extras["serve"]))}
    assert asked - PINS.keys() == {DOWNLOADS}
    assert PINS.keys() <= asked | own
    assert not PINS.keys() & NEVER


def test_small_install_has_the_versions_that_tests_ran_with() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    assert {name: tested[name] for name in PINS} == PINS


def test_doctor_tells_a_small_install_from_a_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {one.name for one in beyond_small()}
    checks = _packages_without(missing, monkeypatch)
    assert all(check.ok for check in checks)
    assert checks[-1].name == "small install"
    assert {check.name for check in _packages_without({"gguf"}, monkeypatch) if not check.ok} == {"gguf"}
    assert {check.name for check in _packages_without(missing | {"numpy"}, monkeypatch) if not check.ok} == {"numpy"}


def _packages_without(missing: set[str], monkeypatch: pytest.MonkeyPatch) -> list[machine.Check]:
    monkeypatch.setattr(machine, "is_installed", lambda name: name not in missing)
    return list(machine._packages())


def test_module_that_no_package_has_is_a_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ModuleNotFoundError("No module named 'kvslim.nowhere'", name="kvslim.nowhere")

    assert all(is_installed(one.name) for one in required())
    assert missing_package(ModuleNotFoundError(name="kvslim.nowhere")) is None
    monkeypatch.setattr(machine, "examine", broken)
    assert app.run(["doctor"]) == 1
    assert "No module named 'kvslim.nowhere'" in capsys.readouterr().err


def test_graph_that_is_made_without_onnx_is_one_that_onnx_reads() -> None:
    checked = onnx.load_from_string(model_of_kernel("int8"))
    onnx.checker.check_model(checked)
    (node,) = checked.graph.node
    settings = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert settings["k_quant_type"] == b"PER_CHANNEL"
    assert settings["num_heads"] == 2
    assert [dim.dim_param or dim.dim_value for dim in checked.graph.input[3].type.tensor_type.shape.dim] == [
        "batch",
        2,
        "past",
        8,
    ]
    assert onnx.numpy_helper.to_array(checked.graph.initializer[0]).tolist() == np.full((1, 2, 1, 8), 1 / 32).tolist()


def test_generate_imports_only_what_it_runs(artifact: Path) -> None:
    """Recipes, methods and templates take longer to import than a small model takes to answer."""
    script = "import sys; from kvslim.cli import app; app.run(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", script, "generate", str(artifact), "-p", "Hello", "--max-new-tokens", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    imported = set(done.stderr.split())
    assert "kvslim.runtime.session" in imported
    assert not imported & {"kvslim.recipe", "kvslim.methods", "kvslim.packages", "yaml", "jinja2", "rich"}
