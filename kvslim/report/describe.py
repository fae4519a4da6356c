"""What an artifact says of itself: model card, HTML report and manifest."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from kvslim.devices.profile import device_memory
from kvslim.export.manifest import LEAST_ONNXRUNTIME, hash_files, write_manifest
from kvslim.loading.origin import source_of
from kvslim.measures import Report
from kvslim.report.card import write_card
from kvslim.report.matrices import matrix_formats
from kvslim.report.page import write_report
from kvslim.speculative.choice import draft_of
from kvslim.types import Healing, KVLayout, Manifest, Plan, Survey

if TYPE_CHECKING:
    from kvslim.prepared.base import PreparedModel

VERSIONED = ("kvslim", "torch", "transformers", "onnx", "onnxruntime")


def describe(
    folder: Path,
    prepared: PreparedModel,
    plan: Plan,
    inputs: tuple[str, ...],
    report: Report,
    around: Survey,
    healing: Healing | None = None,
) -> Manifest:
    """Writes what describes the artifact: model card, HTML report and manifest."""
    recipe, spec = prepared.recipe, prepared.spec
    manifest = Manifest(
        source=source_of(prepared.snapshot, prepared.digest),
        spec=spec,
        context=recipe.calibration.target(spec),
        recipe=recipe.model_dump(mode="json"),
        plan=plan,
        **around._asdict(),
        healing=healing,
        kv_layout=KVLayout.of(spec, plan),
        weights=recipe.weights,
        matrices=matrix_formats(folder),
        inputs=inputs,
        draft=draft_of(recipe.draft, KVLayout.of(spec, plan), recipe.calibration.target(spec)),
        least_onnxruntime=LEAST_ONNXRUNTIME,
        versions={name: version(name) for name in VERSIONED},
        files={},
        report=report,
        passed=report.passed,
    )
    write_card(folder, manifest)
    write_report(folder, manifest, device_memory())
    manifest = manifest.model_copy(update={"files": hash_files(folder)})
    write_manifest(folder, manifest)
    return manifest
