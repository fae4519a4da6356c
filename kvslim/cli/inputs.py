"""Option values that need more than a type: plan files, recipes, budgets, gates, and files to write."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from kvslim.cli.lengths import read_length
from kvslim.errors import NotFoundError, OutputError, UsageError, fault_of, suggestion, words_of
from kvslim.recipe import Recipe, load_recipe
from kvslim.replacing import replacing
from kvslim.settings import Budget, Gates
from kvslim.types import Plan

if TYPE_CHECKING:
    from kvslim.measures import Report
    from kvslim.transform.edits import FittedPlan

EXAMPLES = {"kv_mib": "16k=64", "memory_mib": "16k=300"}


def read_plans(paths: Sequence[Path]) -> Plan | FittedPlan | None:
    """The plan of `--plan`; trainings of one plan are merged, and there is none without a file.

    Raises:
        UsageError: There are several files, and not all are trainings of one plan.
        KvslimError: As `read_plan`.
    """
    plans = [read_plan(path) for path in paths]
    if len(plans) < 2:
        return plans[0] if plans else None
    from kvslim.transform.edit_file import merged

    fitted = [plan for plan in plans if not isinstance(plan, Plan)]
    if len(fitted) < len(plans):
        fix = "give one plan, or several edits.safetensors"
        raise UsageError("plans without numbers cannot be merged", where="--plan", fix=fix)
    return merged(fitted)


def read_plan(path: Path) -> Plan | FittedPlan:
    """A plan from a JSON file, as `kvslim plan -o` writes it, or from one of an artifact with its numbers.

    Raises:
        NotFoundError: There is no such file.
        UsageError: It is not JSON, or not a plan.
        ArtifactError: A file with numbers is damaged.
    """
    if not path.is_file():
        raise NotFoundError(
            "no such plan file", where=f"--plan {path}", fix="write one with `kvslim plan MODEL -o plan.json`"
        )
    if path.suffix == ".safetensors":
        from kvslim.transform.edit_file import load_fitted

        return load_fitted(path)
    try:
        return Plan.model_validate(json.loads(path.read_bytes()))
    except ValidationError as error:
        message, fix = fault_of(error.errors()[0], "plan"), "see `kvslim plan MODEL --json`"
        raise UsageError(message, where=f"--plan {path}", fix=fix) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"this is not JSON: {error}", where=f"--plan {path}", fix="correct the JSON syntax") from error


def check_target(path: Path | None, option: str) -> None:
    """Refuses a file that cannot be written, before the long work that fills it.

    Raises:
        OutputError: Its folder does not exist, or it is a folder itself.
    """
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        fault = "it is a folder" if path.is_dir() else "its folder does not exist"
        raise OutputError(f"cannot write: {fault}", where=str(path), fix=f"give another {option}")


def write_text(path: Path, text: str, option: str) -> None:
    """Writes a text file whole or not at all; what is no file, such as /dev/stdout, is written to.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        with replacing(path.resolve()) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write: {error.strerror}", where=str(path), fix=f"give another {option}") from error


def write_junit(path: Path | None, report: Report, artifact: Path) -> None:
    """Writes the gates as JUnit XML if a file is given."""
    if path:
        from kvslim.report.junit import junit_xml

        write_text(path, junit_xml(report, artifact.resolve().name), "--junit")


def read_budget(
    kv_ratio: float | None,
    kv_mib_at: str | None,
    time_ratio: float | None,
    max_kl: float | None,
    max_recall_drop: float | None,
    memory_mib: str | None = None,
) -> Budget | None:
    """The budget that the options describe; None if there is none.

    Raises:
        UsageError: A value is out of range, or two options limit the bytes.
    """
    limits = {
        "--kv-ratio": ("kv_ratio", kv_ratio),
        "--time-ratio": ("time_ratio", time_ratio),
        "--max-kl": ("max_kl", max_kl),
        "--max-recall-drop": ("max_recall_drop", None if max_recall_drop is None else max_recall_drop / 100),
    }
    given = {name: value for name, value in limits.values() if value is not None}
    for option, (name, text) in {
        "--kv-mib-at": ("kv_mib", kv_mib_at),
        "--memory-mib": ("memory_mib", memory_mib),
    }.items():
        if text is not None:
            given |= _read_mib(name, text, option)
    if not given:
        return None
    try:
        return Budget.model_validate(given)
    except ValidationError as error:
        fault = error.errors()[0]
        options = {name: option for option, (name, _) in limits.items()}
        options |= {"kv_mib": "--kv-mib-at", "memory_mib": "--memory-mib"}
        options["context"] = options["kv_mib" if memory_mib is None else "memory_mib"]
        sizes = ", ".join(options[name] for name in ("kv_ratio", "kv_mib", "memory_mib") if name in given)
        where = options[str(fault["loc"][0])] if fault["loc"] else sizes
        if where == "--max-recall-drop":
            raise UsageError("it is in percentage points, from 0 to 100", where=where, fix="write 1 for 1 %") from error
        message = words_of(fault)
        for name in given:
            message = re.sub(rf"\b{name}\b", options[name], message)
        raise UsageError(message, where=where, fix="see `kvslim compress --help`") from error


def _read_mib(name: str, text: str, option: str) -> dict[str, float]:
    """A size at a context, such as `16k=64`."""
    tokens, _, mib = text.partition("=")
    try:
        return {"context": read_length(tokens, option), name: float(mib)}
    except ValueError:
        raise UsageError(f"cannot read {text!r}", where=option, fix=f"write {EXAMPLES[name]}") from None


def read_gates(texts: Sequence[str]) -> Gates:
    """Gates like `max_kl=0.01`; if a name occurs twice, the last one counts.

    Raises:
        UsageError: One has no limit, an unknown name, or a limit out of range.
    """
    limits: dict[str, str] = {}
    for text in texts:
        name, equals, limit = text.partition("=")
        if name not in Gates.model_fields:
            raise UsageError(f"no gate {name!r}", where="--gate", fix=suggestion(name, Gates.model_fields))
        if not equals:
            raise UsageError(f"{name} has no limit", where="--gate", fix=f"write --gate {name}=0.01")
        limits[name] = limit
    try:
        return Gates.model_validate(limits)
    except ValidationError as error:
        fault = error.errors()[0]
        where = f"--gate {fault['loc'][0]}"
        raise UsageError(words_of(fault), where=where, fix="see gates in docs/recipes.md") from error


def read_words(
    weights: str | None = None,
    calibration: str | None = None,
    context: str | None = None,
    validation: str | None = None,
    file_mib: float | None = None,
    file_ratio: float | None = None,
    heal: str | None = None,
    draft: str | None = None,
) -> dict[str, str]:
    """The usual options as `key=value` overrides of a recipe, with the option that each came from.

    Raises:
        UsageError: The context is not a number of tokens.
    """
    tokens = None if context is None else read_length(context, "--context")
    given = {
        "--weights": ("weights", weights),
        "--calibration": ("calibration.source", calibration),
        "--context": ("calibration.context", tokens),
        "--validation": ("validation.source", validation),
        "--file-mib": ("weights.file_mib", file_mib),
        "--file-ratio": ("weights.file_ratio", file_ratio),
        "--heal": ("heal", heal),
        "--draft": ("draft", draft),
    }
    return {f"{key}={json.dumps(value)}": option for option, (key, value) in given.items() if value is not None}


def read_recipe(
    name: str | None,
    overrides: Sequence[str],
    budget: Budget | None,
    gates: Gates | None = None,
    words: Mapping[str, str] | None = None,
) -> Recipe:
    """The recipe that the options describe, with the budget in place of its methods.

    Args:
        name: A shipped recipe or a file; None for `balanced`, or with a budget for what `small` asks of quality.
        overrides: What `--set` says; it wins over words.
        budget: The limits of a cache.
        gates: Gates of the user, in place of those of the recipe and of the budget.
        words: As `read_words`.

    Raises:
        NotFoundError, UsageError: As `load_recipe`.
    """
    words = words or {}
    try:
        recipe = load_recipe(name or ("small" if budget else "balanced"), [*words, *overrides])
    except UsageError as error:
        option = words.get(error.where.removeprefix("--set "))
        raise UsageError(error.message, where=option, fix=error.fix) if option else error from None
    if budget:
        typed = {override.partition("=")[0].removeprefix("gates.") for override in overrides}
        own = recipe.gates.model_dump(include=typed, exclude_none=True)
        recipe = (recipe if name else recipe.unsized("budget")).within(budget).gated(Gates.model_validate(own))
    return recipe.gated(gates) if gates else recipe
