"""Artifacts side by side, from their manifests alone, and what got worse since a baseline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import NamedTuple

from pydantic import Field

from kvslim.contract import Frozen
from kvslim.errors import UsageError
from kvslim.kv_ratios import TYPES, smaller_than, times
from kvslim.measures import GateResult, Measures
from kvslim.report.card import name_of
from kvslim.report.tables import METRICS, NONE, SMALLER, Table, metric_rows
from kvslim.types import Manifest


class Column(Frozen):
    """One artifact of a comparison; its bytes per token are counted at `context` tokens."""

    model: str
    sha256: str | None = Field(None, description="SHA-256 of the model's files")
    recipe: str
    weights: str | None = Field(None, description="how they are stored")
    context: int
    passed: bool | None
    gates: tuple[GateResult, ...]
    artifact: Measures
    ratio: Measures
    timings_uncertain: str | None = Field(None, description="why the timings say little, if they do")


class Comparison(Frozen):
    """What `kvslim compare --json` prints, and `--against` reads."""

    artifacts: dict[str, Column]


class Regression(Frozen):
    """A measure that is worse than in the baseline by more than its tolerance; None if it is no longer measured."""

    artifact: str
    measure: str
    baseline: float | None
    value: float | None
    limit: float | None

    @property
    def values(self) -> tuple[float | None, float | None, float | None]:
        """The baseline, the value now, and the worst value within the tolerance."""
        return self.baseline, self.value, self.limit


class Tolerance(NamedTuple):
    """How much worse a measure may get before it counts.

    Attributes:
        sign: 1 if less is better, -1 if more is better.
        relative: Share of the baseline.
        absolute: In the unit of the measure, added to the relative one.
    """

    sign: int
    relative: float
    absolute: float


# With the same versions, quality is the same in every run except for the order of sums. Latencies are relative to the
# plain export of the same run, because a baseline may come from another machine; they still vary between runs.
QUALITY = {
    "kv_bytes_per_token": Tolerance(1, 0.001, 0),
    "file_mib": Tolerance(1, 0.01, 0),
    "kl_mean": Tolerance(1, 0.1, 1e-4),
    "kl_p99": Tolerance(1, 0.2, 1e-3),
    "top1_agreement": Tolerance(-1, 0, 0.005),
    "perplexity": Tolerance(1, 0.01, 0),
    "recall": Tolerance(-1, 0, 0.01),
    "embedding_cosine_mean": Tolerance(-1, 0, 0.002),
    "retrieval_rank_correlation": Tolerance(-1, 0, 0.005),
    "masked_top1_agreement": Tolerance(-1, 0, 0.01),
    "peak_rss_mib": Tolerance(1, 0.15, 0),
}
SIGNS = {  # of measures that cannot get worse by themselves
    "kl_as_run": 1,
    "kl_to_original": 1,
    "kl_by_position": 1,
    "kl_beyond": 1,
    "recall_by_distance": -1,
    "embedding_cosine_min": -1,
}
LATENCY = {name: Tolerance(1, 0.5, 0) for name in ("ttft_ms", "tpot_ms", "latency_ms")}


def compared(manifests: Mapping[str, Manifest]) -> Comparison:
    """The columns of artifacts, by the names given."""
    return Comparison(artifacts={name: _column(manifest) for name, manifest in manifests.items()})


def short_names(names: Iterable[str]) -> dict[str, str]:
    """What to call artifacts where room is short: their names without the folders that all of them lie in."""
    parts = {name: PurePath(name).parts for name in names}
    most = min(map(len, parts.values())) - 1
    shared = next((place for place in range(most) if len({own[place] for own in parts.values()}) > 1), most)
    return {name: str(PurePath(*own[shared:])) for name, own in parts.items()}


def regressions(comparison: Comparison, baseline: Comparison) -> tuple[Regression, ...]:
    """Everything that is worse than in the baseline.

    Artifacts are matched by name. If there is only one on each side, they are matched whatever their names.

    Raises:
        UsageError: An artifact has no counterpart, or that one is of another model or counts bytes at another context.
    """
    return tuple(
        regression
        for name, column in comparison.artifacts.items()
        for regression in _worse(name, column, _counterpart(name, comparison, baseline))
    )


def comparison_table(comparison: Comparison) -> Table:
    """A column per artifact: what was measured, also relative to plain, each gate, and the best value of each row."""
    columns = comparison.artifacts
    rows = [
        _Row(("Model", *(column.model for column in columns.values()))),
        _Row(("Recipe", *(column.recipe for column in columns.values()))),
        _Row(("Weights", *(column.weights or NONE for column in columns.values()))),
        *_measured(columns),
        *_factors(columns),
        *_gate_rows(columns),
    ]
    best = frozenset((place, column) for place, row in enumerate(rows) for column in row.best)
    return Table(("", *short_names(columns).values()), tuple(row.cells for row in rows), best=best)


class _Row(NamedTuple):
    """A row of the comparison: its cells, and where it says what is better, a number for each artifact.

    Attributes:
        cells: A label, and a text for each artifact.
        values: A number for each artifact, None where there is none.
        sign: 1 if less is better, -1 if more is; 0 if neither.
    """

    cells: tuple[str, ...]
    values: tuple[float | None, ...] = ()
    sign: int = 0

    @property
    def best(self) -> tuple[int, ...]:
        """The cells that show the best value; none where all are equal or nothing is better."""
        known = [self.sign * value for value in self.values if value is not None]
        if not self.sign or len({cell for cell in self.cells[1:] if cell != NONE}) < 2:
            return ()
        winner = self.cells[1 + self.values.index(self.sign * min(known))]
        return tuple(place for place, cell in enumerate(self.cells) if place and cell == winner)


def _measured(columns: Mapping[str, Column]) -> Iterator[_Row]:
    """What was measured of each artifact. Times are of runs of their own: none is called better than another."""
    measures = {name: column.artifact for name, column in columns.items()}
    for name in METRICS:
        sign = QUALITY[name].sign if name in QUALITY else SIGNS.get(name, 0)
        for row in metric_rows(name, measures):
            yield _Row(row.cells, row.values, sign)
        if name == "kv_bytes_per_token":
            yield from _smaller_rows(columns)


def _smaller_rows(columns: Mapping[str, Column]) -> Iterator[_Row]:
    """How many times smaller each cache is than the same model's in the usual types."""
    for label, kind in zip(SMALLER, TYPES, strict=True):
        ratios = [_smaller_than(column).get(kind) for column in columns.values()]
        cells = (NONE if ratio is None else times(ratio) for ratio in ratios)
        yield _Row((f"KV cache, {label}", *cells), tuple(ratios), sign=-1)


def _smaller_than(column: Column) -> Mapping[str, float]:
    share = column.ratio.kv_bytes_per_token
    return smaller_than(share, 1.0) or {}


def _factors(columns: Mapping[str, Column]) -> Iterator[_Row]:
    """Times relative to the plain export of the same run; where some are uncertain, none is called best."""
    sign = 0 if any(column.timings_uncertain for column in columns.values()) else 1
    for measure in LATENCY:
        ratios = [getattr(column.ratio, measure) or {} for column in columns.values()]
        label = f"{METRICS[measure][0].split(', ')[0]}, to plain"
        for length in sorted({length for ratio in ratios for length in ratio}, key=int):
            values = tuple(ratio.get(length) for ratio in ratios)
            cells = (NONE if value is None else f"{value:.3g}x" for value in values)
            yield _Row((f"{label}, at {length}", *cells), values, sign)


def _gate_rows(columns: Mapping[str, Column]) -> Iterator[_Row]:
    """Each gate that an artifact has: its value, its limit and its verdict."""
    gates = {name: {gate.name: gate for gate in column.gates} for name, column in columns.items()}
    for gate in dict.fromkeys(gate for found in gates.values() for gate in found):
        yield _Row((f"Gate {gate}", *(_gate(found.get(gate)) for found in gates.values())))


def _gate(gate: GateResult | None) -> str:
    if gate is None:
        return NONE
    value = NONE if gate.value is None else f"{gate.value:.3g}"
    return f"{'passed' if gate.passed else 'FAILED'}: {value}, limit {gate.limit:g}"


def regressions_table(found: Sequence[Regression]) -> Table:
    """Each regression with the baseline's value, the artifact's, and the worst value within the tolerance."""
    rows = tuple(
        (one.artifact, one.measure, *(NONE if value is None else f"{value:.4g}" for value in one.values))
        for one in found
    )
    return Table(("artifact", "worse", "baseline", "now", "tolerated"), rows, words=True)


def _column(manifest: Manifest) -> Column:
    report = manifest.report
    return Column(
        model=name_of(manifest),
        sha256=manifest.source.sha256,
        recipe=str(manifest.recipe.get("name", "custom")),
        weights=str(manifest.weights),
        context=manifest.context,
        passed=manifest.passed,
        gates=report.gates if report else (),
        artifact=report.artifact if report else Measures(),
        ratio=report.ratio if report else Measures(),
        timings_uncertain=report.timings_uncertain if report else None,
    )


def _counterpart(name: str, comparison: Comparison, baseline: Comparison) -> Column:
    alone = len(comparison.artifacts) == len(baseline.artifacts) == 1
    column = next(iter(baseline.artifacts.values())) if alone else baseline.artifacts.get(name)
    if column is None:
        raise UsageError(
            f"the baseline has no artifact {name!r}, only {', '.join(baseline.artifacts) or 'none at all'}",
            where="--against",
            fix="write it again with `kvslim compare ARTIFACT... --json`",
        )
    _check_comparable(comparison.artifacts[name], column, f"--against, {name}")
    return column


def _check_comparable(now: Column, before: Column, where: str) -> None:
    """Refuses a baseline of another model, or at another context; one that was written without digests has none."""
    if before.sha256 not in {None, now.sha256}:
        raise UsageError(
            f"the baseline is of another model: the files of {before.model!r} had another SHA-256",
            where=where,
            fix="if it was trained or saved again, write a new baseline with `kvslim compare ARTIFACT... --json`",
        )
    if before.context != now.context:
        raise UsageError(
            f"bytes per token are counted at {now.context:,} tokens, but at {before.context:,} in the baseline",
            where=where,
            fix="compare artifacts with the same target context",
        )


def _worse(name: str, now: Column, before: Column) -> Iterator[Regression]:
    for measure, tolerance in QUALITY.items():
        old, new = getattr(before.artifact, measure), getattr(now.artifact, measure)
        yield from _judged(name, measure, tolerance, old, new)
    for measure, tolerance in LATENCY.items():
        old, new = getattr(before.ratio, measure) or {}, getattr(now.ratio, measure) or {}
        for length in sorted(old, key=int):
            yield from _judged(name, f"{measure} to plain at {length}", tolerance, old[length], new.get(length))
    failed = {gate.name for gate in before.gates if not gate.passed}
    for gate in now.gates:
        if not gate.passed and gate.name not in failed:
            yield Regression(
                artifact=name, measure=f"gate {gate.name}", baseline=None, value=gate.value, limit=gate.limit
            )


def _judged(
    name: str, measure: str, tolerance: Tolerance, old: float | None, new: float | None
) -> Iterator[Regression]:
    """The regression of one measure, if there is one; a measure that the baseline does not have cannot get worse."""
    if old is None:
        return
    limit = old + tolerance.sign * (abs(old) * tolerance.relative + tolerance.absolute)
    if new is None or tolerance.sign * (new - limit) > 0:
        yield Regression(artifact=name, measure=measure, baseline=old, value=new, limit=limit)
