"""Measurements as rows of text, shown in the terminal or as markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from kvslim.caches import CodedCache
from kvslim.digits import three_digits
from kvslim.kv_ratios import TYPES, smaller_than, times
from kvslim.measures import GateResult, Measures, Report
from kvslim.report.memory import CacheMemory
from kvslim.types import PeerPoint, Plan, PlanPoint

if TYPE_CHECKING:
    from kvslim.validation.tasks import TaskScores

RATIO = "ratio"
NONE = "-"
UNCERTAIN = "timings uncertain"
SMALLER = tuple(f"smaller than {name}" for name in TYPES)
WINDOW = "sinks + window"
METRICS: dict[str, tuple[str, Callable[[float], str]]] = {
    "kv_bytes_per_token": ("KV cache, bytes per token", lambda value: f"{value:,.0f}"),
    "file_mib": ("Files, MiB", lambda value: f"{value:.1f}"),
    "kl_mean": ("KL to plain, mean", lambda value: f"{value:.2g}"),
    "kl_se": ("KL to plain, standard error", lambda value: f"{value:.2g}"),
    "kl_p99": ("KL to plain, 99th percentile", lambda value: f"{value:.2g}"),
    "kl_as_run": ("KL to plain, activations rounded", lambda value: f"{value:.2g}"),
    "kl_to_original": ("KL to the model in fp32", lambda value: f"{value:.2g}"),
    "kl_by_position": ("KL to plain, mean, up to token {}", lambda value: f"{value:.2g}"),
    "kl_beyond": ("KL to plain, mean, beyond the target context", lambda value: f"{value:.2g}"),
    "top1_agreement": ("Same most likely token", lambda value: f"{value:.2%}"),
    "perplexity": ("Perplexity", lambda value: f"{value:.3f}"),
    "perplexity_se": ("Perplexity, standard error", lambda value: f"{value:.3f}"),
    "recall": ("Recall", lambda value: f"{value:.1%}"),
    "recall_questions": ("Recall questions", lambda value: f"{value:.0f}"),
    "recall_drop_se": ("Recall lost, standard error", lambda value: f"{value:.2%}"),
    "recall_by_distance": ("Recall, up to {} tokens back", lambda value: f"{value:.1%}"),
    "embedding_cosine_mean": ("Cosine to plain embeddings, mean", lambda value: f"{value:.4f}"),
    "embedding_cosine_min": ("Cosine to plain embeddings, minimum", lambda value: f"{value:.4f}"),
    "retrieval_rank_correlation": ("Rank correlation of retrieval to plain", lambda value: f"{value:.4f}"),
    "masked_top1_agreement": ("Same most likely masked token", lambda value: f"{value:.2%}"),
    "ttft_ms": ("Time to first token, ms, prompt of {}", lambda value: f"{value:.1f}"),
    "tpot_ms": ("Time per token, ms, context of {}", lambda value: f"{value:.2f}"),
    "latency_ms": ("Latency, ms, text of {} tokens", lambda value: f"{value:.2f}"),
    "prompt_tokens_per_second": ("Prompt tokens per second, prompt of {}", three_digits),
    "tokens_per_second": ("Tokens per second, context of {}", three_digits),
    "peak_rss_mib": ("Peak memory, MiB", lambda value: f"{value:.0f}"),
}


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first column holds names, the others numbers, unless `words` is set.

    Attributes:
        header: Names of the columns.
        rows: As many cells each.
        words: Whether no column holds numbers.
        best: (row, column) of cells that are the best of their rows.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: bool = False
    best: frozenset[tuple[int, int]] = frozenset()

    def rich(self) -> RichTable:
        """The table for a terminal."""
        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
        for name, right in zip(self.header, self._right, strict=True):
            table.add_column(name, justify="right" if right else "left")
        for place, row in enumerate(self.rows):
            table.add_row(*(Text(cell, "bold" * ((place, column) in self.best)) for column, cell in enumerate(row)))
        return table

    def markdown(self) -> str:
        """The table for a README."""
        rule = ["---:" if right else "---" for right in self._right]
        return "".join(f"| {' | '.join(row)} |\n" for row in (self.header, rule, *self.rows))

    @property
    def _right(self) -> list[bool]:
        return [index > 0 and not self.words for index in range(len(self.header))]


def report_table(report: Report) -> Table:
    """An artifact next to the plain export, with their ratio, the plain export against itself, and fp32 weights."""
    columns = {"plain": report.plain, "artifact": report.artifact, RATIO: report.ratio, "floor": report.floor}
    if report.original is not None:
        columns["fp32"] = report.original
    measured = measures_table(columns)
    found = _smaller(report.artifact.kv_bytes_per_token, report.plain.kv_bytes_per_token)
    rows = [
        (f"KV cache, {name}", NONE, ratio, *[NONE] * (len(columns) - 2))
        for name, ratio in zip(SMALLER, found, strict=True)
    ]
    first = 1 if report.artifact.kv_bytes_per_token else 0
    return Table(measured.header, (*measured.rows[:first], *rows[: len(rows) * first], *measured.rows[first:]))


def measures_table(columns: Mapping[str, Measures]) -> Table:
    """One row per metric that any column has; the column named `ratio` is shown as factors."""
    rows = (row.cells for name in METRICS for row in metric_rows(name, columns))
    return Table(("", *columns), tuple(rows))


class MetricRow(NamedTuple):
    """A label and a text for each column, and the number behind each text; None where there is none."""

    cells: tuple[str, ...]
    values: tuple[float | None, ...]


def timing_note(report: Report) -> str | None:
    """What to say of timings that cannot be trusted; None where they can."""
    return None if report.timings_uncertain is None else f"{UNCERTAIN}: {report.timings_uncertain}"


def gates_table(gates: Sequence[GateResult]) -> Table:
    """Each gate with its value, limit and verdict."""
    rows = tuple(
        (gate.name, NONE if gate.value is None else f"{gate.value:.4g}", f"{gate.limit:.4g}", _verdict(gate))
        for gate in gates
    )
    return Table(("gate", "value", "limit", ""), rows)


def plan_table(plan: Plan) -> Table:
    """What happens to the cache of each layer, and why."""
    windowed = any(layer.cache.kept for layer in plan.layers)
    rows = tuple(
        (
            str(layer.layer),
            str(layer.cache.rank) if isinstance(layer.cache, CodedCache) and layer.cache.rank else NONE,
            layer.cache.dtype if layer.source is None else f"of layer {layer.source}",
            *([_kept(*(layer.cache.kept or (None, 0)))] if windowed else []),
            NONE if layer.score is None else f"{layer.score:.4f}",
            layer.reason,
        )
        for layer in plan.layers
    )
    return Table(("layer", "rank", "cache", *([WINDOW] if windowed else []), "score", "reason"), rows, words=True)


def removals_table(plan: Plan) -> Table:
    """What is removed of each layer of an encoder, which has no cache."""
    rows = ((str(layer.layer), layer.reason) for layer in plan.layers if layer.heads is not None)
    return Table(("layer", "removed"), tuple(rows), words=True)


def scores_table(scores: Mapping[str, TaskScores]) -> Table:
    """One row per task and metric."""
    rows = (
        (task, metric, f"{score.value:.4f}", NONE if score.stderr is None else f"{score.stderr:.4f}", _count(found))
        for task, found in scores.items()
        for metric, score in found.metrics.items()
    )
    return Table(("task", "metric", "value", "standard error", "items"), tuple(rows), words=True)


def frontier_table(frontier: Sequence[PlanPoint], peers: Sequence[PeerPoint], plain: float) -> Table:
    """What other sizes cost, and cache types of other tools, the largest first.

    Args:
        frontier: Other sizes.
        peers: Cache types of other tools.
        plain: Bytes per token of the plain export's cache.
    """
    sizes = [(point.kv_bytes_per_token, str(point.cache), f"{point.time_ratio:.2f}", point.kl) for point in frontier]
    others = [(point.kv_bytes_per_token, point.name, NONE, point.kl) for point in peers]
    rows = tuple(
        (cache, *_smaller(size, plain), f"{size:,.0f}", time, f"{kl:.2g}")
        for size, cache, time, kl in sorted(sizes + others, key=lambda row: -row[0])
    )
    return Table(("cache", *SMALLER, "bytes per token", "expected time", "KL"), rows)


def _smaller(size: float | None, plain: float | None) -> tuple[str, ...]:
    """How many times smaller a cache is than each of `SMALLER`."""
    found = smaller_than(size, plain)
    return tuple(map(times, found.values())) if found else (NONE,) * len(SMALLER)


def layers_table(memory: CacheMemory) -> Table:
    """The cache of each layer, in bytes per token, with the sum; layers that are alike share a row."""
    windowed = any(layer.window is not None for layer in memory.layers)
    alike: dict[tuple[str, ...], list[int]] = {}
    for layer in memory.layers:
        row = (
            str(layer.heads) if layer.heads == layer.value_heads else f"{layer.heads} K, {layer.value_heads} V",
            str(layer.key_dim),
            str(layer.value_dim),
            *([_kept(layer.window, layer.sinks, layer.features)] if windowed else []),
            *_sizes(layer.bytes_per_token),
        )
        alike.setdefault(row, []).append(layer.layer)
    rows = [(ranges(layers), *row) for row, layers in alike.items()]
    together = {name: sum(layer.bytes_per_token[name] for layer in memory.layers) for name in memory.kv_bytes_per_token}
    rows.append(("all together", "", "", "", *([""] if windowed else []), *_sizes(together)))
    units = (f"bytes per token, {name}" for name in memory.kv_bytes_per_token)
    header = ("layers, each", "kv heads", "key dim", "value dim", *([WINDOW] if windowed else []))
    return Table((*header, *units), tuple(rows))


def caches_table(memory: CacheMemory) -> Table:
    """Each cache: how much smaller it is at the longest context, its MiB, and its share of cache and weights."""
    first = next(iter(memory.kv_bytes_per_token), "")
    longest = max(memory.mib, key=int)
    plain = memory.mib[longest].get(first, 0.0)
    rows = (
        (
            *((memory.label(name), name) if memory.recipes else (name,)),
            f"{bytes_per_token:,.0f}",
            *(f"{plain / times / memory.mib[longest][name]:.2f}x" for times in (1, 2)),
            *(f"{sizes[name]:,.1f} ({memory.share[tokens][name]:.0%})" for tokens, sizes in memory.mib.items()),
        )
        for name, bytes_per_token in memory.kv_bytes_per_token.items()
        if plain and memory.mib[longest][name]
    )
    names = ("cache", "numbers") if memory.recipes else ("cache",)
    contexts = (f"MiB at {int(tokens):,} (of all)" for tokens in memory.mib)
    per_token = f"bytes per token at {int(longest):,}"
    return Table((*names, per_token, "smaller than fp32", "than fp16", *contexts), tuple(rows))


def metric_rows(name: str, columns: Mapping[str, Measures]) -> Iterator[MetricRow]:
    """The rows of one metric: one for each length it was measured at; none where no column has it."""
    label, shown = METRICS[name]
    values = {column: getattr(measures, name) for column, measures in columns.items()}
    lengths = {length for value in values.values() if isinstance(value, dict) for length in value}
    for length in sorted(lengths, key=int):
        row = {column: (value or {}).get(length) for column, value in values.items()}
        spreads = [quartiles_of(measures, name).get(length) for measures in columns.values()]
        cells = zip(_cells(row, shown), spreads, strict=True)
        yield MetricRow(
            (label.format(length), *(with_quartiles(cell, spread, shown) for cell, spread in cells)),
            tuple(row.values()),
        )
    if any(isinstance(value, float) for value in values.values()):
        yield MetricRow((label, *_cells(values, shown)), tuple(values.values()))


def quartiles_of(measures: Measures, name: str) -> Mapping[str, tuple[float, float]]:
    """The first and third quartile of a latency, by length; of anything else none."""
    return getattr(measures, name.replace("_ms", "_quartiles_ms"), None) or {} if name.endswith("_ms") else {}


def with_quartiles(cell: str, quartiles: tuple[float, float] | None, shown: Callable[[float], str]) -> str:
    """A median as it is shown, with its quartiles behind it where they are known."""
    return cell if quartiles is None else f"{cell} ({' to '.join(map(shown, quartiles))})"


def _cells(values: Mapping[str, float | None], shown: Callable[[float], str]) -> Iterable[str]:
    for column, value in values.items():
        if value is None:
            yield NONE
        else:
            yield f"{value:.3g}x" if column == RATIO else shown(value)


def _count(task: TaskScores) -> str:
    return NONE if task.items is None else f"{task.items:,}"


def _kept(window: int | None, sinks: int | None, features: int | None = None) -> str:
    """The tokens that a layer keeps, as `sinks + window`, and behind them the rows of its state."""
    if window is None:
        return "all"
    return (f"{sinks} + {window}" if sinks else str(window)) + (f", state {features}" if features else "")


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, with neighbours put together: `0, 2-5`."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}" for group in groups)


def _sizes(sizes: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(f"{size:,}" for size in sizes.values())


def _verdict(gate: GateResult) -> str:
    verdict = "passed" if gate.passed else "FAILED"
    return f"{verdict}: {gate.note}" if gate.note else verdict
