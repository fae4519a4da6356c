"""One function per client: the greedy continuation of a prompt, by the client's own means and defaults."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from support.completions import tokens_after
from support.paths import ROOT

from kvslim.runtime.generate import eos_ids, load_tokenizer
from kvslim.runtime.session import DecodeSession

HERE = Path(__file__).parent
EXAMPLES = ROOT / "examples"
PAGE = ROOT / "docs" / "clients.md"
NODE_MODULES = ROOT / "build" / "clients" / "node_modules"
OPTIMUM_PYTHON = ROOT / ".venv-optimum" / "bin" / "python"
NEW_TOKENS = 24
ASK_FOR_ALL = ("KVSLIM_REQUIRE_CLIENTS", "KVSLIM_REQUIRE_SHARED")


class RefusedError(Exception):
    """A client does not run the artifact; the message is its own."""


class Answer(NamedTuple):
    """A client's version, and the tokens it adds to the prompt, end token left out."""

    version: str
    tokens: list[int]


def our_tokens(folder: Path, prompt: Sequence[int], new_tokens: int = NEW_TOKENS) -> list[int]:
    session = DecodeSession(folder, capacity=len(prompt) + new_tokens)
    return tokens_after(session, prompt, new_tokens, ends=eos_ids(folder))


def require(found: bool, client: str, fix: str) -> None:
    """Skips where a client is missing, and fails where the environment asks for all of them."""
    if found:
        return
    if asking := [name for name in ASK_FOR_ALL if os.environ.get(name) == "1"]:
        pytest.fail(f"{client} is missing, and {asking[0]}=1 asks for it: {fix}")
    pytest.skip(f"needs {client}: {fix}")


def snippet(title: str) -> str:
    """The first block of code below a heading of docs/clients.md."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    found = re.search(r"```\w+\n(.+?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


def onnxruntime(folder: Path, text: str) -> Answer:
    """The example in Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["generate.py", str(folder), text, str(NEW_TOKENS)])
        scope = runpy.run_path(str(EXAMPLES / "generate.py"))
    return Answer(version("onnxruntime"), scope["tokens"])


def onnxruntime_genai(folder: Path, text: str) -> Answer:
    """Alone and in a batch of two, with one buffer for past and present and with two: all must agree."""
    prompt = load_tokenizer(folder).encode(text).ids
    other = prompt[:1] + prompt[:0:-1]
    for shared in (True, False):
        (alone,) = genai_tokens(folder, [prompt], shared_buffer=shared)
        assert genai_tokens(folder, [prompt, other], shared_buffer=shared) == [alone, our_tokens(folder, other)]
    return Answer(version("onnxruntime-genai"), alone)


def genai_tokens(
    folder: Path, prompts: Sequence[Sequence[int]], shared_buffer: bool = True, chunk: int | None = None
) -> list[list[int]]:
    """Greedy continuations of equally long prompts, with the folder's own search options but for the length.

    Args:
        folder: The artifact.
        prompts: Token ids of each.
        shared_buffer: Whether past and present are one buffer.
        chunk: Tokens of a prompt that genai runs at once; None for all.
    """
    require(find_spec("onnxruntime_genai") is not None, "onnxruntime-genai", "install the extra `genai`")
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    chunks = {} if chunk is None else {"chunk_size": chunk}
    config.overlay(json.dumps({"search": {"past_present_share_buffer": shared_buffer, **chunks}}))
    model = genai.Model(config)
    parameters = genai.GeneratorParams(model)
    length = len(prompts[0])
    parameters.set_search_options(max_length=length + NEW_TOKENS, batch_size=len(prompts))
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(prompts, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    rows = [generator.get_sequence(row)[length:].tolist() for row in range(len(prompts))]
    ends = eos_ids(folder)  # a row that ends before the other is filled up
    return [list(takewhile(lambda token: token not in ends, row)) for row in rows]


def transformers_js(folder: Path, text: str) -> Answer:
    """On Node, with local files only and onnxruntime-node."""
    return _from_process(node_command(folder, text, "node"), folder)


def transformers_js_web(folder: Path, text: str) -> Answer:
    """The browser's build on onnxruntime-web (WASM), with the files fetched over HTTP; Node stands for the browser."""
    return _from_process(node_command(folder, text, "web"), folder)


def optimum(folder: Path, text: str) -> Answer:
    """`ORTModelForCausalLM`, which takes all heads to be hidden_size / heads wide."""
    return _from_process(_optimum(folder, text, 0), folder)


def optimum_with_rank(folder: Path, text: str) -> Answer:
    """`ORTModelForCausalLM`, told the width of the first layer's cache."""
    dim = DecodeSession(folder, capacity=1).layout.tensors[0].columns
    return _from_process(_optimum(folder, text, dim), folder)


def node_command(folder: Path, text: str, build: str) -> list[str]:
    require(NODE_MODULES.is_dir() and shutil.which("node") is not None, "transformers.js", "run `make test-clients`")
    script = str(HERE / "transformers_js.mjs")
    # The optimising compiler would work on 26 MB of WASM for longer than the run takes.
    return ["node", "--liftoff-only", script, str(NODE_MODULES), build, str(folder), text, str(NEW_TOKENS)]


def _optimum(folder: Path, text: str, width: int) -> list[str]:
    require(OPTIMUM_PYTHON.is_file(), "optimum-onnx", "run `make test-clients`")
    prompt = ",".join(map(str, load_tokenizer(folder).encode(text).ids))
    return [str(OPTIMUM_PYTHON), str(HERE / "optimum_client.py"), str(folder), prompt, str(NEW_TOKENS), str(width)]


def _from_process(command: list[str], folder: Path) -> Answer:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    if done.returncode:
        raise RefusedError(done.stderr)
    answer = json.loads(done.stdout.splitlines()[-1])
    tokens = answer["tokens"]
    return Answer(answer["version"], tokens[:-1] if tokens[-1:] and tokens[-1] in eos_ids(folder) else tokens)
