from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_graph import write_tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvslim.errors import ArtifactError, NotFoundError, UsageError
from kvslim.runtime.generate import eos_ids, generate, generate_tokens, load_tokenizer, sample, stream_text
from kvslim.runtime.session import DecodeSession

TEXTS = [
    "a plain sentence, with  two spaces",
    "naïve café ☕ — 日本語のテキスト",
    "emoji 👩‍👩‍👧 and 🇨🇭 flags",
    " leading and trailing ",
]
LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.25, 0.05], np.float32))


def byte_tokenizer() -> Tokenizer:
    """One token per byte, so that most characters take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """Words whose decoder strips the space in front of the first one, as Llama's does."""
    tokenizer = Tokenizer(models.WordLevel({"▁the": 0, "▁old": 1, "▁cat": 2, "s": 3, "<unk>": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "model.onnx", vocab=256)
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text("{}")
    return tmp_path


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
    tokens = list(generate_tokens(session, [1, 2, 3], max_new_tokens=8, temperature=1.0, seed=3))
    stop = tokens[4]
    stopped = list(generate_tokens(session, [1, 2, 3], max_new_tokens=8, stop={stop}, temperature=1.0, seed=3))
    assert stopped == tokens[: tokens.index(stop)]


def test_generate_repeats_when_the_seed_is_the_same(session: DecodeSession) -> None:
    runs = [list(generate_tokens(session, [1], max_new_tokens=20, temperature=3.0, seed=seed)) for seed in (7, 7, 8)]
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
    assert {sample(LOGITS, generator, **options) for _ in range(400)} == allowed


def test_sample_follows_the_softmax_when_temperature_is_two() -> None:
    generator = np.random.default_rng(0)
    counts = np.bincount([sample(LOGITS, generator, temperature=2.0) for _ in range(8000)], minlength=5)
    expected = np.exp(LOGITS / 2) / np.exp(LOGITS / 2).sum()
    np.testing.assert_allclose(counts / 8000, expected, atol=0.02)


@pytest.mark.parametrize("option", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_generate_raises_usage_error_when_an_option_is_out_of_range(
    session: DecodeSession, option: dict[str, float]
) -> None:
    with pytest.raises(UsageError, match="cannot sample"):
        next(generate_tokens(session, [1], max_new_tokens=1, **option))


def test_generate_yields_the_models_text_when_given_a_folder(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    text = "".join(generate(folder, "héllo", max_new_tokens=12))
    ids = tokenizer.encode("héllo").ids
    tokens = list(generate_tokens(DecodeSession(folder, capacity=32), ids, max_new_tokens=12))
    assert text == tokenizer.decode([*ids, *tokens])[len("héllo") :]


def test_generate_raises_usage_error_when_the_prompt_is_empty(folder: Path) -> None:
    with pytest.raises(UsageError, match="no tokens"):
        list(generate(folder, "", max_new_tokens=1))


def test_tokenizer_keeps_every_token_when_the_file_asks_to_truncate(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(load_tokenizer(folder).encode("long text").ids) == 9


@pytest.mark.parametrize(("value", "expected"), [(5, {5}), ([5, 7], {5, 7}), (None, set()), (0, {0})])
def test_eos_ids_reads_every_form_when_config_names_them(folder: Path, value: object, expected: set[int]) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert eos_ids(folder) == expected


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_generate_names_the_file_when_it_is_missing_or_broken(folder: Path, name: str) -> None:
    (folder / name).write_text("{")
    with pytest.raises(ArtifactError) as broken:
        generate(folder, "x", max_new_tokens=1)
    (folder / name).unlink()
    with pytest.raises(NotFoundError) as missing:
        generate(folder, "x", max_new_tokens=1)
    assert broken.value.where == missing.value.where == str(folder / name)


def test_generate_ends_where_the_model_has_no_more_positions(folder: Path) -> None:
    tokens = byte_tokenizer().encode("".join(generate(folder, "ab", max_new_tokens=12))).ids
    whole = "".join(generate(folder, "ab", max_new_tokens=12, max_context=100))
    assert byte_tokenizer().encode(whole).ids == tokens
    short = list(generate(folder, "ab", max_new_tokens=12, max_context=3))
    assert len(short) <= 1
    with pytest.raises(UsageError, match="2 tokens, the model 2 positions"):
        generate(folder, "ab", max_new_tokens=12, max_context=2)
