from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from support.tiny_graph import write_tiny
from support.tiny_tokenizer import byte_tokenizer
from support.tiny_writer import write_writer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvslim.errors import ArtifactError, UsageError
from kvslim.runtime.generate import Sampling, eos_ids, generate_tokens, load_tokenizer, sample, stream_text
from kvslim.runtime.session import DecodeSession

TEXTS = [
    "a plain sentence, with  two spaces",
    "naïve café ☕ — 日本語のテキスト",
    "emoji 👩‍👩‍👧 and 🇨🇭 flags",
    " leading and trailing ",
]
WARM = Sampling(temperature=1.0, seed=3)
LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.25, 0.05], np.float32))


def metaspace_tokenizer() -> Tokenizer:
    """Words whose decoder strips the space in front of the first one, as Llama's does."""
    tokenizer = Tokenizer(models.WordLevel({"▁the": 0, "▁old": 1, "▁cat": 2, "s": 3, "<unk>": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_writer(tmp_path)


@pytest.fixture
def session(tmp_path: Path) -> DecodeSession:
    return DecodeSession(write_tiny(tmp_path / "tiny.onnx"), capacity=32)


@pytest.mark.parametrize("text", TEXTS)
def test_stream_equals_decode_when_characters_span_tokens(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text).ids
    for split in (0, 1, 5):
        pieces = list(stream_text(tokenizer, ids[:split], iter(ids[split:])))
        assert "".join(pieces) == tokenizer.decode(ids)[len(tokenizer.decode(ids[:split])) :]
        assert all(pieces)


def test_stream_shows_whole_characters_only_when_bytes_arrive_one_by_one() -> None:
    tokenizer = byte_tokenizer()
    assert list(stream_text(tokenizer, [], iter(tokenizer.encode("é☕👩").ids))) == ["é", "☕", "👩"]


def test_stream_shows_the_rest_when_text_ends_inside_a_character() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("a☕").ids[:-1]
    assert "".join(stream_text(tokenizer, [], iter(ids))) == tokenizer.decode(ids)


def test_stream_keeps_the_space_when_the_decoder_strips_the_first_one() -> None:
    pieces = list(stream_text(metaspace_tokenizer(), [0], iter([1, 2, 3, 0])))
    assert pieces == [" old", " cat", "s", " the"]


def test_generate_equals_argmax_of_one_shot_when_greedy(session: DecodeSession) -> None:
    tokens = list(generate_tokens(session, [1, 2, 3], max_new_tokens=8))
    session.reset()
    expected = session.step([1, 2, 3, *tokens])[2:-1].argmax(axis=-1)
    assert tokens == expected.tolist()


def test_generate_stops_before_the_token_when_it_is_a_stop_token(session: DecodeSession) -> None:
    tokens = list(generate_tokens(session, [1, 2, 3], max_new_tokens=8, sampling=WARM))
    stop = tokens[4]
    session.reset()
    stopped = list(generate_tokens(session, [1, 2, 3], max_new_tokens=8, stop={stop}, sampling=WARM))
    assert stopped == tokens[: tokens.index(stop)]


def test_generate_repeats_when_the_seed_is_the_same(session: DecodeSession) -> None:
    runs = []
    for seed in (7, 7, 8):
        session.reset()
        sampling = Sampling(temperature=3.0, seed=seed)
        runs.append(list(generate_tokens(session, [1], max_new_tokens=20, sampling=sampling)))
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


@pytest.mark.parametrize(
    "option", [{"temperature": -1.0}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_sampling_raises_usage_error_when_an_option_is_out_of_range(option: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="cannot sample"):
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
