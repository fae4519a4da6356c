"""The Python API: `import kvslim` gives these functions, which take names and paths as the command line does.

Each one imports what it needs when it is called: `load` works without torch and without transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from kvslim.errors import UsageError, fault_of
from kvslim.progress import Progress

if TYPE_CHECKING:
    from kvslim.contract import Frozen
    from kvslim.measures import Report
    from kvslim.planning.analyze import Analysis
    from kvslim.planning.decide import PlanSummary
    from kvslim.recipe import Recipe
    from kvslim.runtime.text import Speculative, TextGenerator
    from kvslim.settings import Gates
    from kvslim.transform.edits import FittedPlan
    from kvslim.types import Manifest, Plan
    from kvslim.validation.bench import BenchResult

AnyPath: TypeAlias = "str | PathLike[str]"
RecipeLike: TypeAlias = "Recipe | str | PathLike[str]"
Checked = TypeVar("Checked", bound="Frozen")


def compress(
    model: AnyPath,
    recipe: RecipeLike,
    out: AnyPath,
    *,
    plan: Plan | FittedPlan | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    workers: int | None = None,
    ray: str | None = None,
) -> Manifest:
    """Compresses a model into an ONNX folder and measures it against the plain export.

    Args:
        model: `demo`, a folder, a .gguf file, a hub id or `id:FILE.gguf`, both also with `@revision`.
        recipe: A shipped recipe's name, a recipe file, or a `Recipe`.
        out: The folder to make; it appears only when everything is done.
        plan: Use these decisions, such as `kvslim.plan(...).plan`, instead of the methods' own; perhaps with their
            numbers, as `kvslim.transform.edit_file.load_fitted` reads them from an `edits.safetensors`.
        overwrite: Whether to replace an artifact that is already at `out`.
        progress: Receives the progress; by default nothing is printed.
        workers: How many processes measure beside each other; None for this one alone (needs the extra `ray`).
        ray: Address of the Ray cluster that they are on; None for this machine.

    Returns:
        The artifact's manifest. `passed` says whether all gates hold, `report` has the measurements.

    Raises:
        KvslimError: Something that the user can fix; `out` is then as it was before.
    """
    from kvslim import pipeline
    from kvslim.workers.hire import hired

    with hired(workers, ray) as crew:
        return pipeline.compress(
            str(model), _recipe(recipe), Path(out), plan=plan, overwrite=overwrite, progress=progress, workers=crew
        )


def plan(
    model: AnyPath,
    recipe: RecipeLike,
    *,
    progress: Progress | None = None,
    workers: int | None = None,
    ray: str | None = None,
) -> PlanSummary:
    """What `compress` would decide, with the cache size and the KL it predicts. Writes no graph.

    Args:
        model: `demo`, a folder, a .gguf file, a hub id or `id:FILE.gguf`, both also with `@revision`.
        recipe: A shipped recipe's name, a recipe file, or a `Recipe`.
        progress: Receives the progress.
        workers: As for `compress`.
        ray: As for `compress`.

    Raises:
        KvslimError: Something that the user can fix.
    """
    from kvslim import pipeline
    from kvslim.workers.hire import hired

    with hired(workers, ray) as crew:
        return pipeline.plan(str(model), _recipe(recipe), progress=progress, workers=crew)


def analyze(
    model: AnyPath,
    recipe: RecipeLike = "lossless",
    *,
    data: AnyPath | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
    ray: str | None = None,
) -> Analysis:
    """Which layers and heads a task needs least, measured on the task's text. Writes no graph.

    Args:
        model: `demo`, a folder, a .gguf file, a hub id or `id:FILE.gguf`, both also with `@revision`.
        recipe: Sets the calibration text and how weights are stored; its methods are not used.
        data: The task's text, in place of the recipe's: `self`, a .txt or .jsonl file, or `hub:DATASET[:SPLIT]`.
        progress: Receives the progress.
        workers: As for `compress`.
        ray: As for `compress`.

    Raises:
        KvslimError: Something that the user can fix.
    """
    from kvslim import pipeline
    from kvslim.workers.hire import hired

    chosen = _recipe(recipe)
    if data is not None:
        calibration = chosen.calibration.model_copy(update={"source": str(data)})
        chosen = chosen.model_copy(update={"calibration": calibration})
    with hired(workers, ray) as crew:
        return pipeline.analyze(str(model), chosen, progress=progress, workers=crew)


def validate(
    artifact: AnyPath,
    *,
    against: AnyPath | None = None,
    context: int | None = None,
    validation: AnyPath | None = None,
    gates: Gates | Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measures an artifact again, against the plain export of the model it was made from.

    Args:
        artifact: A folder that `compress` wrote.
        against: The model, if the one it was made from has moved.
        context: The target context in tokens, in place of the recipe's.
        validation: The text to measure on, in place of the recipe's.
        gates: Limits such as `{"max_kl": 0.01}`, in addition to the recipe's or in place of them.
        progress: Receives the progress.

    Raises:
        KvslimError: Something that the user can fix.
    """
    from kvslim import pipeline

    model, changes = None if against is None else str(against), []
    if context is not None:
        changes.append(f"calibration.context={context}")
    if validation is not None:
        changes.append(f"validation.source={json.dumps(str(validation))}")
    return pipeline.validate(Path(artifact), against=model, changes=changes, gates=_gates(gates), progress=progress)


def bench(
    artifacts: Sequence[AnyPath] | AnyPath,
    *,
    prompts: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
    batches: Sequence[int] = (1,),
    repeats: int = 16,
    speculative: Speculative = "auto",
    text: AnyPath = "self",
    progress: Progress | None = None,
) -> dict[str, BenchResult]:
    """Times artifacts against each other; they take turns in one run, so that a busy machine slows all of them alike.

    Args:
        artifacts: Folders that `compress` wrote.
        prompts: Prompt lengths in tokens, for time to first token; text lengths for an encoder. None for 128, 512
            and the shortest context that an artifact was made for, as far as all models have positions.
        contexts: Context lengths in tokens, for time per token; None for 128, 1,024 and that context, likewise.
        threads: Thread counts; None leaves the choice to onnxruntime.
        batches: Numbers of sequences side by side.
        repeats: Timings per combination, at least 3.
        speculative: `auto` also measures what drafts gain at the contexts; `none` does not.
        text: What that is measured on: `self` for what the artifacts write themselves, a .txt or .jsonl file, or
            `hub:DATASET[:SPLIT]`.
        progress: Receives the progress.

    Returns:
        Timings, memory, energy and what drafts gain, by the path given.

    Raises:
        KvslimError: An artifact cannot be opened, or a length does not fit it.
    """
    from kvslim import pipeline
    from kvslim.validation.bench import Grid

    folders = [artifacts] if isinstance(artifacts, str | PathLike) else artifacts
    lengths = {"prompts": prompts, "contexts": contexts}
    wanted = {
        **{name: tuple(given) for name, given in lengths.items() if given is not None},
        "threads": (None,) if threads is None else tuple(threads),
        "batches": tuple(batches),
        "repeats": repeats,
        "speculative": speculative,
        "text": str(text),
    }
    grid = _checked(Grid, wanted, "bench", "docs/api.md")
    return pipeline.bench([Path(folder) for folder in folders], grid, progress=progress)


def load(
    artifact: AnyPath, *, context: int | None = None, threads: int | None = None, speculative: Speculative = "auto"
) -> TextGenerator:
    """Opens an artifact to generate text with it. Needs neither torch nor transformers.

    Args:
        artifact: A folder that `compress` wrote.
        context: Tokens that the cache has room for; None for the context that the artifact was made for.
        threads: Threads of one operator; None leaves the choice to onnxruntime.
        speculative: `auto` lets the artifact's draft, if it has one, propose tokens where that saves time; `none` does
            not.

    Raises:
        UsageError: The context is longer than the model allows.
        NotFoundError, ArtifactError: A file of the folder is missing or broken.
        UnsupportedError: The model is an encoder.
    """
    from kvslim.runtime.text import TextGenerator

    return TextGenerator(Path(artifact), context=context, threads=threads, speculative=speculative)


def _recipe(recipe: RecipeLike) -> Recipe:
    from kvslim.recipe import Recipe, load_recipe

    return recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))


def _gates(gates: Gates | Mapping[str, float] | None) -> Gates | None:
    from kvslim.settings import Gates

    if gates is None or isinstance(gates, Gates):
        return gates
    return _checked(Gates, gates, "gates", "gates in docs/recipes.md")


def _checked(kind: type[Checked], values: Mapping[str, Any], where: str, told: str) -> Checked:
    """Plain values as what they describe; the first that does not fit is named, with where to read about it."""
    from pydantic import ValidationError

    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UsageError(fault_of(error.errors()[0], where), where=where, fix=f"see {told}") from error
