"""The results of `kvslim bench` as tables and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping

from kvslim.report.tables import METRICS, NONE, UNCERTAIN, Table, measures_table, rate, with_quartiles
from kvslim.types import Measures
from kvslim.validation.bench import BenchResult, Timing

Results = Mapping[str, BenchResult]
COSTS = ("kv_bytes_per_token", "file_mib", "peak_rss_mib")


def costs_table(results: Results) -> Table:
    """Bytes and memory of each artifact."""
    return measures_table(
        {name: Measures(**{cost: getattr(result, cost) for cost in COSTS}) for name, result in results.items()}
    )


def timings_table(results: Results) -> Table:
    """Each point of the grid: median and quartiles, tokens per second, the ratio to the first artifact, and energy."""
    columns: list[tuple[str, BenchResult, Callable[[Timing], str]]] = []
    for index, (name, result) in enumerate(results.items()):
        columns.append((f"{name}, ms", result, _time))
        columns.append(("tokens/s", result, lambda timing: rate(timing.tokens_per_second)))
        if index:
            columns.append(("ratio", result, lambda timing: f"{timing.ratio:.2f}"))
        if any(timing.joules_per_token is not None for timing in result.timings):
            columns.append(("J/token", result, _energy))
    first = next(iter(results.values()))
    rows = tuple(
        (
            METRICS[timing.metric][0].format(timing.tokens),
            NONE if timing.threads is None else str(timing.threads),
            str(timing.batch),
            *(cell(result.timings[index]) for _, result, cell in columns),
        )
        for index, timing in enumerate(first.timings)
    )
    return Table(("median (quartiles)", "threads", "batch", *(title for title, _, _ in columns)), rows)


def uncertain_timings(results: Results) -> tuple[str, ...]:
    """Which timings say little, and why; a line for each reason."""
    first = next(iter(results.values()))
    points: dict[str, list[str]] = {}
    for timing in first.timings:
        if timing.uncertain is not None:
            points.setdefault(timing.uncertain, []).append(METRICS[timing.metric][0].format(timing.tokens))
    return tuple(f"{UNCERTAIN}: {reason} ({'; '.join(dict.fromkeys(rows))})" for reason, rows in points.items())


def bench_csv(results: Results) -> str:
    """One row per timing, each with the artifact's bytes and memory; values that were not measured are empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, ("artifact", *Timing.model_fields, *COSTS), lineterminator="\n")
    writer.writeheader()
    for name, result in results.items():
        costs = {cost: getattr(result, cost) for cost in COSTS}
        writer.writerows({"artifact": name, **timing.model_dump(), **costs} for timing in result.timings)
    return file.getvalue()


def _time(timing: Timing) -> str:
    shown = "{:.2f}".format
    return with_quartiles(shown(timing.median_ms), (timing.first_quartile_ms, timing.third_quartile_ms), shown)


def _energy(timing: Timing) -> str:
    return NONE if timing.joules_per_token is None else f"{timing.joules_per_token:.3g}"
