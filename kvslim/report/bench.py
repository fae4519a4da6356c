"""The results of `kvslim bench` as tables and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from typing import Any

from kvslim.digits import three_digits
from kvslim.measures import Measures
from kvslim.report.draft import shares
from kvslim.report.tables import METRICS, NONE, UNCERTAIN, Table, measures_table, with_quartiles
from kvslim.validation.bench import BenchResult, Timing
from kvslim.validation.drafts import DraftGain

Results = Mapping[str, BenchResult]
DRAFT_FIELDS = ("kind", "plain_tokens_per_second", "speed_ratio", "tokens_per_round", "acceptance")
COSTS = ("kv_bytes_per_token", "file_mib", "peak_rss_mib")


def tables_of(results: Results) -> tuple[Table, ...]:
    """Bytes and memory, timings, and what drafts gain where an artifact has one."""
    drafts = (drafts_table(results),) if any(result.drafts for result in results.values()) else ()
    return costs_table(results), timings_table(results), *drafts


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
        columns.append(("tokens/s", result, lambda timing: three_digits(timing.tokens_per_second)))
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


def drafts_table(results: Results) -> Table:
    """Texts with and without drafts: speed, tokens of a run, and how often the first few proposals were right."""
    drafted = {name: result.drafts for name, result in results.items() if result.drafts}
    header = [
        (f"{name}, tokens/s", "draft", "with draft", "times the speed", "tokens a run", "first, second, ... right")
        for name in drafted
    ]
    rows = tuple(
        (
            _draft_label(gains[0]),
            NONE if gains[0].threads is None else str(gains[0].threads),
            *(cell for gain in gains for cell in _draft_cells(gain)),
        )
        for gains in zip(*drafted.values(), strict=True)
    )
    return Table(("text", "threads", *(title for titles in header for title in titles)), rows)


def _draft_cells(gain: DraftGain) -> tuple[str, ...]:
    return (
        three_digits(gain.plain_tokens_per_second),
        gain.kind,
        three_digits(gain.tokens_per_second),
        f"{gain.speed_ratio:.2f}",
        f"{gain.tokens_per_round:.2f}",
        shares(gain.acceptance),
    )


def _draft_label(gain: DraftGain) -> str:
    return f"Text up to a context of {gain.context}"


def uncertain_timings(results: Results) -> tuple[str, ...]:
    """Which timings say little, and why; a line for each reason."""
    first = next(iter(results.values()))
    found = [(timing.uncertain, METRICS[timing.metric][0].format(timing.tokens)) for timing in first.timings]
    found += [(gain.uncertain, _draft_label(gain)) for result in results.values() for gain in result.drafts]
    points: dict[str, list[str]] = {}
    for reason, label in found:
        if reason is not None:
            points.setdefault(reason, []).append(label)
    return tuple(f"{UNCERTAIN}: {reason} ({'; '.join(dict.fromkeys(rows))})" for reason, rows in points.items())


def bench_csv(results: Results) -> str:
    """One row per timing, then those of drafts, each with the artifact's bytes and memory.

    Values that were not measured are empty.
    """
    file = io.StringIO()
    writer = csv.DictWriter(file, ("artifact", *Timing.model_fields, *DRAFT_FIELDS, *COSTS), lineterminator="\n")
    writer.writeheader()
    for name, result in results.items():
        rows = [*(timing.model_dump() for timing in result.timings), *map(_draft_row, result.drafts)]
        costs = {cost: getattr(result, cost) for cost in COSTS}
        writer.writerows({"artifact": name, **row, **costs} for row in rows)
    return file.getvalue()


def _draft_row(gain: DraftGain) -> dict[str, Any]:
    """A row of a draft, whose tokens per second are those with it."""
    shares = " ".join(f"{share:.3f}" for share in gain.acceptance)
    row = gain.model_dump(exclude={"context", "tokens"})
    return {**row, "metric": "draft", "tokens": gain.context, "batch": 1, "acceptance": shares}


def _time(timing: Timing) -> str:
    shown = "{:.2f}".format
    return with_quartiles(shown(timing.median_ms), (timing.first_quartile_ms, timing.third_quartile_ms), shown)


def _energy(timing: Timing) -> str:
    return NONE if timing.joules_per_token is None else f"{timing.joules_per_token:.3g}"
