"""Figures of what an artifact takes: time by length with its quartiles, and memory by context with devices' limits."""

from __future__ import annotations

from collections.abc import Mapping

from kvslim.measures import Measures
from kvslim.report.chart import Axis, Rule, Series, chart
from kvslim.report.figure import Figure, Limits, Named, in_thousands, reports, styled
from kvslim.report.tables import quartiles_of
from kvslim.types import KVLayout, Manifest, Plan

MIB_PER_GIB = 1024
MOST_LIMITS = 4  # devices that are too small for the longest context
POINTS = 33  # of a line; a cache with windows bends
FP16 = 16 / 32


def latency_figure(measured: Named, name: str, metric: str, title: str, below: str) -> Figure | None:
    """Milliseconds against a length, each artifact with the plain export of the same run."""
    found = {label: report for label, report in reports(measured).items() if getattr(report.artifact, metric)}
    if not found:
        return None
    series, legend, single = [], [], len(found) == 1
    for style, (label, report) in styled(found):
        dashed = "plain" if single else style
        series.append(_times(f"plain beside {label}", report.plain, metric, dashed, "dashed"))
        series.append(_times(label, report.artifact, metric, style, "solid"))
        legend.append((style, label))
    legend.append(("plain dashed", "plain" if single else "plain beside it, of the same colour"))
    svg = chart(f"{title} by length", Axis(below, base=2, shown=in_thousands), Axis("milliseconds"), series)
    doubts = [label for label, report in found.items() if report.timings_uncertain]
    caption = _LATENCY_CAPTION if single else _SEVERAL_CAPTION
    caption += f" These are uncertain{'' if single else ' for ' + ', '.join(doubts)}." if doubts else ""
    return Figure(name, title, svg, caption, tuple(legend))


_LATENCY_CAPTION = (
    "Medians, with bars from the first to the third quartile. The artifact and its plain export took turns in one run, "
    "on the machine that made the artifact."
)
_SEVERAL_CAPTION = (
    "Medians, with bars from the first to the third quartile. Each artifact took turns with its own plain export, so "
    "lines of different artifacts come from different runs; compare each with its dashed line."
)


def _times(label: str, measures: Measures, metric: str, style: str, line: str) -> Series:
    medians: Mapping[str, float] = getattr(measures, metric) or {}
    spreads = quartiles_of(measures, metric)
    lengths = sorted(medians, key=int)
    points = tuple((float(length), medians[length]) for length in lengths)
    bars = tuple(spreads.get(length, (medians[length],) * 2) for length in lengths) if spreads else ()
    return Series(label, points, style, line=line, spreads=bars)


def memory_figure(measured: Named, limits: Limits) -> Figure | None:
    """Weights and cache against context, with what devices have and how far each gets on them."""
    found = {name: report for name, report in reports(measured).items() if measured[name].kv_layout.tensors}
    if not found:
        return None
    single = len(found) == 1
    series: list[Series] = []
    for _, (label, report) in styled(found):
        series += [line for line in _plain(measured[label], report.plain.file_mib, single) if line not in series]
    for style, (label, report) in styled(found):
        points = _mebibytes(measured[label], measured[label].kv_layout, report.artifact.file_mib)
        series.append(Series(label, points, style, marks="none"))
    longest, most = (max(point[side] for one in series for point in one.points) for side in (0, 1))
    devices = _near(limits, most)
    rules = [Rule("y", gib * MIB_PER_GIB, f"{gib:.3g} GiB") for gib in devices]
    across = Axis("context, tokens", shown=in_thousands, high=longest, binary=True)
    upwards = Axis("weights and cache", shown=_size, binary=True)
    svg = chart("Memory of weights and cache by context", across, upwards, series, rules)
    legend = [(f"{one.style} {one.line}" if one.line != "solid" else one.style, one.label) for one in series]
    legend += [("rule", f"{gib:.3g} GiB, {names}: {_reach(series, gib)}") for gib, names in devices.items()]
    caption = _MEMORY_CAPTION + (_DEVICES_CAPTION if devices else _larger(limits))
    return Figure("memory", "Memory against context", svg, caption, tuple(dict.fromkeys(legend)))


_MEMORY_CAPTION = "Files of the graph and the cache at that context; activations and the runtime are not included."
_DEVICES_CAPTION = " Dotted across: the memory that devices have for a model, and how long a context fits."


def _larger(limits: Limits) -> str:
    if not limits:
        return ""
    name, gib = min(limits, key=lambda limit: limit[1])
    return f" All of it fits into every device that KVSlim knows; the smallest, {name}, has {gib:.3g} GiB."


def _plain(manifest: Manifest, file_mib: float | None, single: bool) -> list[Series]:
    """The plain export with its cache in float32, and on a page of one artifact also in fp16."""
    plain = KVLayout.of(manifest.spec, Plan.identity(manifest.spec))
    whole = Series("plain, fp32", _mebibytes(manifest, plain, file_mib), "plain", line="dashed", marks="none")
    half = Series("in fp16", _mebibytes(manifest, plain, file_mib, FP16), "plain", line="dotted", marks="none")
    return [whole, half] if single else [whole]


def _mebibytes(
    manifest: Manifest, layout: KVLayout, file_mib: float | None, share: float = 1.0
) -> tuple[tuple[float, float], ...]:
    longest = max(manifest.spec.max_context, manifest.context)
    contexts = sorted({round(longest * step / (POINTS - 1)) for step in range(POINTS)})
    return tuple((float(tokens), (file_mib or 0.0) + share * layout.bytes_at(tokens) / 2**20) for tokens in contexts)


def _near(limits: Limits, most: float) -> dict[float, str]:
    """Devices whose memory the lines reach, the largest few of them: names by GiB."""
    reached = sorted({gib for _, gib in limits if gib * MIB_PER_GIB < most})[-MOST_LIMITS:]
    return {size: "; ".join(name for name, gib in limits if gib == size) for size in reached}


def _reach(series: list[Series], gib: float) -> str:
    """How long a context of each line fits into so much memory."""
    return ", ".join(f"{one.label} {_longest(one, gib * MIB_PER_GIB)}" for one in series)


def _longest(line: Series, mib: float) -> str:
    """The last context whose memory is within a limit, between the points that are drawn."""
    if line.points[0][1] > mib:
        return "does not fit"
    for (left, low), (right, high) in zip(line.points, line.points[1:], strict=False):
        if high > mib:
            return f"to {left + (right - left) * (mib - low) / (high - low):,.0f}"
    return "all"


def _size(mib: float) -> str:
    return f"{mib / MIB_PER_GIB:g} GiB" if mib >= MIB_PER_GIB else f"{mib:g} MiB"
