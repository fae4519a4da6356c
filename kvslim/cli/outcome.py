"""How `compress` ends: a verdict, what was reached on a device, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvslim.cli.pace import minutes
from kvslim.kv_ratios import smaller
from kvslim.measures import Report
from kvslim.report.advice import expected_gates, likely_fix, nearest_budget, passing_budget
from kvslim.types import Manifest

if TYPE_CHECKING:
    from kvslim.devices.limits import Limits
    from kvslim.devices.room import Room
    from kvslim.planning.decide import PlanSummary
    from kvslim.recipe import Recipe

# What a command that is given again leaves out: limits that are replaced, and where results go.
SIZES = {"kv_ratio", "kv_mib_at", "memory_mib", "device"}
LARGER = 1.05  # files of the artifact over plain's from which on they are told of
LEFT_OUT = SIZES | {"time_ratio", "max_kl", "max_recall_drop", "tokens_per_second", "plan", "force", "junit", "as_json"}


def outcome(
    manifest: Manifest, out: Path, seconds: float, room: Room | None, reached: Sequence[Limits]
) -> Iterator[str]:
    """The lines that end a command.

    Args:
        manifest: Of the artifact.
        out: Its folder.
        seconds: Time that it took.
        room: What the device has room for that it was made for; None for none.
        reached: What that device allows, with the plain cache and the artifact's.
    """
    if manifest.report is not None:
        yield ": ".join((_verdict(manifest.report), ", ".join(_facts(manifest.report))))
    yield f"written to {out} in {minutes(seconds)}"
    if room is not None:
        from kvslim.report.reach import reach_line

        yield reach_line(room.device, reached)
    folder = shlex.quote(str(out))
    yield f"next: open {folder}/report.html"
    if not manifest.spec.is_encoder:
        from kvslim.runtime.template import CONFIG, ChatTemplate

        is_chat = (out / CONFIG).is_file() and ChatTemplate.exists(out)
        yield f"      kvslim chat {folder}" if is_chat else f'      kvslim generate {folder} -p "Once upon a time"'


def passing(manifest: Manifest, context: typer.Context) -> str | None:
    """What to do about gates that failed: the command that is expected to pass, or what is likely to."""
    if command := passing_command(manifest, context):
        return f"run `{command}`, the nearest size that is expected to pass"
    return likely_fix(manifest.recipe, manifest.report.gates) if manifest.report else None


def passing_command(manifest: Manifest, context: typer.Context) -> str | None:
    """The command that is expected to pass the gates that failed; None where none is known.

    Args:
        manifest: Of the artifact.
        context: Of the command that made it, of which everything but the limits is kept.
    """
    budget = passing_budget(manifest)
    if budget is None:
        return None
    words = ["kvslim", context.info_name or "compress", *_words(context)]
    name = manifest.recipe.get("name")
    own = context.params.get("recipe") is None and name != "budget"  # the recipe that is the default without a budget
    return shlex.join([*words, *(["-r", str(name)] if own else []), "--force", *budget.split()])


def expectations(summary: PlanSummary, recipe: Recipe) -> Iterator[str]:
    """The gates that a plan is expected to fail, and the nearest size that is expected to pass them."""
    size, budget = summary.kv_bytes_per_token, recipe.budget
    gates = expected_gates(recipe.gates, summary.frontier, size, summary.kl)
    failed = ", ".join(f"{gate.name} {gate.value:.3g} against {gate.limit:g}" for gate in gates if not gate.passed)
    if not failed:
        return
    if recipe.splits_memory:  # another size of the cache would leave the weights another
        yield f"expected to fail: {failed}"
        return
    by_size = budget is not None and (budget.kv_ratio or budget.kv_mib) is not None
    nearest = nearest_budget(gates, summary.frontier, size, by_size=by_size, alike=summary.alike)
    yield f"expected to fail: {failed}" + (f"; expected to pass: {nearest}" if nearest else "")


def _words(context: typer.Context) -> Iterator[str]:
    for parameter in context.command.params:
        value: Any = context.params.get(parameter.name or "")
        if parameter.name in LEFT_OUT or value is None or value is False:
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            if parameter.name == "overrides" and str(one).startswith("methods"):
                continue  # the planner takes the place of methods
            yield from (
                [str(one)] if parameter.param_type_name == "argument" else [min(parameter.opts, key=len), str(one)]
            )


def _verdict(report: Report) -> str:
    failed, count = sum(not gate.passed for gate in report.gates), len(report.gates)
    if report.speculation is not None and report.speculation.differing:
        return f"{failed} of {count} gates and the draft FAILED"
    if not count:
        return "no gate is set"
    return f"{failed} of {count} gates FAILED" if failed else f"passed, {count} of {count} gates hold"


def _facts(report: Report) -> Iterator[str]:
    artifact, plain = report.artifact, report.plain
    if artifact.kv_bytes_per_token and plain.kv_bytes_per_token:
        yield f"the cache is {smaller(artifact.kv_bytes_per_token, plain.kv_bytes_per_token)}"
    if artifact.kl_mean is not None:
        as_run = "" if artifact.kl_as_run is None else f" ({artifact.kl_as_run:.2g} with activations rounded)"
        yield f"KL {artifact.kl_mean:.2g}{as_run}"
    if plain.kl_to_original is not None:
        yield f"KL of the weights to fp32 {plain.kl_to_original:.2g}"
    if artifact.file_mib and plain.file_mib and artifact.file_mib > LARGER * plain.file_mib:
        yield f"files {artifact.file_mib / plain.file_mib:.2f}x of plain's"
    if artifact.recall is not None and plain.recall is not None:
        yield f"recall {artifact.recall:.1%} (plain {plain.recall:.1%})"
    if artifact.embedding_cosine_mean is not None:
        yield f"cosine of embeddings {artifact.embedding_cosine_mean:.4f}"
