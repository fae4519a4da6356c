from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from support.completions import tokens_after
from support.tiny_graph import write_tiny
from support.tiny_tokenizer import byte_tokenizer
from support.tiny_writer import write_writer

from kvslim.errors import ArtifactError, UsageError
from kvslim.runtime.generate import Sampler, Sampling, eos_ids, load_tokenizer, sample
from kvslim.runtime.session import DecodeSession

WARM = Sampling(temperature=1.0, seed=3)
LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.25, 0.05], np.float32))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_writer(tmp_path)


@pytest.fixture
def session(tmp_path: Path) -> DecodeSession:
    return DecodeSession(write_tiny(tmp_path / "tiny.onnx"), capacity=32)


def test_generate_equals_argmax_of_one_shot_when_greedy(session: DecodeSession) -> None:
    tokens = tokens_after(session, [1, 2, 3], 8)
    session.reset()
    expected = session.step([1, 2, 3, *tokens])[2:-1].argmax(axis=-1)
    assert tokens == expected.tolist()


def test_generate_stops_before_the_token_when_it_is_a_stop_token(session: DecodeSession) -> None:
    tokens = tokens_after(session, [1, 2, 3], 8, sampling=WARM)
    stop = tokens[4]
    session.reset()
    stopped = tokens_after(session, [1, 2, 3], 8, ends={stop}, sampling=WARM)
    assert stopped == tokens[: tokens.index(stop)]


def test_generate_repeats_when_the_seed_is_the_same(session: DecodeSession) -> None:
    runs = []
    for seed in (7, 7, 8):
        session.reset()
        runs.append(tokens_after(session, [1], 20, sampling=Sampling(temperature=3.0, seed=seed)))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"temperature": 0.0}, {1}),
        ({"temperature": 1.0, "top_k": 1}, {1}),
        ({"temperature": 1.0, "top_k": 2}, {1, 3}),
        ({"temperature": 1.0, "top_p": 0.3}, {1}),
        ({"temperature": 1.0, "top_p": 0.7}, {1, 2, 3}),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.7}, {1, 3}),
        ({"temperature": 1.0}, {0, 1, 2, 3, 4}),
    ],
)
def test_sample_draws_from_the_allowed_when_options_cut(options: dict[str, float], allowed: set[int]) -> None:
    generator = np.random.default_rng(0)
    assert {sample(LOGITS, generator, Sampling(**options)) for _ in range(400)} == allowed


def test_the_few_that_are_left_of_a_large_vocabulary_cost_little_more_than_all() -> None:
    logits = np.random.default_rng(0).standard_normal(2**18).astype(np.float32)

    def least_seconds(sampling: Sampling) -> float:
        def seconds() -> float:
            start = time.process_time()
            sample(logits, np.random.default_rng(0), sampling)
            return time.process_time() - start

        return min(seconds() for _ in range(12))

    assert least_seconds(Sampling(1.0, top_k=64, top_p=0.95)) < 2 * least_seconds(Sampling(1.0))


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-9])
def test_sample_takes_the_most_likely_when_nearly_frozen(temperature: float) -> None:
    generator = np.random.default_rng(0)
    assert {sample(LOGITS, generator, Sampling(temperature, top_p=1e-300)) for _ in range(20)} == {1}
    assert {sample(LOGITS, generator, Sampling(temperature)) for _ in range(20)} == {1}


def test_sample_follows_the_softmax_when_temperature_is_two() -> None:
    generator = np.random.default_rng(0)
    counts = np.bincount([sample(LOGITS, generator, Sampling(temperature=2.0)) for _ in range(8000)], minlength=5)
    expected = np.exp(LOGITS / 2) / np.exp(LOGITS / 2).sum()
    np.testing.assert_allclose(counts / 8000, expected, atol=0.02)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 4.0])
def test_penalty_changes_logits_of_the_text_so_far_as_in_transformers(penalty: float) -> None:
    from torch import tensor
    from transformers import RepetitionPenaltyLogitsProcessor

    generator = np.random.default_rng(5)
    tokens = [2, 7, 7]
    sampler = Sampler(Sampling(repetition_penalty=penalty), tokens)
    for _ in range(12):
        logits = generator.standard_normal(9).astype(np.float32)
        expected = RepetitionPenaltyLogitsProcessor(penalty)(tensor([tokens]), tensor(logits[None]).clone())
        tokens.append(sampler.draw(logits))
        assert tokens[-1] == int(expected.argmax())
    assert len(set(tokens[3:])) > 1


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.1},
        {"repetition_penalty": math.inf},
        {"repetition_penalty": math.nan},
    ],
)
def test_sampling_raises_usage_error_when_an_option_is_out_of_range(option: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"cannot sample|repetition penalty of"):
        Sampling(**option)


def test_tokenizer_keeps_every_token_when_the_file_asks_to_truncate(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(load_tokenizer(folder).encode("long text").ids) == 9


@pytest.mark.parametrize(("value", "expected"), [(5, {5}), ([5, 7], {5, 7}), (None, set()), (0, {0})])
def test_eos_ids_reads_every_form_when_config_names_them(folder: Path, value: object, expected: set[int]) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert eos_ids(folder) == expected


@pytest.mark.parametrize("value", ["2", [1, "2"], [0.5], 1.5])
def test_eos_ids_refuses_what_is_no_id(folder: Path, value: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ArtifactError, match="stop tokens"):
        eos_ids(folder)
