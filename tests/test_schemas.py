"""Every command's JSON is of its schema, and the keys of a version stay."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_artifact import fill
from support.tiny_report import manifest

from kvslim.cli import app
from kvslim.cli.console import schema_id
from kvslim.cli.schemas import OUTPUTS, output_type, schema_of
from kvslim.errors import NotFoundError
from kvslim.export.manifest import write_manifest
from kvslim.validation import tasks
from kvslim.validation.tasks import Score, TaskScores

KEYS = Path(__file__).with_name("json_keys.txt")
Printed = Callable[..., dict[str, Any]]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printed:
    """The JSON of a command, after a look at its schema."""

    def call(*arguments: object, name: str | None = None) -> dict[str, Any]:
        app.run([*(str(argument) for argument in arguments), "--json"])
        out = json.loads(capsys.readouterr().out)
        output_type(name or str(arguments[0])).model_validate(out)
        return dict(out)

    return call


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    folder.mkdir()
    fill(folder)
    return folder


def keys(schema: dict[str, Any], value: dict[str, Any], path: str) -> Iterator[str]:
    """Every path of keys that a schema names; `*` stands for any key, `[]` for any element."""
    if "$ref" in value:
        yield from keys(schema, schema["$defs"][value["$ref"].removeprefix("#/$defs/")], path)
    for key, inner in value.get("properties", {}).items():
        yield f"{path}.{key}"
        yield from keys(schema, inner, f"{path}.{key}")
    for kind in value.get("anyOf", ()):
        yield from keys(schema, kind, path)
    if isinstance(value.get("items"), dict):
        yield from keys(schema, value["items"], f"{path}[]")
    if isinstance(value.get("additionalProperties"), dict):
        yield from keys(schema, value["additionalProperties"], f"{path}.*")


def all_keys() -> list[str]:
    schemas = {name: schema_of(name) for name in OUTPUTS}
    return sorted({key for name, schema in schemas.items() for key in keys(schema, schema, schema_id(name))})


def test_keys_are_those_that_are_promised() -> None:
    """In a process of its own: here, another test may have registered a kind of cache."""
    now = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True).stdout.split()
    promised = KEYS.read_text().split()
    gone, new = set(promised) - set(now), set(now) - set(promised)
    assert gone == set(), "raise SCHEMA_VERSION, then: python tests/test_schemas.py > tests/json_keys.txt"
    assert new == set(), "python tests/test_schemas.py > tests/json_keys.txt"


def test_every_command_with_json_has_a_schema(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    commands = typer.main.get_command(app.app).commands  # type: ignore[attr-defined]
    with_json = {name for name, command in commands.items() if any("--json" in p.opts for p in command.params)}
    assert with_json | {"error"} == set(OUTPUTS)
    assert app.run(["schema", "verify"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$id"] == schema["properties"]["schema"]["const"] == "kvslim.verify/2"
    assert set(schema["required"]) == {"schema", "ok", "problems"}


def test_unknown_schema_is_refused_with_the_closest_name() -> None:
    with pytest.raises(NotFoundError) as caught:
        schema_of("validat")
    assert "validate" in caught.value.fix


def test_outputs_that_need_no_model_are_of_their_schemas(printed: Printed, artifact: Path) -> None:
    printed("verify", artifact)
    (artifact / "model.onnx").write_text("other")
    assert printed("verify", artifact) == {
        "schema": "kvslim.verify/2",
        "ok": False,
        "problems": ["model.onnx: changed"],
    }
    printed("inspect", artifact)
    printed("methods")
    printed("recipes")
    assert set(printed("recipes", "small")["recipes"]) == {"small"}
    printed("doctor")
    assert printed("recipes", "smal", name="error")["error"]["exit_code"] == 5


def test_outputs_of_reports_are_of_their_schemas(
    printed: Printed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = manifest()
    write_manifest(tmp_path, whole)
    monkeypatch.setattr("kvslim.pipeline.compress", lambda *_, **__: whole)
    monkeypatch.setattr("kvslim.pipeline.validate", lambda *_, **__: whole.report)
    printed("compress", "demo", "-o", tmp_path / "new")
    printed("validate", tmp_path)
    baseline = tmp_path / "baseline.json"
    baseline.write_text(json.dumps(printed("compare", tmp_path)))
    assert printed("compare", tmp_path, "--against", baseline)["regressions"] == []


def test_outputs_of_long_work_are_of_their_schemas(
    printed: Printed, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {"piqa": TaskScores(items=3, shots=0, metrics={"acc": Score(value=0.5, stderr=None)})}
    monkeypatch.setattr(tasks, "evaluate", lambda *_, **__: scores)
    judged = printed("eval", artifact, "--tasks", "piqa", "--min-accuracy", "0.6")
    assert (judged["passed"], judged["gates"][0]["name"]) == (False, "min_accuracy of piqa")


if __name__ == "__main__":
    print("\n".join(all_keys()))
