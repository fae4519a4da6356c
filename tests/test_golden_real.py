"""A real model, SmolLM2-135M-Instruct, through the shipped path: from GGUF to KL through onnxruntime and its cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.paths import ROOT

from kvslim.measures import Report
from kvslim.pipeline import compress
from kvslim.recipe import parse_recipe

pytestmark = [pytest.mark.golden, pytest.mark.timeout(900)]
MODEL = ROOT / "build" / "real" / "smollm2.gguf"
BRIEF = {"samples": 2, "length": 256, "recall_items": 12, "prompts": [16], "contexts": [16], "repeats": 3}


@pytest.fixture(scope="module")
def smollm2() -> str:
    """The model's file; `make build/real/smollm2.gguf` brings it."""
    if not MODEL.is_file():
        if os.environ.get("KVSLIM_REQUIRE_REAL") == "1":
            pytest.fail(f"{MODEL} is missing, and KVSLIM_REQUIRE_REAL=1 asks for it")
        pytest.skip("needs the real model: make build/real/smollm2.gguf")
    return str(MODEL)


def report_with(smollm2: str, shared: Path, out: Path, *methods: object) -> Report:
    """Calibrated on an encyclopedia, judged on prose."""
    text = shared / "text"
    settings = {
        "methods": methods,
        "compensate": False,
        "calibration": {"source": str(text / "wikitext2-valid.txt"), "samples": 4, "length": 256},
        "validation": {"source": str(text / "heldout.txt"), **BRIEF},
    }
    report = compress(smollm2, parse_recipe({"name": "real", **settings}, "test"), out).report
    assert report is not None
    return report


def test_int8_and_int4_codes_lose_as_little_as_promised(smollm2: str, shared: Path, tmp_path: Path) -> None:
    codes = {"kv_hdc": {"bits": 4, "granularity": "per_channel"}}
    quarter = report_with(smollm2, shared, tmp_path / "int8", {"kv_quant": {"bits": 8}})
    eighth = report_with(smollm2, shared, tmp_path / "int4", "kv_pca", codes)
    assert (quarter.ratio.kv_bytes_per_token, eighth.ratio.kv_bytes_per_token) == (1 / 4, 1 / 8)
    assert 0 < (quarter.artifact.kl_mean or 1) <= 0.0015
    assert (eighth.artifact.kl_mean or 1) <= 0.07
    assert 15 < (quarter.plain.perplexity or 0) < 100
