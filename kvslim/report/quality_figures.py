"""Figures of what an artifact costs in quality: against bytes, by position, by distance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import floor, log10

from kvslim.kv_ratios import TYPES
from kvslim.measures import Measures, Report
from kvslim.report.chart import Axis, Rule, Series, chart
from kvslim.report.figure import Figure, Named, in_thousands, reports, styled
from kvslim.types import Manifest, PlanPoint

LEAST_KL = 1e-7  # where a KL of zero is drawn on the logarithmic axis
TOOLS = {"genai": "s1", "llama.cpp": "s2"}  # colours of other tools on the page of one artifact


def _scientific(value: float) -> str:
    exponent = floor(log10(value) + 1e-9)
    return f"{value:g}" if exponent >= -3 else f"{value / 10.0**exponent:.0f}e{exponent}"


_BYTES = Axis("KV cache, bytes per token", base=2, shown=in_thousands)
_KL = Axis("mean KL to plain, nats per token", base=10, shown=_scientific)


def kl_figure(measured: Named) -> Figure | None:
    """KL against bytes: a mark for each artifact, and for a single one other sizes and other tools."""
    found = {name: report for name, report in reports(measured).items() if _point(report.artifact)}
    if not found:
        return None
    single = len(found) == 1
    series: list[Series] = []
    legend: list[tuple[str, str]] = []
    for style, (label, report) in styled(found):
        frontier, peers = _around(measured[label], label, style, single)
        series += [*frontier, *peers]
        series.append(_artifact(label, report, style, single))
        legend.append((f"{style} dot", label))
        legend += [(f"{style} dashed", "other sizes")] if frontier and single else []
        legend += [(f"{one.style} ring", one.label) for one in peers]
    if not single and any(_sizes(measured[label]) for label in found):
        legend.append(("plain dashed", "other sizes of the same colour"))
    rules = _rules(list(found.values()))
    caption = _KL_CAPTION + _priced(measured, found)
    return Figure(
        "kl", "KL against bytes", chart("KL against bytes", _BYTES, _KL, series, rules), caption, tuple(legend)
    )


_KL_CAPTION = (
    "Further left is smaller, further down is closer to the plain export. Filled: measured on held-out text, through "
    "the cache."
)


def _priced(measured: Named, found: Mapping[str, Report]) -> str:
    """What hollow marks are, where there are any."""
    if not any(_sizes(measured[name]) or measured[name].peers for name in found):
        return ""
    if len(found) > 1:
        return " Hollow: other sizes, priced on calibration text before any graph was made."
    planned = any(measured[name].frontier for name in found)
    sizes = "the planner's plans of other sizes" if planned else "all layers alike in other sizes"
    return f" Hollow: priced on calibration text before any graph was made, {sizes} and cache types of other tools."


def _sizes(manifest: Manifest) -> tuple[PlanPoint, ...]:
    return manifest.frontier or manifest.alike


def _point(measures: Measures) -> tuple[float, float] | None:
    if measures.kl_mean is None or not measures.kv_bytes_per_token:
        return None
    return measures.kv_bytes_per_token, max(measures.kl_mean, LEAST_KL)


def _artifact(label: str, report: Report, style: str, single: bool) -> Series:
    point = _point(report.artifact)
    names = ("this artifact",) if single else ()
    return Series(
        label, (point,) if point else (), style, line="none", marks="large" if single else "full", names=names
    )


def _around(manifest: Manifest, label: str, style: str, single: bool) -> tuple[list[Series], list[Series]]:
    """The other sizes of a manifest, and on a page of its own also the cache types of each other tool."""
    points = sorted((point.kv_bytes_per_token, max(point.kl, LEAST_KL)) for point in _sizes(manifest))
    sizes = [Series(f"{label}, other sizes", tuple(points), style, line="dashed", marks="hollow")] if points else []
    if not single:
        return sizes, []
    peers = []
    for tool, colour in TOOLS.items():
        own = [point for point in manifest.peers if point.name.startswith(f"{tool} ")]
        places = tuple((point.kv_bytes_per_token, max(point.kl, LEAST_KL)) for point in own)
        names = tuple(point.name.removeprefix(f"{tool} ") for point in own)
        peers += [Series(tool, places, colour, line="none", marks="hollow", names=names)] if own else []
    return sizes, peers


def _rules(found: Sequence[Report]) -> list[Rule]:
    """Lines at the bytes of fp32 and fp16, whose KL of zero the axis cannot show; for one artifact also its limit."""
    sizes = {report.plain.kv_bytes_per_token for report in found}
    types = [name for name in TYPES if name.startswith("fp")]
    rules = [Rule("x", TYPES[name] * size, name) for size in sorted(filter(None, sizes)) for name in types]
    if len(found) == 1:
        gates = (gate for gate in found[0].gates if gate.name == "max_kl")
        rules += [Rule("y", max(gate.limit, LEAST_KL), f"gate {gate.limit:g}", right=True) for gate in gates]
    return rules


def recall_figure(measured: Named) -> Figure | None:
    """Recall against bytes, where several artifacts make more than two points."""
    found = reports(measured)
    points = {name: _recalled(report.artifact) for name, report in found.items()}
    series = [
        Series(name, (point,), style, line="none") for style, (name, point) in styled(points) if point is not None
    ]
    if len(series) < 2:
        return None
    plain = {point for report in found.values() if (point := _recalled(report.plain)) is not None}
    series.append(Series("plain", tuple(sorted(plain)), "plain", line="none"))
    axis = _share_axis("recall", [height for one in series for height in one.heights])
    legend = tuple((f"{one.style} dot", one.label) for one in series)
    svg = chart("Recall against bytes", _BYTES, axis, series)
    return Figure("recall", "Recall against bytes", svg, _RECALL_CAPTION, legend)


_RECALL_CAPTION = "Questions about facts far back in the prompt. Further left is smaller, further up recalls more."


def _recalled(measures: Measures) -> tuple[float, float] | None:
    if measures.recall is None or not measures.kv_bytes_per_token:
        return None
    return measures.kv_bytes_per_token, measures.recall


def _share_axis(label: str, values: Iterable[float]) -> Axis:
    """From the multiple of ten percent below the lowest value up to 100 percent."""
    low = max(0, int(10 * min(values, default=0) - 1e-9)) / 10
    return Axis(label, low=low, high=1.0, shown=lambda share: f"{100 * share:g}%")


def position_figure(measured: Named) -> Figure | None:
    """KL by the position of a token in its text."""
    axis = Axis("mean KL to plain, nats per token", shown="{:.2g}".format)
    return _by_key(
        measured,
        "position",
        "KL by position",
        ("position, up to token", axis),
        lambda measures: measures.kl_by_position,
        "Each mark is the mean from the mark before up to its position, so it tells whether the loss grows with the "
        "length of a text.",
    )


def distance_figure(measured: Named) -> Figure | None:
    """Recall by how far back a fact stands, beside the plain export's."""
    shares = [share for report in reports(measured).values() for share in _distances(report)]
    return _by_key(
        measured,
        "distance",
        "Recall by distance",
        ("tokens back, at most", _share_axis("recall", shares)),
        lambda measures: measures.recall_by_distance,
        "Share of facts that are recalled, by how far back in the prompt they stand.",
        with_plain=True,
    )


def _distances(report: Report) -> Iterable[float]:
    return (share for side in (report.plain, report.artifact) for share in (side.recall_by_distance or {}).values())


def _by_key(
    measured: Named,
    name: str,
    title: str,
    axes: tuple[str, Axis],
    value: Callable[[Measures], Mapping[str, float] | None],
    caption: str,
    with_plain: bool = False,
) -> Figure | None:
    """A line of each artifact through what was measured by a number of tokens, where that was more than once."""
    found = {label: report for label, report in reports(measured).items() if len(value(report.artifact) or {}) > 1}
    if not found:
        return None
    series, legend = [], []
    for style, (label, report) in styled(found):
        if with_plain:
            other = "plain" if len(found) == 1 else style
            series.append(Series(f"plain beside {label}", _points(value(report.plain)), other, line="dashed"))
        series.append(Series(label, _points(value(report.artifact)), style))
        legend.append((style, label))
    legend += [("plain dashed", "plain")] if with_plain else []
    svg = chart(title, Axis(axes[0], base=2, shown=in_thousands), axes[1], series)
    return Figure(name, title, svg, caption, tuple(legend))


def _points(values: Mapping[str, float] | None) -> tuple[tuple[float, float], ...]:
    return tuple(sorted((float(key), value) for key, value in (values or {}).items()))
