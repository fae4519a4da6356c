"""The pipeline from a model folder to an artifact, on a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.models import CALIBRATION, VALIDATION, recipe_of

from kvslim import pipeline
from kvslim.devices.profile import device_memory
from kvslim.errors import NotFoundError, UsageError
from kvslim.export.manifest import read_manifest, verify, write_manifest
from kvslim.methods import KvHdc, KvPca, KvQuant
from kvslim.recipe import Recipe
from kvslim.report.page import artifact_page
from kvslim.settings import Gates, Validation
from kvslim.types import Manifest, Plan
from kvslim.validation.bench import Grid
from kvslim.validation.samples import SAMPLES

METHODS = (KvPca(rank=8), KvQuant())


@pytest.fixture(scope="module")
def made(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    out = tmp_path_factory.mktemp("artifacts") / "tiny"
    return out, pipeline.compress(str(tiny_model("llama")), recipe_of(METHODS), out)


def test_artifact_holds_what_its_clients_read(made: tuple[Path, Manifest]) -> None:
    out, manifest = made
    assert {path.name for path in out.iterdir()} >= {
        "model.onnx",
        "model.onnx_data",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "genai_config.json",
        "kvslim.json",
        "README.md",
        "report.html",
    }
    assert (out / "report.html").read_text() == artifact_page(manifest, device_memory())
    assert "fits into every device that KVSlim knows" in (out / "report.html").read_text()
    assert not (out / "plain").exists()
    assert verify(out) == ()
    assert read_manifest(out) == manifest


def test_report_is_complete_and_its_ratios_are_of_its_columns(made: tuple[Path, Manifest]) -> None:
    report = made[1].report
    assert report is not None
    for column in (report.plain, report.artifact):
        missing = {name for name, value in column.model_dump().items() if value is None}
        assert missing == {
            "embedding_cosine_mean",
            "embedding_cosine_min",
            "retrieval_rank_correlation",
            "masked_top1_agreement",
            "latency_ms",
            "latency_quartiles_ms",
            "kl_by_position",  # no text is long enough
            "kl_beyond",
            "kl_as_run",  # the weights are not quantised
            "kl_to_original",
        }
    assert report.plain.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert report.artifact.kv_bytes_per_token == 2 * 2 * 2 * 8
    assert report.ratio.kv_bytes_per_token == 1 / 8
    assert report.plain.kl_mean == 0
    assert report.floor.kl_mean is not None
    assert report.artifact.kl_mean is not None
    assert report.artifact.kl_mean > report.floor.kl_mean
    assert set(report.plain.tpot_ms or {}) == {"32"}
    assert set(report.plain.ttft_ms or {}) == {"16"}
    assert report.smaller_than == {"fp32": 8, "fp16": 4, "q8_0": 8 * 8.5 / 32}
    for column in (report.plain, report.artifact):
        first, third = (column.tpot_quartiles_ms or {})["32"]
        assert first <= (column.tpot_ms or {})["32"] <= third
        assert (column.tokens_per_second or {})["32"] == 1000 / (column.tpot_ms or {})["32"]
        assert (column.prompt_tokens_per_second or {})["16"] == 16_000 / (column.ttft_ms or {})["16"]


def test_report_has_answers_to_compare(made: tuple[Path, Manifest]) -> None:
    report = made[1].report
    assert report is not None
    assert 1 <= len(report.samples) <= SAMPLES
    assert all(sample.prompt and sample.plain and sample.artifact for sample in report.samples)
    assert len({sample.prompt for sample in report.samples}) == len(report.samples)


def test_gates_decide_whether_the_artifact_passed(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_of(METHODS).model_copy(update={"gates": Gates(max_kl=1e-9, max_kv_ratio=0.2)})
    manifest = pipeline.compress(str(tiny_llama), recipe, tmp_path / "out")
    assert manifest.passed is False
    assert manifest.report is not None
    assert [gate.passed for gate in manifest.report.gates] == [False, True]
    assert verify(tmp_path / "out") == ()


def test_plan_predicts_the_bytes_and_survives_a_round_trip(
    tiny_llama: Path, tmp_path: Path, made: tuple[Path, Manifest]
) -> None:
    summary = pipeline.plan(str(tiny_llama), recipe_of(METHODS))
    assert summary.kv_bytes_per_token == made[1].kv_layout.bytes_per_token(made[1].context)
    assert summary.plain_kv_bytes_per_token == 512
    edited = json.loads(summary.plan.model_dump_json())
    edited["layers"][1] |= {"cache": {"kind": "full", "rank": 16, "stored": "int8"}, "reason": "by hand"}
    plan = Plan.model_validate(edited)
    manifest = pipeline.compress(str(tiny_llama), recipe_of(METHODS), tmp_path / "out", plan=plan)
    assert manifest.plan == plan
    assert [tensor.dim for tensor in manifest.kv_layout.tensors] == [8, 8, 16, 16]
    assert (manifest.frontier, manifest.alike, manifest.peers) == ((), summary.alike, summary.peers)
    assert [point.kv_ratio for point in manifest.alike] == [4, 8, 16]
    assert [point.name for point in manifest.peers] == ["genai int8", "genai int4"]


def test_plan_decides_alone_when_the_recipe_names_other_methods(tiny_llama: Path, tmp_path: Path) -> None:
    plan = pipeline.plan(str(tiny_llama), recipe_of([KvPca(rank=8), KvHdc(bits=4)])).plan
    manifest = pipeline.compress(str(tiny_llama), recipe_of([KvQuant()]), tmp_path / "out", plan=plan)
    assert manifest.plan == plan
    assert {(tensor.dim, tensor.dtype) for tensor in manifest.kv_layout.tensors} == {(8, "int4")}


def test_validate_repeats_the_quality_of_the_report(made: tuple[Path, Manifest]) -> None:
    out, manifest = made
    report = pipeline.validate(out)
    assert manifest.report is not None
    for name in ("kl_mean", "top1_agreement", "perplexity", "recall", "kv_bytes_per_token"):
        assert getattr(report.artifact, name) == pytest.approx(getattr(manifest.report.artifact, name), rel=1e-3)


def test_validate_asks_for_the_model_when_it_is_gone(made: tuple[Path, Manifest], tmp_path: Path) -> None:
    _, manifest = made
    moved = manifest.model_copy(update={"source": manifest.source.model_copy(update={"model": str(tmp_path / "gone")})})
    write_manifest(tmp_path, moved)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(NotFoundError) as error:
        pipeline.validate(tmp_path)
    assert "--against" in error.value.fix


def test_bench_measures_each_artifact(made: tuple[Path, Manifest]) -> None:
    out, manifest = made
    (result,) = pipeline.bench([out], Grid(prompts=(8,), contexts=(16,), threads=(1,), repeats=3)).values()
    assert [(timing.metric, timing.tokens) for timing in result.timings] == [("ttft_ms", 8), ("tpot_ms", 16)]
    assert result.kv_bytes_per_token == manifest.kv_layout.bytes_per_token(16)
    assert result.peak_rss_mib > 10


def test_bench_refuses_contexts_beyond_the_positions(made: tuple[Path, Manifest]) -> None:
    with pytest.raises(UsageError, match="2049 tokens are more than the 2048 positions of") as caught:
        pipeline.bench([made[0]], Grid(prompts=(8,), contexts=(2049,), threads=(1,), repeats=3))
    assert (caught.value.where, caught.value.fix) == ("--context", "--context 2048")
    with pytest.raises(UsageError, match="2049 tokens") as caught:
        pipeline.bench([made[0]], Grid(prompts=(2049,), contexts=(8,), threads=(1,), repeats=3))
    assert (caught.value.where, caught.value.fix) == ("--prompt", "--prompt 2048")


def test_bench_times_the_last_token_that_fits(made: tuple[Path, Manifest]) -> None:
    (result,) = pipeline.bench([made[0]], Grid(prompts=(8,), contexts=(2048,), threads=(1,), repeats=3)).values()
    assert [timing.tokens for timing in result.timings] == [8, 2047]


def test_text_file_serves_calibration_and_validation(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    recipe = Recipe(
        name="file",
        methods=METHODS,
        calibration=CALIBRATION.model_copy(update={"source": str(text)}),
        validation=Validation.model_validate({**VALIDATION.model_dump(), "source": str(text)}),
    )
    assert pipeline.compress(str(tiny_llama), recipe, tmp_path / "out").passed


def test_weights_are_checked_before_the_output_is_touched(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        pipeline.compress(str(tiny_llama), recipe_of([KvPca(rank=12)]), tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()
