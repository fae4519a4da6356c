"""A small but valid artifact folder, without a graph that runs."""

from __future__ import annotations

from pathlib import Path

from kvslim.caches import FullCache
from kvslim.contract import ModelSpec
from kvslim.export.manifest import hash_files, write_manifest
from kvslim.measures import Report
from kvslim.types import Draft, KVLayout, LayerPlan, Manifest, Plan, Source

SPEC = ModelSpec(
    model_type="llama",
    layers=2,
    hidden_size=64,
    q_heads=4,
    kv_heads=2,
    head_dim=16,
    vocab_size=257,
    max_context=512,
    windows=(None, None),
)


def fill(folder: Path, text: str = "weights", report: Report | None = None) -> None:
    """Writes a small but valid artifact into `folder`."""
    (folder / "model.onnx").write_text(text)
    (folder / "model.onnx_data").write_bytes(bytes(range(256)))
    describe(folder, report)


def describe(folder: Path, report: Report | None = None, draft: Draft | None = None) -> None:
    """Writes a manifest for the files that are in `folder`."""
    plan = Plan(layers=(LayerPlan(layer=0, cache=FullCache(rank=8, stored="int8")), LayerPlan(layer=1)))
    manifest = Manifest(
        source=Source(model="demo", revision=None, sha256="0" * 64),
        spec=SPEC,
        context=64,
        recipe={"name": "balanced", "gates": {"max_kl": 0.001}},
        plan=plan,
        kv_layout=KVLayout.of(SPEC, plan),
        weights="fp32",
        inputs=("input_ids", "attention_mask"),
        versions={"kvslim": "0.1.0"},
        draft=draft,
        files=hash_files(folder),
        report=report,
        passed=report.passed if report else None,
    )
    write_manifest(folder, manifest)
