"""The figures of a report, each for one manifest or for several side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, log10
from typing import TypeVar

from kvslim.report.chart import Axis, Rule, Series, chart
from kvslim.report.layer_map import layer_map, stored_bits
from kvslim.types import KVLayout, Manifest, Measures, Plan, Report

COLOURS = 6
LEAST_KL = 1e-7  # where a KL of zero is drawn on the logarithmic axis
SHORTEST = 128  # tokens at which the memory axis begins
MIB_PER_GIB = 1024
MOST_LIMITS = 4  # devices that are too small for the longest context

T = TypeVar("T")
Named = Mapping[str, Manifest]
Limits = Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Figure:
    """A picture with its caption.

    Attributes:
        name: The id of the element in the page.
        title: Headline.
        svg: The picture.
        caption: What it shows, and how it was measured.
        legend: (class in the style sheet, text) pairs.
    """

    name: str
    title: str
    svg: str
    caption: str
    legend: tuple[tuple[str, str], ...]


def figures(manifests: Named, limits: Limits = ()) -> tuple[Figure, ...]:
    """All figures that the manifests have the numbers for.

    Args:
        manifests: By the name in the legend.
        limits: Devices with their memory in GiB.
    """
    measured = {name: manifest for name, manifest in manifests.items() if manifest.report}
    drawn = (
        _quality(measured, "kl", "KL against bytes", _KL, lambda measures: measures.kl_mean),
        _quality(measured, "recall", "Recall against bytes", _recall_axis(measured), lambda measures: measures.recall),
        _latency(measured, "tpot", "Time per token", "context, tokens", lambda measures: measures.tpot_ms),
        _latency(measured, "ttft", "Time to first token", "prompt, tokens", lambda measures: measures.ttft_ms),
        _latency(measured, "latency", "Latency of a text", "text, tokens", lambda measures: measures.latency_ms),
        _memory({name: manifest for name, manifest in measured.items() if manifest.kv_layout.tensors}, limits),
        *(_layers(name, manifest, len(manifests) > 1) for name, manifest in manifests.items()),
    )
    return tuple(figure for figure in drawn if figure is not None)


def _bytes(value: float) -> str:
    return f"{value / 1024:,g}k" if value >= 1024 else f"{value:g}"


def _scientific(value: float) -> str:
    exponent = floor(log10(value) + 1e-9)
    return f"{value:g}" if exponent >= -3 else f"{value / 10.0**exponent:.0f}e{exponent}"


_BYTES = Axis("KV cache, bytes per token", base=2, shown=_bytes)
_KL = Axis("mean KL to plain, nats per token", base=10, shown=_scientific)


def _recall_axis(measured: Named) -> Axis:
    """Recall, from the multiple of ten percent below the lowest value up to 100 percent."""
    values = [column.recall for column in _columns(measured) if column.recall is not None]
    low = max(0, int(10 * min(values, default=0) - 1e-9)) / 10
    return Axis("recall", low=low, high=1.0, shown=lambda share: f"{100 * share:g}%")


def _columns(measured: Named) -> Iterable[Measures]:
    for report in _reports(measured).values():
        yield from (report.plain, report.artifact)


def _reports(measured: Named) -> dict[str, Report]:
    return {name: manifest.report for name, manifest in measured.items() if manifest.report is not None}


def _quality(
    measured: Named, name: str, title: str, axis: Axis, value: Callable[[Measures], float | None]
) -> Figure | None:
    """Quality against bytes: a mark for each artifact, and for KL also what the planner expected at other sizes."""
    series, legend, kl = [], [], name == "kl"
    for style, (label, report) in _styled(_reports(measured)):
        point = _point(report.artifact, value(report.artifact), kl)
        if point is None:
            continue
        legend.append((f"{style} dot", label))
        frontier = measured[label].frontier if kl else ()
        if frontier:
            expected = sorted((point.kv_bytes_per_token, max(point.kl, LEAST_KL)) for point in frontier)
            series.append(Series(f"{label}, expected", tuple(expected), style, line="dashed", marks="hollow"))
            legend.append((f"{style} dashed", f"{label}, expected by the planner at other sizes"))
        series.append(Series(label, (point,), style, line="none"))
    if not series:
        return None
    if not kl:
        series.append(_plain_marks(measured, value))
        legend.append(("plain dot", "plain"))
    rules = _kl_rules(list(_reports(measured).values())) if kl else []
    planned = kl and any(manifest.frontier for manifest in measured.values())
    caption = _QUALITY_CAPTIONS[name] + (_PLANNED_CAPTION if planned else "")
    return Figure(name, title, chart(title, _BYTES, axis, series, rules), caption, tuple(legend))


_QUALITY_CAPTIONS = {
    "kl": "Further left is smaller, further down is closer to the plain export. Measured on held-out text through the "
    "cache.",
    "recall": "Questions about facts far back in the prompt. Further left is smaller, further up recalls more.",
}
_PLANNED_CAPTION = " The planner's expectations were measured on calibration text, before the graph was made."


def _point(measures: Measures, value: float | None, logarithmic: bool) -> tuple[float, float] | None:
    if value is None or not measures.kv_bytes_per_token:
        return None
    return measures.kv_bytes_per_token, max(value, LEAST_KL) if logarithmic else value


def _plain_marks(measured: Named, value: Callable[[Measures], float | None]) -> Series:
    points = {_point(report.plain, value(report.plain), False) for report in _reports(measured).values()}
    return Series("plain", tuple(sorted(point for point in points if point)), "plain", line="none")


def _kl_rules(reports: Sequence[Report]) -> list[Rule]:
    """A line at the bytes of plain, whose KL of zero the axis cannot show; for a single artifact also its limit."""
    sizes = {report.plain.kv_bytes_per_token for report in reports}
    rules = [Rule("x", size, f"plain {size:,.0f}") for size in sorted(filter(None, sizes))]
    if len(reports) == 1:
        rules += [
            Rule("y", max(gate.limit, LEAST_KL), f"gate {gate.limit:g}")
            for gate in reports[0].gates
            if gate.name == "max_kl"
        ]
    return rules


def _latency(
    measured: Named, name: str, title: str, below: str, value: Callable[[Measures], Mapping[str, float] | None]
) -> Figure | None:
    """Milliseconds against a length, each artifact with the plain export of the same run."""
    series, legend = [], []
    reports = {label: report for label, report in _reports(measured).items() if value(report.artifact)}
    for style, (label, report) in _styled(reports):
        dashed = "plain" if len(reports) == 1 else style
        series.append(Series(f"plain beside {label}", _by_length(value(report.plain)), dashed, line="dashed"))
        series.append(Series(label, _by_length(value(report.artifact)), style))
        legend += [(style, label), (f"{dashed} dashed", "plain" if len(reports) == 1 else f"plain beside {label}")]
    if not series:
        return None
    svg = chart(f"{title} by length", Axis(below, base=2, shown=_bytes), Axis("milliseconds"), series)
    return Figure(name, title, svg, _LATENCY_CAPTION, tuple(legend))


_LATENCY_CAPTION = (
    "Medians. An artifact and its plain export took turns in one run on the machine that made the artifact; lines of "
    "different runs are not comparable."
)


def _by_length(latencies: Mapping[str, float] | None) -> tuple[tuple[float, float], ...]:
    return tuple(sorted((float(length), value) for length, value in (latencies or {}).items()))


def _memory(measured: Named, limits: Limits) -> Figure | None:
    """Weights and cache against context, with the memory of devices in the range of the lines."""
    series: list[Series] = []
    legend, drawn = [], set()
    for style, (label, report) in _styled(_reports(measured)):
        manifest = measured[label]
        plain = KVLayout.of(manifest.spec, Plan.identity(manifest.spec))
        line = _mebibytes(manifest, plain, report.plain.file_mib)
        if line not in drawn:
            drawn.add(line)
            series.append(Series("plain", line, "plain", line="dashed", marks="none"))
        series.append(
            Series(label, _mebibytes(manifest, manifest.kv_layout, report.artifact.file_mib), style, marks="none")
        )
        legend.append((style, label))
    if not series:
        return None
    most = max(height for one in series for _, height in one.points)
    devices = _near(limits, most)
    rules = [Rule("y", gib * MIB_PER_GIB, f"{gib:.3g} GiB") for gib in devices]
    legend += [("plain dashed", "plain"), *(("rule", f"{gib:.3g} GiB: {names}") for gib, names in devices.items())]
    axes = Axis("context, tokens", base=2, shown=_bytes), Axis("weights and cache", base=2, shown=_size)
    svg = chart("Memory of weights and cache by context", *axes, series, rules)
    caption = _MEMORY_CAPTION + (_DEVICES_CAPTION if devices else "")
    return Figure("memory", "Memory against context", svg, caption, tuple(legend))


_MEMORY_CAPTION = "Files of the graph and the cache at that context; activations and the runtime are not included."
_DEVICES_CAPTION = " Dotted lines are the memory that devices have for a model."


def _mebibytes(manifest: Manifest, layout: KVLayout, file_mib: float | None) -> tuple[tuple[float, float], ...]:
    longest = max(manifest.spec.max_context, manifest.context, 2 * SHORTEST)
    contexts = [SHORTEST * 2**step for step in range((longest // SHORTEST).bit_length())]
    return tuple(
        (float(tokens), (file_mib or 0.0) + layout.bytes_at(tokens) / 2**20)
        for tokens in sorted({*(context for context in contexts if context < longest), longest})
    )


def _near(limits: Limits, most: float) -> dict[float, str]:
    """The devices within the range of the lines and the next larger one: names by GiB."""
    sizes = sorted({gib for _, gib in limits})
    reached = [gib for gib in sizes if gib * MIB_PER_GIB < most][-MOST_LIMITS:]
    shown = reached + [gib for gib in sizes if gib * MIB_PER_GIB >= most][:1]
    return {size: "; ".join(name for name, gib in limits if gib == size) for size in shown}


def _size(mib: float) -> str:
    return f"{mib / MIB_PER_GIB:g} GiB" if mib >= MIB_PER_GIB else f"{mib:g} MiB"


def _layers(name: str, manifest: Manifest, several: bool) -> Figure | None:
    if manifest.spec.is_encoder:
        return None
    legend = tuple((f"b{bits} block", "fp32" if bits == 32 else f"{bits} bits") for bits in stored_bits(manifest))
    title = f"The cache, layer by layer: {name}" if several else "The cache, layer by layer"
    return Figure("layers", title, layer_map(manifest), _LAYERS_CAPTION, legend)


_LAYERS_CAPTION = (
    "A box is a kv head, filled by the share of its dimensions that is kept; an empty box is a removed head. At the "
    "right: cached numbers per head and token (more than its dimensions if some are stored twice), their type, and the "
    "window, if there is one (sinks + recent tokens)."
)


def _styled(items: Mapping[str, T]) -> Iterable[tuple[str, tuple[str, T]]]:
    return ((f"s{index % COLOURS}", item) for index, item in enumerate(items.items()))
