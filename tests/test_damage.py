"""Artifacts with a flipped bit or a lost end: `verify` finds each, and `generate` answers or says what is wrong."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from support.tiny_artifact import describe
from support.tiny_graph import write_tiny
from support.tiny_tokenizer import byte_tokenizer

from kvslim.export.manifest import MANIFEST, verify

FLIPS, CUTS = 24, 6
FILES = (
    "model.onnx",
    "model.onnx_data",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    MANIFEST,
)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
# One process for all damages of a file: were one of them to end it, the last line would name it.
DRIVER = """
import contextlib, io, sys
from pathlib import Path
from kvslim.cli.app import run
folder, name, *damages = Path(sys.argv[1]), *sys.argv[2:]
whole = (folder / name).read_bytes()
for damage in damages:
    at, _, bit = damage.partition(":")
    data = bytearray(whole if bit else whole[: int(at)])
    if bit:
        data[int(at)] ^= 1 << int(bit)
    (folder / name).write_bytes(data)
    print(damage, end=" ", flush=True)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(["generate", str(folder), "-p", "hello", "--chat", "--max-new-tokens", "2", "--threads", "1"])
    lines = [line.split(":")[0] for line in err.getvalue().splitlines()]
    clear = len(lines) == 1 if code == 0 else lines == ["error", "  where", "  fix"]
    print(code, clear, repr(err.getvalue()), flush=True)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that runs, with weights beside the graph."""
    folder = tmp_path_factory.mktemp("damage") / "artifact"
    folder.mkdir()
    graph = folder / "model.onnx"
    model = onnx.load(write_tiny(graph, vocab=256))
    graph.unlink()
    onnx.save(model, graph, save_as_external_data=True, location="model.onnx_data", size_threshold=64)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "</s>"}))
    describe(folder)
    return folder


@pytest.fixture
def artifact(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "artifact"))


def damages(size: int, name: str) -> list[str]:
    """`byte:bit` to flip, and lengths to cut to."""
    chance = random.Random(name)
    flips = [f"{chance.randrange(size)}:{chance.randrange(8)}" for _ in range(FLIPS)]
    return [*flips, "0", *(str(chance.randrange(size)) for _ in range(CUTS - 1))]


def test_artifact_is_whole_before_any_damage(artifact: Path) -> None:
    assert verify(artifact) == ()
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(artifact), MANIFEST, str(10**9)], capture_output=True, text=True, check=False
    )
    assert done.stdout.split()[1:3] == ["0", "True"], done.stdout + done.stderr


@pytest.mark.parametrize("name", FILES)
def test_verify_finds_every_flip_and_cut(artifact: Path, name: str) -> None:
    path = artifact / name
    whole = path.read_bytes()
    for damage in damages(len(whole), name):
        at, _, bit = damage.partition(":")
        data = bytearray(whole if bit else whole[: int(at)])
        if bit:
            data[int(at)] ^= 1 << int(bit)
        path.write_bytes(data)
        assert finds(artifact), f"{name} {damage}"


def finds(artifact: Path) -> bool:
    """Whether the command says that the artifact is broken."""
    from kvslim.cli import app

    return app.run(["verify", str(artifact)]) == 4


@pytest.mark.parametrize("name", FILES)
def test_generate_answers_or_tells_when_a_file_is_damaged(artifact: Path, name: str) -> None:
    wanted = damages((artifact / name).stat().st_size, name)
    command = [sys.executable, "-W", "ignore", "-c", DRIVER, str(artifact), name, *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    results = [line.split(" ", 3) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"died at {done.stdout.splitlines()[-1:]}: {done.stderr}"
    assert [result[0] for result in results] == wanted
    assert [result for result in results if result[1] not in {"0", "2", "4"} or result[2] != "True"] == []
    assert "Traceback" not in done.stdout + done.stderr
