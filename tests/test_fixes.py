"""What an error says to type works when it is typed."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from support.paths import ROOT
from support.tiny_artifact import fill

from kvslim import pipeline
from kvslim.calibrate.corpus import text_windows
from kvslim.cli import app
from kvslim.devices.profile import load_device
from kvslim.errors import KvslimError, UsageError
from kvslim.loading.tokenizer import folder_tokenizer
from kvslim.recipe import load_recipe
from kvslim.settings import Gates

READY = 77


class ReadyError(KvslimError):
    """All checks are passed, and the model would be loaded."""

    exit_code = READY


@pytest.fixture(autouse=True)
def no_loading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(*_: object, **__: object) -> None:
        raise ReadyError("ready", where="here", fix="none")

    monkeypatch.setattr(pipeline, "prepare", load)
    monkeypatch.chdir(tmp_path)


# Every text in the package with a command or a --set in it, apart from docstrings and help; the cases below type each.
PRINTED = {
    ("calibrate/corpus.py", ", or shorter windows (--set {key}={most})"),
    ("checks.py", "make an artifact with `kvslim compress MODEL -r encoder -o OUT`"),
    ("checks.py", "make one for this model with `kvslim plan MODEL -o plan.json`"),
    ("checks.py", "--set {key}={length.most}"),
    ("checks.py", "--set positions={least}"),
    ("checks.py", "give a GGUF file that is quantised, or write --set weights=int4"),
    ("checks.py", "use `-r encoder`"),
    ("checks.py", "use `-r balanced`"),
    ("cli/baseline.py", "write one with `kvslim compare ARTIFACT... --json > baseline.json`"),
    ("cli/failures.py", "see `{command} --help`"),
    ("cli/peers.py", "`kvslim compress MODEL -o OUT`"),
    ("cli/peers.py", "`kvslim compress MODEL -o OUT --weights int4`"),
    ("cli/peers.py", "`kvslim generate ARTIFACT -p TEXT`"),
    ("cli/peers.py", "`kvslim eval ARTIFACT --tasks NAME`"),
    ("cli/inputs.py", "write one with `kvslim plan MODEL -o plan.json`"),
    ("cli/inputs.py", "see `kvslim plan MODEL --json`"),
    ("cli/inputs.py", "see `kvslim compress --help`"),
    ("devices/profile.py", "write one with `kvslim doctor --measure FILE.yaml`"),
    ("devices/profile.py", "see docs/devices.md, or write one with `kvslim doctor --measure FILE.yaml`"),
    ("methods/kv_window.py", "--set {key}={2 * kept}"),
    ("overrides.py", "--set calibration.samples=32"),
    ("overrides.py", "set one of its options, such as --set methods.{keys[-1]}.OPTION=VALUE; see `kvslim methods`"),
    ("prepared/sentences.py", "give a text of some hundred sentences, with --set calibration.samples=256"),
    ("prepared/trials.py", "use `-r encoder`"),
    ("recipe.py", "start from `kvslim recipes balanced`"),
    ("report/compare.py", "write it again with `kvslim compare ARTIFACT... --json`"),
    (
        "report/compare.py",
        "if it was trained or saved again, write a new baseline with `kvslim compare ARTIFACT... --json`",
    ),
}
# Options of other programs, by the modules that tell of them or call them.
OF_OTHERS = {
    "bundle/wheels.py": "--dest --disable-pip-version-check --implementation --no-deps --only-binary --python-version "
    "--quiet",
    "loading/gguf.py": "--merge",
    "report/card.py": "--local-dir",
    "workers/cluster.py": "--head",
}
TYPED = re.compile(r"--set [a-z{][^ ]*=|`(kvslim|\{command\}) [^`]*-[^`]*`|`kvslim [a-z]+ [a-z]+`|`-r ")


def texts(path: Path) -> Iterator[str]:
    """Every text in a module; no docstrings, no help."""
    tree = ast.parse(path.read_text())
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
        elif (isinstance(node, ast.keyword) and node.arg == "help") or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            skipped.add(id(node.value))
    for node in ast.walk(tree):
        if id(node) not in skipped and isinstance(node, ast.JoinedStr):
            parts = (
                part.value if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
                for part in node.values
            )
            yield "".join(map(str, parts))
        elif id(node) not in skipped and isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_text_with_something_to_type_is_known() -> None:
    package = ROOT / "kvslim"
    found = {
        (path.relative_to(package).as_posix(), text)
        for path in package.rglob("*.py")
        for text in texts(path)
        if TYPED.search(text)
    }
    assert found == PRINTED


def test_every_option_that_is_named_is_one() -> None:
    command: Any = typer.main.get_command(app.app)
    verbs = (command, *command.commands.values())
    known = {option for verb in verbs for one in verb.params for option in one.opts} | {"--help"}
    package = ROOT / "kvslim"
    found: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        options = {option for text in texts(path) for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)}
        found[path.relative_to(package).as_posix()] = options - known
    assert {name: options for name, options in found.items() if options} == {
        name: set(options.split()) for name, options in OF_OTHERS.items()
    }


@dataclass(frozen=True)
class Inputs:
    """What commands are given: models with few positions, artifacts, and files that are wrong."""

    root: Path
    tiny: Path

    def model(self, **config: Any) -> Path:
        """The tiny Llama with another config; its weights are never read."""
        folder = self.root / "model"
        shutil.copytree(self.tiny, folder)
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**written, **config}))
        return folder

    def encoder(self) -> Path:
        folder = self.model()
        config = {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 130, "vocab_size": 257}))
        return folder

    def artifact(self) -> Path:
        folder = self.root / "artifact"
        if not folder.exists():
            folder.mkdir()
            fill(folder)
        return folder

    def file(self, name: str, text: str) -> Path:
        (self.root / name).write_text(text)
        return self.root / name

    def sets(self, *overrides: str) -> list[str]:
        return [word for override in overrides for word in ("--set", override)]


Case = Callable[[Inputs], list[object]]
# What fails, and the exit code of what its fix says to type.
CASES: dict[str, tuple[Case, int]] = {
    "a length beyond the positions": (
        lambda i: ["plan", i.model(max_position_embeddings=300), "-r", "lossless", *i.sets("validation.length=301")],
        READY,
    ),
    "every length beyond the positions": (
        lambda i: [
            "plan",
            i.model(max_position_embeddings=77),
            *i.sets("validation.length=512", "validation.prompts=[8,128]", "validation.contexts=[77]"),
            *i.sets("calibration.length=78", "validation.recall_distance=60"),
        ],
        READY,
    ),
    "a target context beyond the positions": (
        lambda i: ["plan", i.model(max_position_embeddings=300), "-r", "small", *i.sets("calibration.context=4096")],
        READY,
    ),
    "lengths beyond the positions that are asked for": (
        lambda i: ["plan", i.tiny, "-r", "lossless", *i.sets("positions=100", "validation.length=200")],
        READY,
    ),
    "positions without room for a question": (
        lambda i: ["plan", i.tiny, "-r", "lossless", *i.sets("positions=16")],
        READY,
    ),
    "lengths of an encoder": (
        lambda i: [
            "compress",
            i.encoder(),
            "-r",
            "encoder",
            "-o",
            "out",
            *i.sets("validation.prompts=[32,131]", "validation.length=300"),
        ],
        READY,
    ),
    "a window that no text leaves": (
        lambda i: ["plan", i.tiny, "-r", i.file("lazy.yaml", "methods: [{kv_window: {lazy: 1, window: 600}}]")],
        READY,
    ),
    "blocks of a model that has none": (lambda i: ["plan", i.tiny, *i.sets("weights=stored")], READY),
    "a --set that is none": (lambda i: ["plan", i.tiny, *i.sets("samples")], READY),
    "a decoder's recipe for an encoder": (lambda i: ["compress", i.encoder(), "-o", "out"], READY),
    "an encoder's recipe for a decoder": (lambda i: ["compress", i.tiny, "-r", "encoder", "-o", "out"], READY),
    "a plan of an encoder": (lambda i: ["plan", i.encoder()], READY),
    "a plan of an encoder with a decoder's recipe": (lambda i: ["plan", i.encoder(), "-r", "small"], READY),
    "an analysis of an encoder": (lambda i: ["analyze", i.encoder()], READY),
    "a plan for another model": (
        lambda i: ["compress", i.tiny, "-o", "out", "--plan", i.file("p.json", '{"layers": [{"layer": 0}]}')],
        READY,
    ),
    "no plan": (lambda i: ["compress", i.tiny, "-o", "out", "--plan", "gone.json"], READY),
    "a plan with a wrong key": (
        lambda i: ["compress", i.tiny, "-o", "out", "--plan", i.file("p.json", '{"layers": 3}')],
        READY,
    ),
    "a budget out of range": (lambda i: ["compress", i.tiny, "-o", "out", "--kv-ratio", "0"], 0),
    "an option that is unknown": (lambda i: ["bench", i.artifact(), "--contexts", "4"], 0),
    "no baseline": (lambda i: ["compare", i.artifact(), "--against", "gone.json"], 0),
    "a baseline of other artifacts": (
        lambda i: ["compare", i.artifact(), "--against", i.file("b.json", '{"artifacts": {}}')],
        0,
    ),
    "no device": (lambda i: ["inspect", i.tiny, "--device", "gone.yaml"], 0),
    "a device without numbers": (lambda i: ["inspect", i.tiny, "--device", i.file("d.yaml", "name: mine")], 0),
    "a verb of llama.cpp": (lambda i: ["quantize", i.tiny], READY),
    "a verb of optimum-cli": (lambda i: ["export", i.tiny], READY),
    "a recipe that is a list": (lambda i: ["plan", i.tiny, "-r", i.file("r.yaml", "- kv_pca")], 0),
    "a method that is replaced": (lambda i: ["plan", i.tiny, "-r", "lossless", *i.sets("methods.kv_quant=4")], 0),
}


@pytest.fixture
def inputs(tmp_path: Path, tiny_llama: Path) -> Inputs:
    return Inputs(tmp_path, tiny_llama)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is quickly measured and has nothing wrong."""
    monkeypatch.setattr("kvslim.devices.measure.measure_device", lambda: load_device("laptop-8gb"))
    monkeypatch.setattr("kvslim.cli.machine.examine", tuple)


def typed(fix: str, arguments: list[str], where: str, artifact: Path) -> list[str]:
    """The command that a fix asks for: one of its own, or the one that failed with other options."""
    command = re.search(r"`kvslim ([^`>]+)", fix)
    if command is None:
        kept = " ".join(arguments).removesuffix(where).split()
        return kept + shlex.split(" ".join(re.findall(r"--set \S+|(?<=`)-r \w+", fix)))
    places = {"MODEL": arguments[1], "ARTIFACT...": str(artifact), "OUT": "out", "FILE.yaml": "mine.yaml"}
    return [places.get(word, word) for word in shlex.split(command[1])]


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("name", CASES)
def test_fix_works_when_it_is_typed(inputs: Inputs, capsys: pytest.CaptureFixture[str], name: str) -> None:
    case, code = CASES[name]
    arguments = [str(argument) for argument in case(inputs)]
    assert app.run(arguments) in {2, 4, 5}
    _, where, fix = re.split("where: |fix: ", capsys.readouterr().err)
    again = typed(fix, arguments, where.strip(), inputs.artifact())
    assert again != arguments, fix
    assert app.run(again) == code, f"{fix}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("name", Gates.model_fields)
def test_limit_that_a_gate_is_told_to_have_is_one(
    inputs: Inputs, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert app.run(["validate", str(inputs.artifact()), "--gate", name]) == UsageError.exit_code
    gate = re.findall(r"--gate (\S+=\S+)", capsys.readouterr().err)[0]
    assert getattr(Gates.model_validate(dict([gate.split("=")])), name) == 0.01


@pytest.mark.parametrize(
    ("tokens", "shorter"), [(200, "validation.length=200"), (33, "validation.length=33"), (20, "")]
)
def test_shorter_windows_are_as_long_as_the_text(tiny_llama: Path, tokens: int, shorter: str) -> None:
    tokenizer = folder_tokenizer(tiny_llama)
    Path("words.txt").write_text("a" * tokens)
    with pytest.raises(UsageError) as error:
        text_windows("words.txt", tokenizer, samples=2, length=512, key="validation.length")
    assert re.findall(r"--set ([^ )]+)", error.value.fix) == ([shorter] if shorter else [])
    if shorter:
        length = load_recipe("lossless", [shorter]).validation.length
        assert text_windows("words.txt", tokenizer, samples=2, length=length).shape == (1, tokens)


def test_sentences_are_asked_for_in_a_way_that_works() -> None:
    assert load_recipe("encoder", ["calibration.samples=256"]).calibration.samples == 256
