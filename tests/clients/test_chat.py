"""A chat template reaches the clients that know chats, and puts the same text together in each."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from clients.kinds import KINDS, make_artifact
from clients.runners import node_command

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEXT = "Whose lamp is red?"
EXPECTED = f"<|user|>\n{TEXT}\n<|assistant|>\n"


@pytest.fixture(scope="module")
def chat_artifact(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(tiny_model("llama"), folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    return make_artifact(folder / "model", KINDS["plain"], folder / "artifact")


@pytest.mark.clients
def test_genai_applies_the_chat_template(chat_artifact: Path) -> None:
    import onnxruntime_genai as genai

    tokenizer = genai.Tokenizer(genai.Model(str(chat_artifact)))
    messages = json.dumps([{"role": "user", "content": TEXT}])
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True) == EXPECTED


@pytest.mark.clients
def test_transformers_js_applies_the_chat_template(chat_artifact: Path) -> None:
    command = node_command(chat_artifact, TEXT, "node")
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout
    assert json.loads(printed.splitlines()[-1])["chat"] == EXPECTED


@pytest.mark.clients
def test_transformers_applies_the_chat_template(chat_artifact: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_artifact)
    messages = [{"role": "user", "content": TEXT}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == EXPECTED
