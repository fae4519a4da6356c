"""The scripts of examples/ print what our own runtime says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clients.conftest import ArtifactOf
from clients.runners import EXAMPLES, NEW_TOKENS, NODE_MODULES, our_tokens, require
from kvslim.runtime.generate import load_tokenizer

TEXT = "Here is a story of Mira and Oren. Mira's lamp is red. Oren"
COMMANDS = {"generate.py": sys.executable, "generate.mjs": "node"}
KINDS = ("plain", "kv_pca + kv_window + kv_quant", "kv_quant, int4", "int4 weights", "share_kv + kv_quant")
IN_NODE = [pytest.param("generate.mjs", kind, marks=pytest.mark.clients) for kind in KINDS]


@pytest.mark.parametrize("name", COMMANDS)
def test_example_is_short(name: str) -> None:
    code = [line for line in (EXAMPLES / name).read_text().splitlines() if line.strip()]
    assert len(code) < 40


@pytest.mark.parametrize(("name", "kind"), [("generate.py", "kv_quant"), *IN_NODE])
def test_example_prints_our_text(artifact: ArtifactOf, tmp_path: Path, name: str, kind: str) -> None:
    if name == "generate.mjs":
        found = NODE_MODULES.is_dir() and shutil.which("node") is not None
        require(found, "onnxruntime-node", "run `make test-clients`")
        (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    shutil.copy(EXAMPLES / name, tmp_path)
    folder = artifact("demo", kind)
    command = [COMMANDS[name], name, str(folder), TEXT, str(NEW_TOKENS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(folder)
    ours = tokenizer.decode(our_tokens(folder, tokenizer.encode(TEXT).ids))
    assert len(ours.split()) > 3
    assert done.stdout.strip() == ours.strip()
