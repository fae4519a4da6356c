"""The code of docs/clients.md, run as it stands there, says what our own runtime says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clients.conftest import ArtifactOf
from clients.runners import NEW_TOKENS, NODE_MODULES, OPTIMUM_PYTHON, our_tokens, require, snippet
from kvslim.export.speculative import write_speculative_graph
from kvslim.runtime.generate import load_tokenizer

TEXT = "Here is a story of Mira and Oren. Mira's lamp is red. Oren"
COMMANDS = {
    "onnxruntime-genai": (sys.executable, "generate.py"),
    "transformers.js": ("node", "generate.mjs"),
    "optimum-onnx": (str(OPTIMUM_PYTHON), "generate.py"),
}
NEEDS = {"transformers.js": NODE_MODULES, "optimum-onnx": OPTIMUM_PYTHON}


@pytest.mark.clients
@pytest.mark.parametrize("client", COMMANDS)
def test_snippet_prints_our_text(artifact: ArtifactOf, tmp_path: Path, client: str) -> None:
    if client in NEEDS:
        require(NEEDS[client].exists(), client, "run `make test-clients`")
    folder = artifact("demo", "kv_pca + kv_quant")
    tokenizer = load_tokenizer(folder)
    ours = tokenizer.decode(our_tokens(folder, tokenizer.encode(TEXT).ids))
    program, script = COMMANDS[client]
    (tmp_path / script).write_text(snippet(client))
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    command = [program, script, str(folder), TEXT, str(NEW_TOKENS)]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=240).stdout
    assert len(ours.split()) > 3
    assert printed.strip() == ours.strip()


@pytest.mark.clients
@pytest.mark.parametrize(("parent", "draft"), [("plain", "kv_pca + kv_quant"), ("kv_quant", "kv_quant, int4")])
def test_draft_in_genai_leaves_the_text_as_it_is(artifact: ArtifactOf, tmp_path: Path, parent: str, draft: str) -> None:
    for name, kind in (("model", parent), ("draft", draft)):
        shutil.copytree(artifact("demo", kind), tmp_path / name)
    write_speculative_graph(tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    ours = tokenizer.decode(our_tokens(tmp_path / "model", tokenizer.encode(TEXT).ids))
    (tmp_path / "generate.py").write_text(snippet("Drafts in onnxruntime-genai"))
    command = [sys.executable, "generate.py", "model", "draft", TEXT, str(NEW_TOKENS)]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=240).stdout
    assert len(ours.split()) > 3
    assert printed.strip() == ours.strip()
