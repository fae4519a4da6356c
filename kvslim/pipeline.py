"""The pipeline, top to bottom: from a Hugging Face model to a validated ONNX folder. Read this file first."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from kvslim.calibrate.corpus import check_source
from kvslim.checks import check_context, check_encoders, check_layout, check_lengths, check_plan, check_task
from kvslim.contract import Frozen, ModelSpec
from kvslim.devices.profile import device_memory
from kvslim.errors import NotFoundError, UnsupportedError, UsageError
from kvslim.export.manifest import hash_files, read_manifest, write_manifest
from kvslim.export.package import check_output, staging
from kvslim.load.encoders import encoder_inputs
from kvslim.load.source import Snapshot, check_weights, read_spec, resolve
from kvslim.plan.analyze import Analysis
from kvslim.progress import Progress, Silent
from kvslim.recipe import Gates, Recipe, parse_recipe
from kvslim.report.card import write_card
from kvslim.report.page import write_report
from kvslim.types import KVLayout, Manifest, Plan, PlanPoint, Report, Source
from kvslim.validate.bench import BenchResult, Grid, bench_decoders, bench_encoders
from kvslim.validate.encoder import measure_encoder
from kvslim.validate.measure import measure

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics
    from kvslim.encoder_workshop import EncoderWorkshop
    from kvslim.transform.edits import LayerEdit
    from kvslim.workshop import Workshop

VERSIONED = ("kvslim", "torch", "transformers", "onnx", "onnxruntime")


class PlanSummary(Frozen):
    """What `compress` would decide, and the cache it would give."""

    plan: Plan
    kv_bytes_per_token: float
    plain_kv_bytes_per_token: float
    kl: float = Field(description="mean KL measured in torch on calibration text that no projection was fitted to")
    frontier: tuple[PlanPoint, ...] = Field((), description="what the planner saw at other sizes, the largest first")


def compress(
    model: str,
    recipe: Recipe,
    out: Path,
    *,
    plan: Plan | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Makes an artifact: a folder with a slim ONNX graph, and the proof of what it costs and saves.

    Args:
        model: `demo`, a folder, a hub id or `id@revision`.
        recipe: Methods, calibration, validation and gates.
        out: The folder to make; it appears only when all is done.
        plan: Decisions to use in place of the methods' own.
        overwrite: Whether an artifact that is already at `out` may be replaced.
        progress: Hears of stages and steps.

    Returns:
        The artifact's manifest; `passed` tells whether all gates hold.

    Raises:
        KvslimError: Anything a user can mend; `out` is then as it was before.
    """
    progress = progress or Silent()
    snapshot, spec = _checked(model, recipe, plan)
    check_output(out, overwrite, needed_bytes=4 * _weight_bytes(snapshot))
    with staging(out, overwrite) as folder:
        if spec.is_encoder:
            return _compress_encoder(_open_encoder(snapshot, spec, recipe, progress), folder, plan, progress)
        workshop = _open(snapshot, spec, recipe, progress)
        progress.stage("calibrate")
        statistics = workshop.statistics()
        frontier: tuple[PlanPoint, ...] = ()
        if plan is None:
            planned = _planned(workshop, statistics, progress)
            plan, frontier = planned.plan, planned.frontier
        progress.stage("held-out text")
        evaluation = workshop.evaluation()
        progress.stage("export the plain baseline")
        plain = folder / "plain"
        plain.mkdir()
        workshop.export(Plan.identity(spec), plain)
        progress.stage("export the slim graph")
        workshop.install(workshop.codes(statistics, plan))
        inputs = workshop.export(plan, folder)
        workshop.write_companions(folder, KVLayout.of(spec, plan), inputs)
        workshop.release()
        progress.stage("validate")
        report = measure(plain, folder, recipe, evaluation, recipe.calibration.target(spec))
        shutil.rmtree(plain)
        return _finish(folder, workshop, plan, inputs, report, frontier)


def plan(model: str, recipe: Recipe, *, progress: Progress | None = None) -> PlanSummary:
    """What `compress` would decide, without a graph.

    Raises:
        KvslimError: As `compress`.
    """
    progress = progress or Silent()
    workshop = _opened_decoder(model, recipe, "nothing to plan", progress)
    return _planned(workshop, workshop.statistics(), progress)


def analyze(model: str, recipe: Recipe, *, progress: Progress | None = None) -> Analysis:
    """What the calibration text of a recipe needs of a model, layer by layer and head by head.

    Raises:
        KvslimError: As `compress`.
    """
    progress = progress or Silent()
    workshop = _opened_decoder(model, recipe, "nothing to analyze", progress)
    statistics = workshop.statistics()
    progress.stage("analyze")
    return workshop.analysis(statistics)


def validate(
    artifact: Path, *, against: str | None = None, gates: Gates | None = None, progress: Progress | None = None
) -> Report:
    """Measures an artifact again, against the plain export of the model it came from (or `against`).

    Args:
        artifact: The folder.
        against: The model, where the one it was made from has moved.
        gates: Limits beside those of its recipe, or in place of them.
        progress: Hears of stages and steps.

    Raises:
        KvslimError: The artifact or the model cannot be read, or they do not belong together.
    """
    progress = progress or Silent()
    manifest = read_manifest(artifact)
    recipe = parse_recipe(manifest.recipe, where=str(artifact)).gated(gates or Gates())
    recipe = recipe.model_copy(update={"weights": manifest.weights})
    snapshot, spec = _checked(against or _source_of(artifact, manifest), recipe, None)
    if spec != manifest.spec:
        raise UsageError("the model has another shape than the artifact's", where="--against", fix="give its own model")
    if spec.is_encoder:
        return _validate_encoder(_open_encoder(snapshot, spec, recipe, progress), artifact, progress)
    workshop = _open(snapshot, spec, recipe, progress)
    progress.stage("held-out text")
    evaluation = workshop.evaluation()
    with tempfile.TemporaryDirectory(prefix="kvslim-") as folder:
        progress.stage("export the plain baseline")
        workshop.export(Plan.identity(spec), Path(folder))
        workshop.release()
        progress.stage("validate")
        return measure(Path(folder), artifact, recipe, evaluation, manifest.context)


def bench(artifacts: Sequence[Path], grid: Grid) -> dict[str, BenchResult]:
    """Latency, energy and memory of artifacts over a grid, interleaved in one run; by the path given.

    An encoder knows no contexts: its latency is taken for texts of the lengths in `prompts`.

    Raises:
        KvslimError: An artifact cannot be opened, or a length is not positive or beyond a model's positions.
    """
    specs = [read_manifest(artifact).spec for artifact in artifacts]
    models = {str(artifact): artifact for artifact in artifacts}
    if any(spec.is_encoder for spec in specs):
        check_encoders(specs, grid.prompts)
        return bench_encoders(models, grid)
    check_context(artifacts, specs, longest=max([*grid.prompts, *(context + 1 for context in grid.contexts)]))
    return bench_decoders(models, grid)


def decide(recipe: Recipe, spec: ModelSpec, statistics: CalibrationStatistics) -> Plan:
    """The plan that the recipe's methods make of a model's statistics."""
    plan = Plan.identity(spec, recipe.layout, recipe.window_cache)
    for method in recipe.ordered_methods:
        plan = method.decide(spec, statistics, plan)
    return plan


def _planned(workshop: Workshop, statistics: CalibrationStatistics, progress: Progress) -> PlanSummary:
    """The plan of the recipe's methods or of its budget, with projections fitted again where that pays."""
    recipe, spec = workshop.recipe, workshop.spec
    frontier: tuple[PlanPoint, ...] = ()
    progress.stage("plan")
    held_out = workshop.held_out_judge(statistics)
    if recipe.budget is None:
        plan = decide(workshop.measured_recipe(statistics, held_out), spec, statistics)
    else:
        chosen, frontier = workshop.chosen(statistics, held_out, recipe.budget)
        plan = chosen.plan
    plan, kl = workshop.compensated(statistics, held_out, plan)
    context = recipe.calibration.target(spec)
    return PlanSummary(
        plan=plan,
        kv_bytes_per_token=KVLayout.of(spec, plan).bytes_per_token(context),
        plain_kv_bytes_per_token=KVLayout.of(spec, Plan.identity(spec)).bytes_per_token(context),
        kl=kl,
        frontier=frontier,
    )


def _checked(model: str, recipe: Recipe, plan: Plan | None) -> tuple[Snapshot, ModelSpec]:
    """All that can fail cheaply, before any weight is read."""
    snapshot = resolve(model)
    spec = read_spec(snapshot, recipe.calibration.context)
    check_weights(snapshot)
    check_task(recipe, spec)
    for method in recipe.methods:
        method.check(spec)
    check_layout(recipe)
    check_lengths(recipe, spec)
    for settings in (recipe.calibration, recipe.validation):
        check_source(settings.source)
    if plan is not None:
        check_plan(plan, spec)
    return snapshot, spec


def _opened_decoder(model: str, recipe: Recipe, lack: str, progress: Progress) -> Workshop:
    """A checked model in memory, about to be calibrated."""
    snapshot, spec = _checked(model, recipe, None)
    if spec.is_encoder:
        raise UnsupportedError(
            f"{spec.model_type} is an encoder: without a KV cache there is {lack}",
            where="MODEL",
            fix="make the artifact with `kvslim compress MODEL -r encoder`",
        )
    workshop = _open(snapshot, spec, recipe, progress)
    progress.stage("calibrate")
    return workshop


def _open(snapshot: Snapshot, spec: ModelSpec, recipe: Recipe, progress: Progress) -> Workshop:
    from kvslim.workshop import Workshop

    progress.stage("load")
    return Workshop(snapshot, spec, recipe, progress)


def _compress_encoder(workshop: EncoderWorkshop, folder: Path, plan: Plan | None, progress: Progress) -> Manifest:
    """Fills the folder of an encoder's artifact."""
    spec, recipe = workshop.spec, workshop.recipe
    progress.stage("held-out text")
    held_out = workshop.held_out()
    plan, codes = _pruned_encoder(workshop, plan, progress)
    progress.stage("export")
    plain = folder / "plain"
    plain.mkdir()
    workshop.export(plain, folder, codes)
    workshop.write_companions(folder)
    progress.stage("validate")
    report = measure_encoder(plain, folder, spec, recipe, held_out)
    shutil.rmtree(plain)
    return _finish(folder, workshop, plan, encoder_inputs(spec), report)


def _pruned_encoder(
    workshop: EncoderWorkshop, plan: Plan | None, progress: Progress
) -> tuple[Plan, tuple[LayerEdit, ...]]:
    """What is to go from an encoder, and its codes; none where nothing goes, and then no text is read."""
    identity = Plan.identity(workshop.spec)
    if not workshop.recipe.methods and plan in (None, identity):
        return identity, ()
    progress.stage("calibrate")
    fitting, judged = workshop.calibration()
    statistics = workshop.statistics(fitting)
    if plan is None:
        progress.stage("plan")
        plan, _ = workshop.planned(fitting, statistics, workshop.judge(judged))
    return plan, workshop.codes(fitting, statistics, plan)


def _validate_encoder(workshop: EncoderWorkshop, artifact: Path, progress: Progress) -> Report:
    progress.stage("held-out text")
    held_out = workshop.held_out()
    with tempfile.TemporaryDirectory(prefix="kvslim-") as plain:
        progress.stage("export the plain baseline")
        workshop.export(Path(plain))
        progress.stage("validate")
        return measure_encoder(Path(plain), artifact, workshop.spec, workshop.recipe, held_out)


def _open_encoder(snapshot: Snapshot, spec: ModelSpec, recipe: Recipe, progress: Progress) -> EncoderWorkshop:
    from kvslim.encoder_workshop import EncoderWorkshop

    progress.stage("load")
    return EncoderWorkshop(snapshot, spec, recipe, progress)


def _source_of(artifact: Path, manifest: Manifest) -> str:
    """The model that an artifact came from, as its maker typed it."""
    source = manifest.source
    model = f"{source.model}@{source.revision}" if source.revision else source.model
    try:
        resolve(model)
    except NotFoundError as error:
        raise NotFoundError(
            f"the model it came from is not there: {error.message}", where=str(artifact), fix="give --against MODEL"
        ) from error
    return model


def _weight_bytes(snapshot: Snapshot) -> int:
    return sum(path.stat().st_size for path in snapshot.path.glob("*.safetensors"))


def _finish(
    folder: Path,
    workshop: Workshop | EncoderWorkshop,
    plan: Plan,
    inputs: tuple[str, ...],
    report: Report,
    frontier: tuple[PlanPoint, ...] = (),
) -> Manifest:
    """Writes what describes the artifact: model card, HTML report and manifest."""
    snapshot = workshop.snapshot
    manifest = Manifest(
        source=Source(model=snapshot.model, revision=snapshot.revision, sha256=workshop.digest),
        spec=workshop.spec,
        context=workshop.recipe.calibration.target(workshop.spec),
        recipe=workshop.recipe.model_dump(mode="json"),
        plan=plan,
        frontier=frontier,
        kv_layout=KVLayout.of(workshop.spec, plan),
        weights=workshop.recipe.weights,
        inputs=inputs,
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
