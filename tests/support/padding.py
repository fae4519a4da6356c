"""The code for batches in docs/clients.md, and what our own runtime says to the same prompts one by one."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from kvslim.runtime.generate import load_tokenizer
from kvslim.runtime.session import DecodeSession
from kvslim.runtime.writing import Completion, write
from support.docs import blocks

PROMPTS = ["Mira's lamp is red.", "No", "A longer text, with more than sixteen tokens in it", "Oren's"]
NEW_TOKENS = 6


def alone(folder: Path) -> str:
    """Texts of prompts that are completed one at a time, each on lines of its own."""
    tokenizer, texts = load_tokenizer(folder), []
    for prompt in PROMPTS:
        ids, session = tokenizer.encode(prompt).ids, DecodeSession(folder, capacity=64)
        completion = Completion(tokenizer, ids, NEW_TOKENS)  # like the code of the page, it does not stop at an end
        list(write(session, [completion], session.prefill(ids)[None]))
        texts.append(tokenizer.decode(completion.tokens) + "\n")
    return "".join(texts)


def printed(folder: Path, script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the code of the page prints, with all prompts in one batch."""
    (block,) = [block for block in blocks("python") if "padded" in block]
    script.write_text(block)
    monkeypatch.setattr(sys, "argv", [str(script), str(folder), str(NEW_TOKENS), *PROMPTS])
    capsys.readouterr()
    runpy.run_path(str(script))
    return capsys.readouterr().out
