"""Every `kvslim` command of README and docs runs to its end, on tiny models and with brief measurements."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.docs import blocks
from support.harness import needs_harness
from support.tiny_decoders import save_decoder
from support.tiny_encoders import save_encoder
from support.tiny_gguf import write_gguf

from kvslim.cli import app
from kvslim.devices.profile import shipped_devices
from kvslim.recipe import load_recipe

STANDS_FOR = {
    r'"?\$?\bMODEL\b"?': "./my-model",
    r'"\$RECIPE"': "recipe.yaml",
    r"compress demo\b": "compress ./my-model",
    r" < \S+": "",  # stdin is a text of the test's own
    r"--heal \w+": "--heal 2",  # steps
}
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
KEPT = ("--set", "keep_edits=true", "--draft", "lookup")
ARTIFACTS = ("artifacts/mine", "artifacts/demo", "artifacts/a", "artifacts/b", "artifacts/c", "slim")
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
HARNESS_TASK = """
task: my_task
dataset_path: json
dataset_kwargs: {data_files: {test: recall.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{prompt}}"
doc_to_target: "{{completion}}"
metric_list: [{metric: acc}]
"""
FAILS = {"--min-accuracy": 3, "lambada_openai": 5}  # a random model knows no answer; the hub is out of reach in tests
TIMED = "--time-ratio"  # its gate depends on the machine
# Ray starts once in a process: test_workers and test_sweep run these; test_edit_file those that read edits.
ELSEWHERE = r"--workers|--ray|kvslim sweep|--plan \S+edits\.safetensors"


def commands() -> list[str]:
    """Every `kvslim` command in a code block, without its comment."""
    lines = (
        part for block in blocks(r"\w*") for line in block.replace("\\\n", " ").splitlines() for part in line.split(";")
    )
    found = {re.sub(r"\s+[#>].*", "", line).strip() for line in lines}
    for placeholder, name in STANDS_FOR.items():
        found = {re.sub(placeholder, name, command) for command in found}
    return sorted(
        command for command in found if re.match(r"kvslim [a-z]", command) and not re.search(ELSEWHERE, command)
    )


@pytest.fixture
def brief_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server listens where there is room, and stops when it has started."""
    from kvslim.serve.server import listen

    async def stop(_: object) -> None:
        return

    monkeypatch.setattr("kvslim.serve.server.listen", lambda host, _: listen(host, 0))
    monkeypatch.setattr("uvicorn.Server.main_loop", stop)


@pytest.fixture(scope="module")
def brief() -> Iterator[None]:
    """Recipes measure as little as can be, unless a command says otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvslim.bundle.archive.download", lambda folder, *_: (folder / "one.whl").write_text("a wheel"))
        patch.setattr("kvslim.cli.inputs.load_recipe", lambda name, asked=(): load_recipe(name, (*BRIEF, *asked)))
        yield


def save_sure_decoder(folder: Path) -> None:
    """A tiny chat model of long contexts that is sure of its next token, so that it keeps what recipes ask for."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(save_decoder("llama", folder) / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 20
    weights["lm_head.weight"] = torch.clone(weights["model.embed_tokens.weight"]) / 20
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, values in {
        "config.json": {"max_position_embeddings": 2**15},
        "tokenizer_config.json": {"chat_template": CHAT},
    }.items():
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, brief: None) -> Path:
    """What a reader has beside these commands: models, texts, tasks, and artifacts that earlier commands made."""
    folder = tmp_path_factory.mktemp("reader")
    save_sure_decoder(folder / "my-model")
    write_gguf(folder / "my-model", folder / "model.gguf")
    save_encoder("bert", "feature-extraction", folder / "all-MiniLM-L6-v2")
    text = "".join(f"A sentence of {word}s, and of much else. " for word in ("text", "task", "letter", "number")) * 60
    for name in ("text.txt", "task.txt"):
        (folder / name).write_text(text)
    answers = [{"prompt": f"{place} follows", "completion": f" {place - 1}"} for place in range(1, 13)]
    lines = "\n".join(map(json.dumps, answers))
    for name in ("task.jsonl", "my.jsonl", "recall.jsonl", "prompts.jsonl"):
        (folder / name).write_text(lines)
    (folder / "tasks").mkdir()
    (folder / "tasks" / "my_task.yaml").write_text(HARNESS_TASK)
    (folder / "recipe.yaml").write_text("methods: [kv_quant]\n")
    (folder / "this.yaml").write_text(shipped_devices()["laptop-8gb"].read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert app.run(["compress", "./my-model", "-r", "lossless", "-o", ARTIFACTS[0], *KEPT]) == 0
        assert app.run(["compress", "./all-MiniLM-L6-v2", "-r", "encoder", "-o", "artifacts/minilm"]) == 0
        for name in ARTIFACTS[1:]:
            shutil.copytree(ARTIFACTS[0], name)
    return folder


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("brief_server")
@pytest.mark.parametrize(
    "command", [pytest.param(line, marks=needs_harness if " eval " in line else ()) for line in commands()]
)
def test_command_of_the_docs_runs(
    command: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    arguments = shlex.split(command)[1:]
    makes = arguments[0] == "compress"
    shutil.copytree(prepared, here, ignore=lambda *_: ["artifacts", "slim"] if makes else [])
    monkeypatch.chdir(here)
    if " eval " in command:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sys.stdin", io.StringIO("Who is there?\n"))
    if "--against" in arguments:
        assert app.run(["compare", "artifacts/mine", "--json"]) == 0
        (here / "baseline.json").write_text(capsys.readouterr().out)
    expected = next((code for part, code in FAILS.items() if part in command), 0)
    code = app.run(arguments)
    assert code == expected or (TIMED in command and code == 3), capsys.readouterr().err
    capsys.readouterr()
    files = [
        arguments[place + 1]
        for place, part in enumerate(arguments)
        if part in {"-o", "--csv", "--markdown", "--html", "--junit", "--measure"}
    ]
    assert [name for name in files if not (here / name).exists()] == []


def test_encoder_of_the_docs_runs(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [block for block in blocks("python") if "EncoderSession" in block]
    space: dict[str, Any] = {}
    monkeypatch.chdir(prepared)
    exec(block, space)
    assert space["embeddings"].shape == (2, 64)
