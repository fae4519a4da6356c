"""`import kvslim`: the functions behind the commands, and the examples of docs/api.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.modules import modules_after
from support.numbers_of_a_model import SPEC as MODEL
from support.paths import ROOT
from support.tiny_artifact import describe
from support.tiny_decoders import save_decoder
from support.tiny_writer import write_writer

import kvslim
from kvslim.errors import NotFoundError, UnsupportedError, UsageError
from kvslim.export.manifest import read_manifest, write_manifest
from kvslim.recipe import Recipe, load_recipe
from kvslim.settings import Gates
from kvslim.types import Plan

HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "pydantic", "numpy"}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
BRIEF = (
    "calibration.samples=8",
    "calibration.length=128",
    "validation.samples=2",
    "validation.length=128",
    "validation.recall_items=4",
    "validation.recall_distance=32",
    "validation.prompts=[16]",
    "validation.contexts=[16]",
    "validation.repeats=3",
)
Call = dict[str, Any]


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An artifact that runs, with a chat template."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    write_writer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    describe(folder)
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What the functions pass on to the pipeline."""
    seen: list[Call] = []

    def recorder(name: str) -> Callable[..., str]:
        def record(*positional: object, **named: object) -> str:
            seen.append({"name": name, "positional": positional, **named})
            return name

        return record

    for name in ("compress", "plan", "analyze", "validate", "bench"):
        monkeypatch.setattr(f"kvslim.pipeline.{name}", recorder(name))
    return seen


def test_import_brings_in_nothing_else() -> None:
    modules = modules_after("import kvslim")
    assert modules & HEAVY == set()
    assert {name for name in modules if name.startswith("kvslim")} == {"kvslim"}


def test_functions_stay_what_they_are_when_packages_are_imported() -> None:
    """Importing a subpackage sets it as an attribute of its parent, so none may have the name of a function."""
    code = (
        "import kvslim, kvslim.cli.app, kvslim.pipeline, kvslim.planning.probes, kvslim.validation.gates\n"
        "assert {getattr(kvslim, name).__module__ for name in kvslim.__all__} == {'kvslim.api'}"
    )
    assert "kvslim.api" in modules_after(code)


def test_names_are_listed() -> None:
    assert set(kvslim.__all__) == {"analyze", "bench", "compress", "load", "plan", "validate"}
    assert set(kvslim.__all__) <= set(dir(kvslim))
    with pytest.raises(AttributeError, match="no attribute 'comprss'"):
        _ = kvslim.comprss  # type: ignore[attr-defined]


def test_text_is_generated_without_torch(artifact: Path) -> None:
    code = f"import kvslim; list(kvslim.load({str(artifact)!r}).generate('hello', max_new_tokens=2))"
    assert modules_after(code) & {"torch", "transformers"} == set()


def test_onnxruntime_reports_to_nobody(artifact: Path, tmp_path: Path) -> None:
    """Its wheels keep an identifier and what they will send in the user's folder, but not in CI or in its own tests."""
    quiet = {"CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "XDG_CACHE_HOME"}
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in quiet} | {"HOME": str(home)}
    code = f"import kvslim; list(kvslim.load({str(artifact)!r}).generate('hello', max_new_tokens=2))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    assert not list(home.rglob("*"))


def test_compress_takes_names_and_paths(calls: list[Call]) -> None:
    assert kvslim.compress("demo", "balanced", "out") == "compress"
    (call,) = calls
    assert call["positional"] == ("demo", load_recipe("balanced"), Path("out"))
    assert (call["plan"], call["overwrite"], call["progress"]) == (None, False, None)


def test_recipe_is_a_name_a_path_or_an_object(calls: list[Call], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("methods: [kv_quant]\n")
    recipe = load_recipe(str(file))
    for given in (file, str(file), recipe):
        kvslim.plan(Path("model"), given)
    assert [call["positional"] for call in calls] == [("model", recipe)] * 3
    with pytest.raises(NotFoundError, match="no recipe 'balancd'"):
        kvslim.compress("demo", "balancd", "out")


def test_plan_and_overwrite_are_passed_on(calls: list[Call]) -> None:
    plan = Plan.identity(MODEL)
    kvslim.compress("demo", "lossless", Path("out"), plan=plan, overwrite=True)
    assert (calls[0]["plan"], calls[0]["overwrite"]) == (plan, True)


def test_analyze_reads_the_text_of_the_task(calls: list[Call]) -> None:
    kvslim.analyze("demo", data=Path("task.txt"))
    kvslim.analyze("demo")
    recipes = [call["positional"][1] for call in calls]
    assert all(isinstance(recipe, Recipe) for recipe in recipes)
    assert [recipe.calibration.source for recipe in recipes] == ["task.txt", "self"]


def test_validate_takes_gates_as_a_mapping(calls: list[Call]) -> None:
    kvslim.validate("a", gates={"max_kl": 0.5}, against=Path("model"))
    assert calls[0]["positional"] == (Path("a"),)
    assert (calls[0]["against"], calls[0]["gates"]) == ("model", Gates(max_kl=0.5))
    with pytest.raises(UsageError, match="max_kll"):
        kvslim.validate("a", gates={"max_kll": 0.5})


@pytest.mark.parametrize("wrong", [{"speculative": "often"}, {"repeats": 1}, {"contexts": ["long"]}])
def test_bench_names_the_argument_that_does_not_fit(calls: list[Call], wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(wrong))}.*: input should be .*"):
        kvslim.bench("a", **wrong)
    assert not calls


def test_bench_takes_one_artifact_or_several(calls: list[Call]) -> None:
    kvslim.bench("a")
    kvslim.bench(["a", Path("b")], prompts=[16], contexts=[32], threads=[1, 2], batches=[4], repeats=3)
    (first, grid), (both, other) = (call["positional"] for call in calls)
    assert (first, both) == ([Path("a")], [Path("a"), Path("b")])
    assert (grid.prompts, grid.contexts, grid.threads, grid.batches) == ((128, 512), (128, 1024), (None,), (1,))
    assert (other.prompts, other.contexts, other.threads, other.batches, other.repeats) == (
        (16,),
        (32,),
        (1, 2),
        (4,),
        3,
    )


def test_generate_streams_pieces_of_the_text(artifact: Path) -> None:
    text = kvslim.load(str(artifact))
    pieces = text.generate("hello", max_new_tokens=12)
    assert isinstance(pieces, Iterator)
    shown = list(pieces)
    assert all(shown)
    assert "".join(shown) == "".join(text.generate("hello", max_new_tokens=12)) != ""


def test_seed_and_temperature_draw_the_text(artifact: Path) -> None:
    text = kvslim.load(artifact)

    def drawn(**options: Any) -> str:
        return "".join(text.generate("hello", max_new_tokens=16, **options))

    assert drawn(temperature=1.5, seed=1) == drawn(temperature=1.5, seed=1) != drawn(temperature=1.5, seed=2)
    assert drawn() == drawn(seed=3) == drawn(temperature=1.5, top_k=1) == drawn(temperature=1.5, top_p=1e-6)
    (batch,) = text.generate_batch(["hello"], max_new_tokens=16, temperature=1.5, top_k=1)
    assert batch == drawn()
    with pytest.raises(UsageError, match="temperature"):
        text.generate("hello", temperature=-1)


def test_messages_go_through_the_template(artifact: Path) -> None:
    text = kvslim.load(artifact)
    messages = [{"role": "user", "content": "hello"}]
    assert list(text.generate(messages, max_new_tokens=8)) == list(text.generate("<user>hello", max_new_tokens=8))


def test_stop_string_ends_the_text(artifact: Path) -> None:
    text = kvslim.load(artifact)
    whole = "".join(text.generate("hello", max_new_tokens=24))
    stop = whole[3:5]
    assert "".join(text.generate("hello", max_new_tokens=24, stop=stop)) == whole[: whole.index(stop)]
    assert "".join(text.generate("hello", max_new_tokens=24)) == whole
    with pytest.raises(UsageError, match="empty"):
        text.generate("hello", stop=["", "x"])


def test_artifact_that_cannot_write_text_is_refused(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such artifact"):
        kvslim.load(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="more than the model's 512 positions"):
        kvslim.load(artifact, context=1024)
    manifest = read_manifest(artifact)
    encoder = manifest.spec.model_copy(update={"task": "feature-extraction"})
    write_manifest(artifact, manifest.model_copy(update={"spec": encoder}))
    with pytest.raises(UnsupportedError, match="encoder"):
        kvslim.load(artifact)


@pytest.mark.filterwarnings("default")
def test_examples_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    config = save_decoder("llama", tmp_path / "model") / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": TEMPLATE}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kvslim.recipe.load_recipe", lambda name, asked=(): load_recipe(name, (*BRIEF, *asked)))
    space: dict[str, Any] = {}
    exec(code.replace('"demo"', '"./model"'), space)
    assert read_manifest(Path("artifacts/demo")) == space["manifest"]
    assert len(space["answer"]) > 0
    assert "no-such-model" in capsys.readouterr().out
