"""One chart as inline SVG: lines and marks on two axes, coloured by the page's style sheet; no plotting library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log, log10

WIDTH, HEIGHT = 360, 240  # the width of a phone, so that text keeps its size there
LEFT, RIGHT, TOP, BOTTOM = 62, 350, 36, 198
MOST_TICKS = 6
DECIMAL = 10
LABEL_GAP, LABEL_WIDTH = 13, 56  # for horizontal rules: labels that would be closer are put side by side


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label: What is shown, with its unit.
        base: Base of the logarithm; None for a linear axis.
        low: Lowest value of a linear axis.
        high: Highest value of a linear axis, if the data do not set it.
        shown: A tick's text.
    """

    label: str
    base: int | None = None
    low: float = 0.0
    high: float | None = None
    shown: Callable[[float], str] = "{:,g}".format


@dataclass(frozen=True)
class Series:
    """Points of one colour.

    Attributes:
        label: Name in the legend and in the hints.
        points: (x, y) pairs, left to right.
        style: Class in the style sheet: `plain`, or `s0` to `s5`.
        line: `solid`, `dashed`, or none for marks only.
        marks: Whether points are marked; hollow ones are predictions.
    """

    label: str
    points: tuple[tuple[float, float], ...]
    style: str
    line: str = "solid"
    marks: str = "full"


@dataclass(frozen=True)
class Rule:
    """A straight line across the chart at one value: vertical for `x`, horizontal for `y`."""

    axis: str
    value: float
    label: str


def chart(title: str, x: Axis, y: Axis, series: Sequence[Series], rules: Sequence[Rule] = ()) -> str:
    """The chart's SVG; the same values give the same text.

    Args:
        title: Text for screen readers.
        x: The horizontal axis.
        y: The vertical axis.
        series: At least one point in all.
        rules: Drawn behind the series.
    """
    points = [point for one in series for point in one.points]
    across = _Scale(x, [*(point[0] for point in points), *_values(rules, "x")], LEFT, RIGHT)
    upwards = _Scale(y, [*(point[1] for point in points), *_values(rules, "y")], BOTTOM, TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">',
        f"<title>{escape(title)}</title>",
        *_axes(x, y, across, upwards),
        *_rules(rules, across, upwards),
        *(part for one in series for part in _series(one, x, y, across, upwards)),
        "</svg>",
    ]
    return "\n".join(parts)


class _Scale:
    """Where a value lies on one axis, in units of the drawing."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self._base, self._start, self._end = axis.base, start, end
        self.ticks = _log_ticks(values, axis.base) if axis.base else _linear_ticks(axis, values)
        self._low, self._high = self._raw(self.ticks[0]), self._raw(self.ticks[-1])

    def __call__(self, value: float) -> float:
        share = (self._raw(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def _raw(self, value: float) -> float:
        return log(value, self._base) if self._base else value


def _log_ticks(values: Sequence[float], base: int) -> list[float]:
    low, high = floor(log(min(values), base) + 1e-9), ceil(log(max(values), base) - 1e-9)
    high = max(high, low + 1)
    if base == DECIMAL and high == low + 1:
        return [multiple * 10.0**low for multiple in (1, 2, 5, 10)]
    step = ceil((high - low) / (MOST_TICKS - 1))
    return [float(base) ** (low + step * index) for index in range(ceil((high - low) / step) + 1)]


def _linear_ticks(axis: Axis, values: Sequence[float]) -> list[float]:
    span = (max(values) if axis.high is None else axis.high) - axis.low or 1.0
    rough = span / (MOST_TICKS - 2)
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [axis.low + step * index for index in range(ceil(span / step - 1e-9) + 1)]


def _axes(x: Axis, y: Axis, across: _Scale, upwards: _Scale) -> Iterator[str]:
    yield f'<text class="label" x="2" y="12">{escape(y.label)}</text>'
    yield f'<text class="label" x="{RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(x.label)}</text>'
    for tick in upwards.ticks:
        height = upwards(tick)
        yield f'<path class="grid" d="M{LEFT} {height:.1f}H{RIGHT}"/>'
        yield f'<text x="{LEFT - 9}" y="{height + 4:.1f}" text-anchor="end">{escape(y.shown(tick))}</text>'
    for tick in across.ticks:
        place = across(tick)
        yield f'<path class="grid" d="M{place:.1f} {BOTTOM}v4"/>'
        anchor = "end" if tick == across.ticks[-1] else "middle"
        yield f'<text x="{place:.1f}" y="{BOTTOM + 17}" text-anchor="{anchor}">{escape(x.shown(tick))}</text>'


def _rules(rules: Sequence[Rule], across: _Scale, upwards: _Scale) -> Iterator[str]:
    for rule in rules:
        if rule.axis == "x":
            place = across(rule.value)
            before = place > (LEFT + RIGHT) / 2
            yield f'<path class="rule" d="M{place:.1f} {TOP}V{BOTTOM}"/>'
            yield _rule_label(rule, place + (-4 if before else 4), TOP + 10, "end" if before else "start")
    below, left = float(HEIGHT), LEFT + 4
    for height, rule in sorted(((upwards(rule.value), rule) for rule in rules if rule.axis == "y"), key=_downwards):
        yield f'<path class="rule" d="M{LEFT} {height:.1f}H{RIGHT}"/>'
        left = LEFT + 4 if below - height >= LABEL_GAP else left + LABEL_WIDTH
        below = height
        yield _rule_label(rule, left, height - 3, "start")


def _downwards(placed: tuple[float, Rule]) -> float:
    return -placed[0]


def _rule_label(rule: Rule, x: float, y: float, anchor: str) -> str:
    return f'<text class="rule-label" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(rule.label)}</text>'


def _series(one: Series, x: Axis, y: Axis, across: _Scale, upwards: _Scale) -> Iterator[str]:
    places = [(across(left), upwards(height)) for left, height in one.points]
    if one.line != "none" and len(places) > 1:
        path = "L".join(f"{left:.1f} {height:.1f}" for left, height in places)
        yield f'<path class="line {one.line} {one.style}" d="M{path}"/>'
    if one.marks == "none":
        return
    for (left, height), (value, other) in zip(places, one.points, strict=True):
        hint = f"{one.label}: {value:,.6g} {x.label}, {other:,.4g} {y.label}"
        yield (
            f'<circle class="mark {one.marks} {one.style}" cx="{left:.1f}" cy="{height:.1f}" r="4.5">'
            f"<title>{escape(hint)}</title></circle>"
        )


def _values(rules: Iterable[Rule], axis: str) -> list[float]:
    return [rule.value for rule in rules if rule.axis == axis]
