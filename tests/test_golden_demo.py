"""What is promised of the demo model, measured through the shipped path: ONNX, onnxruntime, the cache."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from clients.runners import genai_tokens, our_tokens
from support.models import cached_logits, export_slim, open_prepared

from kvslim.demo.world import heldout_text, recall_questions
from kvslim.export.manifest import read_manifest
from kvslim.measures import Report
from kvslim.methods import KvPca
from kvslim.recipe import Recipe, load_recipe, parse_recipe
from kvslim.report.tables import plan_table
from kvslim.runtime.generate import load_tokenizer
from kvslim.runtime.session import DecodeSession
from kvslim.transform.kl_evaluator import KLEvaluator
from kvslim.types import KVLayout, Plan
from kvslim.validation.quality import measure_quality

pytestmark = [pytest.mark.golden, pytest.mark.timeout(900)]  # planning takes minutes on a busy machine
ArtifactOf = Callable[[str], Path]


def report_of(folder: Path) -> Report:
    report = read_manifest(folder).report
    assert report is not None
    return report


def test_balanced_keeps_its_promises(demo_artifact: ArtifactOf) -> None:
    report = report_of(demo_artifact("balanced"))
    assert report.passed
    assert (report.ratio.kv_bytes_per_token or 1) <= 1 / 5
    assert (report.artifact.kl_mean or 1) <= 0.01
    assert (report.plain.recall or 0) >= 0.95
    assert (report.plain.recall or 0) - (report.artifact.recall or 0) <= 0.02


def test_lossless_keeps_its_promises(demo_artifact: ArtifactOf) -> None:
    report = report_of(demo_artifact("lossless"))
    assert report.passed
    assert report.ratio.kv_bytes_per_token == 0.25
    assert (report.artifact.kl_mean or 1) <= 0.001


def test_code_of_the_card_says_the_same_in_each_client(demo_artifact: ArtifactOf) -> None:
    pytest.importorskip("onnxruntime_genai", reason="needs the extra genai")
    folder = demo_artifact("lossless")
    ours = printed_by_card(folder, "kvslim")
    assert len(ours) > 100
    assert printed_by_card(folder, "onnxruntime_genai") == "Once upon a time" + ours


def printed_by_card(folder: Path, client: str) -> str:
    """What the card's code for a client prints in the artifact's folder."""
    snippets = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    (snippet,) = [code for code in snippets if re.search(rf"^import {client}\b", code, re.MULTILINE)]
    ran = subprocess.run([sys.executable, "-c", snippet], cwd=folder, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.removesuffix("\n")


@pytest.mark.thorough
def test_small_is_an_eighth_and_loses_little(demo_artifact: ArtifactOf) -> None:
    report = report_of(demo_artifact("small"))
    assert report.passed
    assert (report.ratio.kv_bytes_per_token or 1) <= 1 / 8
    assert (report.artifact.kl_mean or 1) <= 0.005
    assert (report.plain.recall or 0) - (report.artifact.recall or 0) <= 0.01


@pytest.mark.thorough
def test_small_tells_what_the_planner_did_to_each_layer(demo_artifact: ArtifactOf) -> None:
    manifest = read_manifest(demo_artifact("small"))
    assert {(layer.cache.dtype, layer.cache.rotation) for layer in manifest.plan.layers} == {("int4", 0)}
    assert manifest.kv_layout == KVLayout.of(manifest.spec, manifest.plan)
    table = plan_table(manifest.plan).markdown()
    assert all(layer.reason in table and "expected to cost" in layer.reason for layer in manifest.plan.layers)


def test_kl_of_the_plan_in_torch_is_that_of_the_graph(demo_artifact: ArtifactOf, tmp_path: Path) -> None:
    """What the planner compares plans by, and the same text through onnxruntime and its cache."""
    folder = demo_artifact("balanced")
    prepared = open_prepared("demo", load_recipe("balanced"))
    statistics = prepared.statistics
    windows = statistics.windows[-2:]
    plan = read_manifest(folder).plan
    codes = prepared.codes(plan)
    expected = KLEvaluator(prepared.model, prepared.architecture, windows).kl(codes)
    prepared.export(Plan.identity(prepared.spec), tmp_path)
    length = windows.shape[1]
    sessions = [DecodeSession(path, capacity=length, all_positions=True) for path in (tmp_path, folder)]
    measured = measure_quality(*sessions, windows, chunk=16).kl_mean
    assert 1 / 1.2 < measured / expected < 1.2


def test_genai_says_what_we_say(demo_artifact: ArtifactOf) -> None:
    folder = demo_artifact("balanced")
    tokenizer = load_tokenizer(folder)
    (question,) = recall_questions(1, 300, lambda text: len(tokenizer.encode(text).ids))
    prompt = tokenizer.encode(question.prompt).ids
    ours = our_tokens(folder, prompt)
    assert tokenizer.decode(ours[:1]) == question.answer
    assert genai_tokens(folder, [prompt]) == [ours]


def demo_with(
    *, rank: int, objective: str = "balanced", length: int = 512, samples: int = 32, int8: bool = False
) -> Recipe:
    methods: list[object] = [{"kv_pca": {"rank": rank, "objective": objective}}]
    methods += ["kv_quant"] if int8 else []
    calibration = {"length": length, "samples": samples}
    return parse_recipe({"name": "codes", "methods": methods, "calibration": calibration}, "test")


def plain_export(folder: Path) -> Path:
    prepared = open_prepared("demo", demo_with(rank=64))
    folder.mkdir()
    prepared.export(Plan.identity(prepared.spec), folder)
    return folder


def mean_kl(plain: Path, recipe: Recipe, folder: Path, windows: np.ndarray) -> float:
    export_slim(open_prepared("demo", recipe), folder)
    length = windows.shape[1]
    teacher, student = (DecodeSession(path, capacity=length, all_positions=True) for path in (plain, folder))
    return measure_quality(teacher, student, windows, chunk=16).kl_mean


def windows_of(count: int, length: int) -> np.ndarray:
    tokenizer = open_prepared("demo", demo_with(rank=64)).tokenizer
    return np.stack([tokenizer(text).input_ids[:length] for text in heldout_text(count, words=length)])


@pytest.mark.thorough
def test_balanced_objective_beats_key_pca_at_the_same_rank(tmp_path: Path) -> None:
    plain, windows = plain_export(tmp_path / "plain"), windows_of(4, 512)
    balanced, key = (
        mean_kl(plain, demo_with(rank=32, objective=name), tmp_path / name, windows) for name in ("balanced", "key")
    )
    assert 0 < balanced < key


@pytest.mark.thorough
def test_full_rank_reproduces_the_plain_logits(tmp_path: Path) -> None:
    plain, (window,) = plain_export(tmp_path / "plain"), windows_of(1, 256)
    prepared = open_prepared(
        "demo", Recipe(name="full", methods=(KvPca(rank=64),), calibration=demo_with(rank=64).calibration)
    )
    export_slim(prepared, tmp_path / "full")
    np.testing.assert_allclose(cached_logits(tmp_path / "full", window), cached_logits(plain, window), atol=1e-4)


@pytest.mark.thorough
def test_short_calibration_serves_a_long_context(tmp_path: Path) -> None:
    """RoPE-aware moments: 256 tokens of calibration cost at most half as much again as 2,048, judged at 2,048."""
    plain, windows = plain_export(tmp_path / "plain"), windows_of(2, 2048)
    short, long = (
        mean_kl(plain, demo_with(rank=48, length=length, samples=samples, int8=True), tmp_path / str(length), windows)
        for length, samples in ((256, 64), (2048, 8))
    )
    assert 0 < short <= 1.5 * long
