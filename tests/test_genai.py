"""onnxruntime-genai opens an artifact unmodified and says what our own runtime says."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from models import recipe_of

from kvslim import pipeline
from kvslim.methods import KvPca, KvQuant, Method
from kvslim.runtime.generate import generate_tokens
from kvslim.runtime.session import DecodeSession
from kvslim.types import Weights

NEW_TOKENS = 24
KINDS: dict[str, tuple[tuple[Method, ...], Weights]] = {
    "plain": ((), "fp32"),
    "pca": ((KvPca(rank=8),), "fp32"),
    "pca_int8": ((KvPca(rank=8), KvQuant()), "int4"),
}


def genai_tokens(folder: Path, prompt: list[int]) -> list[int]:
    """Greedy continuation by onnxruntime-genai, with the folder's own search options but for the length."""
    if os.environ.get("KVSLIM_REQUIRE_SHARED") != "1":
        pytest.importorskip("onnxruntime_genai", reason="needs the `genai` extra")
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + NEW_TOKENS)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    tokens = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


def our_tokens(folder: Path, prompt: list[int]) -> list[int]:
    session = DecodeSession(folder, capacity=len(prompt) + NEW_TOKENS)
    return list(generate_tokens(session, prompt, max_new_tokens=NEW_TOKENS))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_ours_on_a_random_model(tiny_model: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    methods, weights = KINDS[kind]
    pipeline.compress(str(tiny_model("qwen3")), recipe_of(methods, weights), tmp_path / "out")
    prompt = [5, 17, 99, 3, 42]
    ours = our_tokens(tmp_path / "out", prompt)
    assert len(ours) > 1
    assert genai_tokens(tmp_path / "out", prompt) == ours
