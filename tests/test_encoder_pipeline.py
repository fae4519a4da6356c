"""Encoders from the command line: artifact, report, refusals."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.tiny_encoders import save_encoder
from support.tiny_graph import write_tiny
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from kvslim.calibrate.sentences import mask_tokens, sentences
from kvslim.cli import app
from kvslim.errors import ArtifactError, UnsupportedError, UsageError
from kvslim.export.manifest import read_manifest, verify
from kvslim.loading.source import read_spec, resolve
from kvslim.runtime.encoder import EncoderSession
from kvslim.validation.encoder import Answers, compare

BRIEF = (
    "--set=validation.samples=12",
    "--set=validation.length=64",
    "--set=validation.prompts=[16]",
    "--set=validation.repeats=3",
)
# Random weights leave near-ties between tokens, which the shipped limit is not made for.
LOOSE = ("--set=gates.min_masked_top1_agreement=0.5",)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    save_encoder("bert", "feature-extraction", folder / "plain")
    save_encoder("roberta", "fill-mask", folder / "masked")
    return folder


@pytest.fixture(scope="module")
def artifact(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifacts") / "masked"
    assert app.run(["compress", str(models / "masked"), "-r", "encoder", "-o", str(out), *BRIEF, *LOOSE]) == 0
    return out


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = app.run(arguments)
    return code, capsys.readouterr().err


def without_weights(models: Path, folder: Path, **changes: object) -> Path:
    """A model folder whose config may be read but whose weights may not."""
    config = json.loads((models / "plain" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    (folder / "model.safetensors").write_text("no weights at all")
    return folder


def test_compress_measures_embeddings_and_not_tokens_when_there_is_no_head(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compress", str(models / "plain"), "-r", "encoder", "-o", str(tmp_path / "out"), *BRIEF, "--json"]
    assert app.run(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert [gate["name"] for gate in report["gates"]] == ["min_embedding_cosine"]
    artifact, floor = report["artifact"], report["floor"]
    assert 0.99 < artifact["embedding_cosine_min"] <= artifact["embedding_cosine_mean"] < 1 - 1e-6
    assert floor["embedding_cosine_min"] > 1 - 1e-6
    assert set(artifact["latency_ms"]) == {"16"}
    assert report["ratio"]["file_mib"] < 1
    for name in ("kv_bytes_per_token", "kl_mean", "recall", "ttft_ms", "tpot_ms", "masked_top1_agreement"):
        assert artifact[name] is None


def test_artifact_is_whole_and_says_what_it_is(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    assert verify(artifact) == ()
    assert (manifest.spec.task, manifest.kv_layout.tensors) == ("fill-mask", ())
    assert manifest.inputs == ("input_ids", "attention_mask")
    assert manifest.report is not None
    assert 0.5 < (manifest.report.artifact.masked_top1_agreement or 0) <= 1
    assert manifest.report.floor.masked_top1_agreement == 1
    assert not (artifact / "genai_config.json").exists()
    card = (artifact / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card
    assert "Same most likely masked token" in card
    assert "cache" not in card
    assert re.findall(r'<figure class="(\w+)"', (artifact / "report.html").read_text()) == ["latency"]


def test_session_embeds_texts_as_their_tokens(artifact: Path) -> None:
    session = EncoderSession(artifact)
    texts = ["a lamp is red", "the whole village goes to sleep"]
    found = session.encode(texts, batch=1)
    assert found.shape == (2, 64)
    tokens = AutoTokenizer.from_pretrained(artifact)(texts[0]).input_ids
    assert len(tokens) == len(texts[0]) + 2
    hidden = session.hidden_states(np.array([tokens]), np.ones((1, len(tokens)), np.int64))
    np.testing.assert_allclose(found[0], hidden[0].mean(0), atol=1e-5)


def test_validate_measures_the_same_embeddings_again(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["validate", str(artifact), "--json"]) == 0
    again, first = json.loads(capsys.readouterr().out), read_manifest(artifact).report
    assert first is not None
    for name in ("embedding_cosine_mean", "embedding_cosine_min", "masked_top1_agreement"):
        assert again["artifact"][name] == pytest.approx(getattr(first.artifact, name), abs=1e-6)


def test_bench_times_texts(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["bench", str(artifact), "--prompt", "8,16", "--batch", "1,2", "--repeats", "3", "--json"]) == 0
    (column,) = json.loads(capsys.readouterr().out)["artifacts"].values()
    points = [(timing["metric"], timing["batch"], timing["tokens"]) for timing in column["timings"]]
    assert points == [("latency_ms", batch, tokens) for batch in (1, 2) for tokens in (8, 16)]
    assert column["peak_rss_mib"] > 10


def test_bench_refuses_texts_beyond_the_positions(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = refused(["bench", str(artifact), "--prompt", "200"], capsys)
    assert (code, "158 positions" in message) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["compress", "{encoder}", "-o", "{out}"], "-r encoder"),
        (["compress", "demo", "-r", "encoder", "-o", "{out}"], "-r balanced"),
        (["plan", "{encoder}", "-r", "encoder"], "compress MODEL -r encoder"),
        (["generate", "{artifact}", "-p", "hello"], "embed"),
    ],
)
def test_misfits_name_the_way_out_and_leave_nothing(
    models: Path, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], fix: str
) -> None:
    places = {"encoder": models / "plain", "artifact": artifact, "out": tmp_path / "out"}
    code, message = refused([argument.format(**places) for argument in arguments], capsys)
    assert code == UnsupportedError.exit_code
    assert fix in message
    assert list(tmp_path.iterdir()) == []


def test_recipe_is_refused_before_weights_are_loaded(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = str(without_weights(models, tmp_path))
    code, message = refused(["compress", bare, "-r", "lossless", "-o", str(tmp_path / "out")], capsys)
    assert (code, "kv_quant" in message) == (4, True)


@pytest.mark.parametrize(
    "changes", [{"is_decoder": True}, {"position_embedding_type": "relative_key"}, {"num_attention_heads": 5}]
)
def test_config_is_refused_when_its_encoder_is_not_supported(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object]
) -> None:
    model = without_weights(models, tmp_path, **changes)
    code, message = refused(["compress", str(model), "-r", "encoder", "-o", str(tmp_path / "out")], capsys)
    assert (code, "config.json" in message) == (4, True)


def test_spec_counts_positions_from_the_padding_token_when_the_family_does(models: Path) -> None:
    assert read_spec(resolve(str(models / "masked"))).max_context == 158
    assert read_spec(resolve(str(models / "plain"))).max_context == 160


def test_session_refuses_a_decoder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not an encoder"):
        EncoderSession(write_tiny(tmp_path / "model.onnx"))


def test_session_refuses_texts_without_tokens(artifact: Path) -> None:
    with pytest.raises(UsageError, match="without tokens"):
        EncoderSession(artifact).encode([])


def test_session_names_a_token_that_the_model_does_not_know(artifact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(artifact, tmp_path / "copy")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["wizard"])
    tokenizer.save(str(folder / "tokenizer.json"))
    session = EncoderSession(folder)
    assert session.encode(["a lamp"]).shape == (1, 64)
    with pytest.raises(UsageError, match="'wizard' is token"):
        session.encode(["a lamp", "a wizard"])


def test_sentences_are_distinct_and_of_many_lengths_when_no_text_is_given() -> None:
    found = sentences("self", samples=100)
    assert len(set(found)) == 100
    assert len({text.count(" ") for text in found}) > 10
    assert sentences("self", samples=100) == found


def test_sentences_come_from_the_whole_file_when_one_is_given(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"Sentence number {i} is here. And another, {i}!" for i in range(50)))
    found = sentences(str(path), samples=10)
    assert (len(found), found[0], found[-1]) == (10, "Sentence number 0 is here.", "And another, 49!")


def test_sentences_need_no_spaces_where_the_script_has_none(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("今天天气很好。我们去公园玩。\n你好\n“Yes.”\n" * 3, encoding="utf-8")
    assert sentences(str(path), samples=10) == ["今天天气很好。", "我们去公园玩。"]


def test_measures_that_are_no_numbers_are_none() -> None:
    good = np.random.default_rng(0).random((6, 4)).astype(np.float32)
    broken = Answers(np.full_like(good, np.nan), None)
    found = compare(Answers(good, None), broken)
    assert found["embedding_cosine_mean"] is None
    assert found["embedding_cosine_min"] is None


def test_sentences_are_refused_when_there_is_but_one(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("One sentence alone.")
    with pytest.raises(UsageError, match="1 sentences"):
        sentences(str(path), samples=10)


def test_masks_spare_special_tokens_and_touch_a_share_of_the_others() -> None:
    texts = [[2, *range(10, 50), 3], [2, 9, 3], [2, 3]]
    held_out = mask_tokens(texts, 4, {2, 3, 4}, seed=0)
    assert [int(target.sum()) for target in held_out.targets] == [6, 1, 0]
    for text, masked, target in zip(texts, held_out.masked, held_out.targets, strict=True):
        assert masked == [4 if hidden else token for token, hidden in zip(text, target, strict=True)]
        assert not target[0]
        assert not target[-1]
