"""An artifact is measured against the model it was made from, and a baseline against the same model: by content."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.tiny_artifact import fill
from support.tiny_report import manifest as reported

from kvslim import pipeline
from kvslim.cli import app
from kvslim.export.manifest import read_manifest, write_manifest
from kvslim.loading.source import resolve
from kvslim.report.compare import compared, regressions
from kvslim.types import Source

USAGE, MISSING = 2, 5
MODEL = "models/mine"


def trained_again(model: Path) -> list[str]:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] += np.float32(1e-6)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return []


def another_config(model: Path) -> list[str]:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    return []


def another_template(model: Path) -> list[str]:
    (model / "chat_template.jinja").write_text("{{ messages }}")
    return []


def trained_in_a_copy(model: Path) -> list[str]:
    trained_again(Path(shutil.copytree(model, "elsewhere")))
    return ["--against", "elsewhere"]


@pytest.fixture
def artifact(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact of a model that its maker named by a relative path."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, MODEL)
    folder = tmp_path / "artifact"
    folder.mkdir()
    fill(folder)
    source = Source(model=MODEL, revision=None, sha256=resolve(MODEL).sha256)
    write_manifest(folder, read_manifest(folder).model_copy(update={"source": source, "recipe": {"name": "mine"}}))
    return folder


class LoadedError(Exception):
    """The model was found to be the right one."""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Runs `kvslim validate` up to where the model would be loaded; returns exit code and stderr."""

    def load(*_: object, **__: object) -> None:
        raise LoadedError

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(pipeline, "prepare", load)
        code = app.run(["validate", *map(str, arguments)])
        return code, capsys.readouterr().err

    return call


@pytest.mark.parametrize("change", [trained_again, another_config, another_template, trained_in_a_copy])
def test_validate_refuses_a_model_that_is_not_the_one(
    artifact: Path, run: Callable[..., tuple[int, str]], change: Callable[[Path], list[str]]
) -> None:
    code, err = run(artifact, *change(Path(MODEL)))
    assert code == USAGE
    assert "the artifact was not made from" in err
    assert "--against MODEL" in err
    assert "compress it again" in err
    assert "LoadedError" not in err


def test_validate_refuses_another_model_at_the_same_path_from_another_folder(
    artifact: Path, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    trained_again(Path(shutil.copytree(MODEL, there / MODEL)))
    monkeypatch.chdir(there)
    code, err = run(artifact)
    assert (code, "the artifact was not made from 'models/mine' as it is now" in err) == (USAGE, True)
    code, err = run(artifact, "--against", tmp_path / MODEL)
    assert "LoadedError" in err


def test_validate_goes_on_with_the_same_model_under_another_name(
    artifact: Path, run: Callable[..., tuple[int, str]]
) -> None:
    assert "LoadedError" in run(artifact)[1]
    moved = Path(MODEL).rename("moved")
    (moved / "README.md").write_text("not a part of the model")
    assert "LoadedError" in run(artifact, "--against", "moved")[1]
    code, err = run(artifact, "--against", "nowhere")
    assert (code, "'nowhere' is not a model folder" in err) == (MISSING, True)


def test_compare_refuses_a_baseline_of_another_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before, now = reported(), reported()
    now = now.model_copy(update={"source": now.source.model_copy(update={"sha256": "1" * 64})})
    for name, content in {"before": before, "now": now}.items():
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, content)
    assert app.run(["compare", str(tmp_path / "before"), "--json"]) == 0
    baseline = tmp_path / "baseline.json"
    baseline.write_text(capsys.readouterr().out)
    assert app.run(["compare", str(tmp_path / "before"), "--against", str(baseline)]) == 0
    capsys.readouterr()
    assert app.run(["compare", str(tmp_path / "now"), "--against", str(baseline)]) == USAGE
    assert "the baseline is of another model" in capsys.readouterr().err


def test_compare_takes_a_baseline_that_was_written_without_digests() -> None:
    old = compared({"a": reported()})
    column = old.artifacts["a"].model_copy(update={"sha256": None})
    assert regressions(compared({"a": reported()}), old.model_copy(update={"artifacts": {"a": column}})) == ()
