"""What each part of the planner's plans is worth: KL without it, over KL with all, at equal bytes.

    python benchmarks/ablation.py [--ratios 8,16]

In torch on 24 x 512 held-out tokens. Each row changes one thing in the finished plan and fits all else again; "uniform"
gives all layers one rank; "no refinement" and "no windows" let the planner choose anew. Moments are also taken from
windows of 128 tokens, as many tokens in all: once averaged over 512 positions, as KVSlim does, and once as seen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from unittest.mock import patch

from subjects import LENGTH, Subject, subjects

from kvslim.calibrate.statistics import CalibrationStatistics
from kvslim.methods.kv_quant import with_integers
from kvslim.plan import cost
from kvslim.types import Plan

SHORT = 128


def main() -> None:
    """Prints one markdown table per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ratios", default="8,16")
    ratios = [float(text) for text in parser.parse_args().ratios.split(",")]
    for subject in subjects():
        found = {ratio: divergences(subject, ratio) for ratio in ratios}
        print(f"{subject.name[0].upper()}{subject.name[1:]}:\n")
        print("| plan |" + "".join(f" KL at {ratio:g}x | over all |" for ratio in ratios))
        print("|---|" + "---:|---:|" * len(ratios))
        for name in dict.fromkeys(name for column in found.values() for name in column):
            print(f"| {name} |" + "".join(cells(column, name) for column in found.values()))
        print(flush=True)


def cells(column: dict[str, float], name: str) -> str:
    """Two cells of a table's row."""
    if name not in column:
        return " - | - |"
    return f" {column[name]:.2g} | {column[name] / column['all parts']:.2f} |"


def divergences(subject: Subject, ratio: float) -> dict[str, float]:
    """KL of the planner's plan and of its variants, by name."""
    found = {}
    for name, plan, statistics in variants(subject, ratio):
        found[name] = subject.judge.kl(subject.workshop.codes(statistics, plan))
        print(f"{subject.name}, {ratio:g}: {name} {found[name]:.3g}", file=sys.stderr)
    return found


def variants(subject: Subject, ratio: float) -> Iterator[tuple[str, Plan, CalibrationStatistics]]:
    """Name, plan and statistics of each row; only the plan's own choice of refitting is kept throughout."""
    statistics = subject.statistics
    bare = subject.planned(ratio).plan
    whole, _ = subject.workshop.compensated(statistics, subject.held_out, bare)
    refit = whole.layers[0].refit
    yield "all parts", whole, statistics
    yield "no refit of the output", bare, statistics
    yield "no windows", _with(_unwindowed(subject, ratio), refit=refit), statistics
    yield "uniform ranks", _with(_uniform(subject, ratio), refit=refit), statistics
    yield "no refinement", _with(_unrefined(subject, ratio), refit=refit), statistics
    yield "key PCA, not balanced", _centred(subject, _with(whole, objective="key")), statistics
    yield "no roles", _centred(subject, _with(whole, roles=None)), statistics
    yield "no centring", _with(whole, centred=False), statistics
    if ratio <= 8:
        yield "channels as they are", _with(subject.decided({"kv_quant": {"bits": 4}}), refit=refit), statistics
    for name, context in ((f"moments from {SHORT} tokens", LENGTH), (f"from {SHORT} tokens, as seen", SHORT)):
        yield name, whole, _short(subject, context)


def _with(plan: Plan, **update: object) -> Plan:
    return plan.model_copy(update={"layers": tuple(layer.model_copy(update=update) for layer in plan.layers)})


def _centred(subject: Subject, plan: Plan) -> Plan:
    """The plan with keys centred where that pays now."""
    return with_integers(subject.spec, subject.statistics, plan, {}, True)


def _uniform(subject: Subject, ratio: float) -> Plan:
    """One rank for all layers, a multiple of 8, in the bytes of a ratio."""
    rank = int(8 * subject.spec.head_dim / ratio) // 8 * 8
    return subject.decided({"kv_pca": {"rank": rank}}, {"kv_hdc": {"bits": 4, "granularity": "per_channel"}})


def _unrefined(subject: Subject, ratio: float) -> Plan:
    """The plan of a planner that stores nothing twice."""

    def once(*of: object) -> Iterator[cost.Choice]:
        return (choice for choice in cost.choices(*of) if not choice.refined)  # type: ignore[arg-type]

    with patch("kvslim.plan.planner.choices", once):
        return _planned_anew(subject, ratio)


def _unwindowed(subject: Subject, ratio: float) -> Plan:
    """The plan of a planner that lets every layer keep all tokens."""
    with patch("kvslim.plan.windows.SHARES", ()):
        return _planned_anew(subject, ratio)


def _planned_anew(subject: Subject, ratio: float) -> Plan:
    planner = subject.workshop.planner(subject.statistics, subject.held_out, LENGTH)
    planned = planner.allocated(planner.plain_bytes / ratio)
    assert planned is not None
    return planner.never_worse(planned).plan


def _short(subject: Subject, context: int) -> CalibrationStatistics:
    """Statistics of as many tokens in short windows."""
    settings = subject.recipe.calibration
    update = {"samples": settings.samples * LENGTH // SHORT, "length": SHORT, "context": context}
    workshop = subject.workshop
    workshop.recipe = subject.recipe.model_copy(update={"calibration": settings.model_copy(update=update)})
    statistics = workshop.statistics()
    workshop.recipe = subject.recipe
    return statistics


if __name__ == "__main__":
    main()
