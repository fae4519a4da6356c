"""Code that comes with a model is not run, and no verb asks whether it should be."""

from __future__ import annotations

import ast
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.harness import needs_harness
from support.paths import ROOT
from support.tiny_artifact import SPEC

from kvslim.cli import app, console
from kvslim.errors import UnsupportedError
from kvslim.loading.model import load_tokenizer
from kvslim.loading.source import resolve
from kvslim.loading.tokenizer import folder_tokenizer

PACKAGE = ROOT / "kvslim"
LOADERS = {"from_pretrained", "from_config", "load_dataset", "get_class_from_dynamic_module", "get_peft_model"}
# Each loader of the package. True: it could run code of a model, and must be told not to. The others cannot:
# PeftConfig reads JSON, get_peft_model takes a model in memory, and datasets 4 knows no scripts.
KNOWN = {
    ("loading/tokenizer.py", "AutoTokenizer.from_pretrained"): True,
    ("loading/model.py", "classes[type(config)].from_pretrained"): True,
    ("loading/gguf.py", "AutoModelForCausalLM.from_config"): True,
    ("loading/adapter.py", "PeftConfig.from_pretrained"): False,
    ("loading/adapter.py", "get_peft_model"): False,
    ("calibrate/text_source.py", "_datasets(source).load_dataset"): False,
}
CODE = "from pathlib import Path\nPath({marker!r}).touch()\nfrom transformers import {base}\nclass Mine({base}): pass\n"


@pytest.fixture(scope="module")
def calls() -> list[tuple[str, str, ast.Call]]:
    """Every call in the package: the file, the function and the call itself."""
    return [
        (path.relative_to(PACKAGE).as_posix(), ast.unparse(node.func), node)
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


def test_every_loader_is_known_and_told_to_run_no_code(calls: list[tuple[str, str, ast.Call]]) -> None:
    found = {
        (path, function): any(
            word.arg == "trust_remote_code" and ast.unparse(word.value) == "False" for word in call.keywords
        )
        for path, function, call in calls
        if function.rpartition(".")[2] in LOADERS
    }
    assert found == KNOWN


def test_only_a_conversation_and_a_file_of_prompts_read_stdin(calls: list[tuple[str, str, ast.Call]]) -> None:
    asking = {path for path, function, _ in calls if function in {"input", "getpass.getpass", "typer.prompt"}}
    assert asking == {"cli/keyboard.py"}
    texts = {path.name: path.read_text() for path in PACKAGE.rglob("*.py")}
    assert {name for name, text in texts.items() if "kvslim.cli.keyboard" in text} == {"conversation.py"}
    # The console sets it up, and takes it away from libraries.
    assert {name for name, text in texts.items() if "sys.stdin" in text} == {
        "console.py",
        "conversation.py",
        "keyboard.py",
        "prompt_file.py",
    }


class Forbidden(io.TextIOBase):
    """A stdin that must not be read."""

    def readable(self) -> bool:
        return True

    def readline(self, size: int | None = -1, /) -> Any:
        raise AssertionError("stdin was read")

    read = readline


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that a model's code makes when it is run; the answer to any question would be yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    return tmp_path / "code was run"


def with_code(source: Path, folder: Path, marker: Path, *, tokenizer: Any = None, config: Any = None) -> Path:
    """A copy of a model with code of its own, which its configs name as `auto_map`."""
    shutil.copytree(source, folder)
    (folder / "mine.py").write_text(CODE.format(marker=str(marker), base="PreTrainedTokenizerFast"))
    changes = {"tokenizer_config.json": tokenizer, "config.json": config}
    for name, change in changes.items():
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **(change or {})}))
    return folder


OWN = {"tokenizer_class": "Mine"}
CASES: dict[str, dict[str, Any]] = {
    "a pair of classes": {"tokenizer": {**OWN, "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}},
    "a fast class": {"tokenizer": {**OWN, "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}},
    "an older list": {"tokenizer": {**OWN, "auto_map": ["mine.Mine", None]}},
    "of another repository": {"tokenizer": {**OWN, "auto_map": {"AutoTokenizer": ["someone/else--mine.Mine", None]}}},
    "with a class that nobody knows": {"tokenizer": {"tokenizer_class": "Yours", "auto_map": ["mine.Mine", None]}},
}


@pytest.mark.parametrize("name", CASES)
def test_tokenizer_that_is_code_is_refused_and_not_run(
    tiny_llama: Path, tmp_path: Path, marker: Path, name: str
) -> None:
    folder = with_code(tiny_llama, tmp_path / "model", marker, **CASES[name])
    with pytest.raises(UnsupportedError, match="Python code that came with the model") as error:
        load_tokenizer(resolve(str(folder)))
    assert "auto_map" in error.value.fix
    assert not marker.exists()


def test_tokenizer_is_read_when_its_code_is_not_needed(tiny_llama: Path, tmp_path: Path, marker: Path) -> None:
    mapped = {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "PreTrainedTokenizerFast"}
    folder = with_code(tiny_llama, tmp_path / "known", marker, tokenizer=mapped)
    assert folder_tokenizer(folder).encode("ab") == folder_tokenizer(tiny_llama).encode("ab")
    fixed = with_code(tiny_llama, tmp_path / "fixed", marker, tokenizer=OWN)
    assert load_tokenizer(resolve(str(fixed))).encode("ab") == folder_tokenizer(tiny_llama).encode("ab")
    assert not marker.exists()


def test_model_code_is_not_run(tiny_llama: Path, tmp_path: Path, marker: Path) -> None:
    from kvslim.loading.model import load_model

    mapped = {"auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    snapshot = resolve(str(with_code(tiny_llama, tmp_path / "model", marker, config=mapped)))
    assert type(load_model(snapshot)).__module__.startswith("transformers.")
    assert load_tokenizer(snapshot).encode("ab")
    assert not marker.exists()


def test_plan_refuses_the_code_without_a_question(
    tiny_llama: Path, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_code(tiny_llama, tmp_path / "model", marker, **CASES["a pair of classes"])
    monkeypatch.setattr("sys.stdin", Forbidden())
    assert app.run(["plan", str(folder), "-r", "lossless"]) == UnsupportedError.exit_code
    captured = capsys.readouterr()
    assert "[y/N]" not in captured.out + captured.err
    assert not marker.exists()


@needs_harness
@pytest.mark.filterwarnings("default")
def test_eval_refuses_the_code_of_an_artifact(tiny_llama: Path, tmp_path: Path, marker: Path) -> None:
    from kvslim.validation.harness import ArtifactLM

    folder = with_code(tiny_llama, tmp_path / "artifact", marker, **CASES["an older list"])
    with pytest.raises(UnsupportedError, match="Python code"):
        ArtifactLM(folder, SPEC)
    assert not marker.exists()


def test_question_of_a_library_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = io.StringIO("y\n")
    monkeypatch.setattr("sys.stdin", typed)
    with console.libraries_apart(), pytest.raises(EOFError):
        input("run the custom code? [y/N] ")
    assert typed.read() == "y\n"
