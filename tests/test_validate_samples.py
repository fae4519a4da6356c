"""Answers to compare by eye: greedy, of both graphs, after the same prompts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.completions import tokens_after
from support.tiny_graph import write_tiny
from support.tiny_tokenizer import byte_tokenizer
from support.tiny_writer import write_writer

from kvslim.measures import SampleAnswer
from kvslim.progress import Silent
from kvslim.runtime.session import DecodeSession
from kvslim.validation.samples import ANSWER, PROMPT, SAMPLES, sample_answers

WINDOWS = np.random.default_rng(0).integers(32, 127, (5, 160))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Of the plain export, which has the graph alone, and of the artifact."""
    plain, artifact = tmp_path / "plain", tmp_path / "artifact"
    for folder in (plain, artifact):
        folder.mkdir()
    write_tiny(plain / "model.onnx", vocab=256)
    write_writer(artifact)
    write_tiny(artifact / "model.onnx", vocab=256, int8=True)
    return plain, artifact


def answers(folders: tuple[Path, Path], windows: np.ndarray = WINDOWS) -> tuple[SampleAnswer, ...]:
    return sample_answers(*folders, windows, Silent())


def test_answers_are_the_most_likely_tokens_of_each_graph(folders: tuple[Path, Path]) -> None:
    found, tokenizer = answers(folders), byte_tokenizer()
    assert len(found) == SAMPLES
    for window, sample in zip(WINDOWS, found, strict=False):
        ids = window[:PROMPT].tolist()
        assert sample.prompt == tokenizer.decode(ids)
        for folder, answer in zip(folders, (sample.plain, sample.artifact), strict=True):
            tokens = tokens_after(DecodeSession(folder, capacity=160), ids, ANSWER)
            assert answer == tokenizer.decode([*ids, *tokens])[len(sample.prompt) :]


def test_prompt_and_answer_are_no_longer_than_the_text(folders: tuple[Path, Path]) -> None:
    found = answers(folders, WINDOWS[:1, :32])
    ids, tokenizer = WINDOWS[0, :16].tolist(), byte_tokenizer()
    assert [sample.prompt for sample in found] == [tokenizer.decode(ids)]
    tokens = tokens_after(DecodeSession(folders[0], capacity=64), ids, 16)
    assert found[0].plain == tokenizer.decode([*ids, *tokens])[len(found[0].prompt) :]


def test_answer_ends_where_the_model_ends_it(folders: tuple[Path, Path]) -> None:
    ids = WINDOWS[0, :PROMPT].tolist()
    end = tokens_after(DecodeSession(folders[0], capacity=160), ids, ANSWER)[3]
    (folders[1] / "generation_config.json").write_text(json.dumps({"eos_token_id": int(end)}))
    tokens = tokens_after(DecodeSession(folders[0], capacity=160), ids, ANSWER)
    tokenizer = byte_tokenizer()
    whole = tokenizer.decode([*ids, *tokens[: tokens.index(end)]])
    assert answers(folders)[0].plain == whole[len(tokenizer.decode(ids)) :]
