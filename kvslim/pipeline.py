"""The pipeline, top to bottom: from a Hugging Face model to a validated ONNX folder. Read this file first."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from kvslim import checks, stages
from kvslim.calibrate.text_source import check_source
from kvslim.contract import ModelSpec
from kvslim.export.manifest import read_runnable, read_whole
from kvslim.export.package import check_output, staging
from kvslim.loading.snapshot import Snapshot
from kvslim.loading.source import origin, read_spec, resolve
from kvslim.measures import Report
from kvslim.overrides import overridden
from kvslim.planning.analyze import Analysis
from kvslim.planning.analyze import analyze as analyze_layers
from kvslim.planning.decide import PlanSummary, decided, planned
from kvslim.prepared.base import PreparedModel, prepare, texts_for
from kvslim.progress import Progress, Silent
from kvslim.recipe import Recipe, parse_recipe
from kvslim.report.describe import describe
from kvslim.settings import Gates
from kvslim.types import KVLayout, Manifest, Plan
from kvslim.validation.bench import BenchResult, Grid, bench_all, least_target
from kvslim.workers.base import Workers

if TYPE_CHECKING:
    from kvslim.transform.edits import FittedPlan


def compress(
    model: str,
    recipe: Recipe,
    out: Path,
    *,
    plan: Plan | FittedPlan | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> Manifest:
    """Makes an artifact: a folder with a slim ONNX graph, and the proof of what it costs and saves.

    Args:
        model: `demo`, a folder, a .gguf file, a hub id or `id:FILE.gguf`, both also with `@revision`.
        recipe: Methods, calibration, validation and gates.
        out: The folder to make; it appears only when all is done.
        plan: Decisions to use in place of the methods' own, perhaps with what is fitted for them.
        overwrite: Whether an artifact that is already at `out` may be replaced.
        progress: Receives the progress.
        workers: Who does what can be done in pieces; None for this process.

    Returns:
        The artifact's manifest; `passed` tells whether all gates hold.

    Raises:
        KvslimError: Anything a user can mend; `out` is then as it was before.
    """
    progress = progress or Silent()
    spec, recipe = _checked(resolve(model, weights=False), recipe)
    if plan is not None:
        checks.check_plan(plan if isinstance(plan, Plan) else plan.plan, spec)
    check_output(out, overwrite)
    snapshot, recipe = _fetched(model, spec, recipe, {out: 2})
    with staging(out, overwrite) as folder:
        stages.begin("compress", spec, recipe, progress, planned=plan is not None)
        prepared = prepare(snapshot, spec, recipe, progress, workers, texts_for(plan, recipe))
        prepared.check_given(plan)
        progress.stage(stages.PLAIN)
        (plain := folder / "plain").mkdir()
        prepared.export_plain(plain)
        fitted, around = decided(prepared, plan)
        fitted, healing = prepared.healed(fitted)
        progress.stage(stages.HELD_OUT)
        evaluation = prepared.evaluation()
        progress.stage(stages.SLIM)
        prepared.install(fitted.codes)
        inputs = prepared.export(fitted.plan, folder)
        prepared.write_companions(folder, KVLayout.of(spec, fitted.plan), inputs)
        prepared.keep(fitted, folder)
        chosen = fitted.plan
        del fitted  # what was fitted takes gigabytes in a large model, and the graph has it now
        prepared.release()
        progress.stage(stages.VALIDATE)
        report = evaluation.measure(plain, folder)
        shutil.rmtree(plain)
        return describe(folder, prepared, chosen, inputs, report, around, healing)


def plan(
    model: str, recipe: Recipe, *, progress: Progress | None = None, workers: Workers | None = None
) -> PlanSummary:
    """What `compress` would decide, without a graph.

    Raises:
        KvslimError: As `compress`.
    """
    return planned(_opened(model, recipe, "plan", progress or Silent(), workers))


def analyze(
    model: str, recipe: Recipe, *, progress: Progress | None = None, workers: Workers | None = None
) -> Analysis:
    """What the calibration text of a recipe needs of a model, layer by layer and head by head.

    Raises:
        KvslimError: As `compress`.
    """
    return analyze_layers(_opened(model, recipe, "analyze", progress or Silent(), workers))


def validate(
    artifact: Path,
    *,
    against: str | None = None,
    changes: Sequence[str] = (),
    gates: Gates | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measures an artifact again, against the plain export of the model it came from (or `against`).

    Args:
        artifact: The folder.
        against: The model, where the one it was made from has moved.
        changes: Overrides of its recipe, such as `validation.source=text.txt`.
        gates: Limits beside those of its recipe, or in place of them.
        progress: Receives the progress.

    Raises:
        KvslimError: The artifact or the model cannot be read, or the artifact was made from another one.
    """
    progress = progress or Silent()
    manifest = read_whole(artifact)
    recipe = parse_recipe(overridden(manifest.recipe, changes), where=", ".join(changes) or str(artifact))
    kept = {"weights": manifest.weights, "positions": manifest.spec.max_context}
    recipe = recipe.gated(gates or Gates()).model_copy(update=kept)
    snapshot = origin(artifact, manifest.source, against)
    spec, recipe = _checked(snapshot, recipe)
    checks.check_files(snapshot, spec, recipe, {Path(tempfile.gettempdir()): 1})
    stages.begin("validate", spec, recipe, progress)
    prepared = prepare(snapshot, spec, recipe, progress, texts=("validation",), made_as=manifest.recipe)
    with tempfile.TemporaryDirectory(prefix="kvslim-") as folder:
        progress.stage(stages.PLAIN)
        prepared.export_plain(Path(folder))
        progress.stage(stages.HELD_OUT)
        evaluation = prepared.evaluation()
        prepared.release()
        progress.stage(stages.VALIDATE)
        return evaluation.measure(Path(folder), artifact)


def bench(artifacts: Sequence[Path], grid: Grid, *, progress: Progress | None = None) -> dict[str, BenchResult]:
    """Latency, energy and memory of artifacts over a grid, interleaved in one run, and drafts; by the path given.

    Raises:
        KvslimError: An artifact cannot be opened, or a length is not positive or beyond a model's positions.
    """
    manifests = [read_runnable(artifact) for artifact in artifacts]
    grid = grid.fitted([manifest.spec for manifest in manifests], least_target(manifests))
    checks.check_grid(artifacts, manifests, grid)
    return bench_all(artifacts, manifests, grid, progress or Silent())


def _checked(snapshot: Snapshot, recipe: Recipe, lack: str | None = None) -> tuple[ModelSpec, Recipe]:
    """A model's shape, and a recipe with defaults that fit it.

    All that the config tells fails here, before weights are downloaded. `lack` says what there is not without a cache.
    """
    spec = recipe.fitted(read_spec(snapshot, recipe.calibration.context))
    if lack is not None:
        checks.check_cache(spec, lack)
    recipe = recipe.shortened_to(spec)
    checks.check_recipe(recipe, spec)
    check_source(recipe.calibration.source, "recipe: calibration.source")
    check_source(recipe.validation.source, "recipe: validation.source")
    return spec, recipe


def _fetched(
    model: str, spec: ModelSpec, recipe: Recipe, graphs: Mapping[Path, int] = MappingProxyType({})
) -> tuple[Snapshot, Recipe]:
    """All files of a checked model, and the recipe with what they decide; `graphs` as for `check_files`."""
    snapshot = resolve(model)
    recipe = recipe.settled(spec, has_blocks=snapshot.has_blocks)
    checks.check_files(snapshot, spec, recipe, graphs)
    return snapshot, recipe


def _opened(model: str, recipe: Recipe, verb: str, progress: Progress, workers: Workers | None) -> PreparedModel:
    """A checked model in memory, which must have a cache."""
    spec, recipe = _checked(resolve(model, weights=False), recipe, f"nothing to {verb}")
    snapshot, recipe = _fetched(model, spec, recipe)
    stages.begin(verb, spec, recipe, progress)
    return prepare(snapshot, spec, recipe, progress, workers, ("calibration",))
