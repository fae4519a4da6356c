"""One chart as inline SVG: lines and marks on two axes, coloured by the page's style sheet; no plotting library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log, log2, log10
from typing import NamedTuple

WIDTH, HEIGHT = 360, 240  # the width of a phone, so that text keeps its size there
LEFT, RIGHT, TOP, BOTTOM = 62, 350, 36, 198
MOST_TICKS = 6
DECIMAL = 10
MARKS = {"large": 7.0}  # radii other than the common one
LETTER, LINE = 6.2, 12.0  # width and height of a letter of a name
LABEL_GAP, LABEL_WIDTH = 13, 56  # for horizontal rules: labels that would be closer are put side by side


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label: What is shown, with its unit.
        base: Base of the logarithm; None for a linear axis.
        low: Lowest value of a linear axis.
        high: Highest value of a linear axis, if the data do not set it.
        binary: Whether the ticks of a linear axis are a power of two apart, not a round number.
        shown: A tick's text.
    """

    label: str
    base: int | None = None
    low: float = 0.0
    high: float | None = None
    binary: bool = False
    shown: Callable[[float], str] = "{:,g}".format


@dataclass(frozen=True)
class Series:
    """Points of one colour.

    Attributes:
        label: Name in the legend and in the hints.
        points: (x, y) pairs, left to right.
        style: Class in the style sheet: `plain`, or `s0` to `s5`.
        line: `solid`, `dashed`, `dotted`, or none for marks only.
        marks: `full`; `hollow` for what was priced, not made; `large` for what the page is about; or none.
        names: Written beside the points, where there is room; empty for none.
        spreads: (low, high) of each point, drawn as a bar through it; empty for none.
    """

    label: str
    points: tuple[tuple[float, float], ...]
    style: str
    line: str = "solid"
    marks: str = "full"
    names: tuple[str, ...] = ()
    spreads: tuple[tuple[float, float], ...] = ()

    @property
    def heights(self) -> Iterator[float]:
        """All that the vertical axis must reach."""
        yield from (height for _, height in self.points)
        yield from (end for spread in self.spreads for end in spread)


@dataclass(frozen=True)
class Rule:
    """A straight line across the chart at one value: vertical for `x`, horizontal for `y`.

    Attributes:
        axis: `x` or `y`.
        value: Where it is.
        label: Its text, at the left end of a horizontal line.
        right: Whether it stands at the right end.
    """

    axis: str
    value: float
    label: str
    right: bool = False


def chart(title: str, x: Axis, y: Axis, series: Sequence[Series], rules: Sequence[Rule] = ()) -> str:
    """The chart's SVG; the same values give the same text.

    Args:
        title: Text for screen readers.
        x: The horizontal axis.
        y: The vertical axis.
        series: At least one point in all.
        rules: Drawn behind the series.
    """
    across = _Scale(x, [*(left for one in series for left, _ in one.points), *_values(rules, "x")], LEFT, RIGHT)
    upwards = _Scale(y, [*(height for one in series for height in one.heights), *_values(rules, "y")], BOTTOM, TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">',
        f"<title>{escape(title)}</title>",
        *_axes(x, y, across, upwards),
        *_rules(rules, across, upwards),
        *(part for one in series for part in _series(one, x, y, across, upwards)),
        *_names(series, rules, across, upwards),
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
    round_steps = (factor * power for factor in (1, 2, 2.5, 5, 10))
    steps = (2.0 ** ceil(log2(rough) - 1e-9),) if axis.binary else round_steps
    step = next(step for step in steps if step >= rough * (1 - 1e-9))
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
        if rule.right:
            yield _rule_label(rule, RIGHT - 4, height - 3, "end")
            continue
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
    for (left, _), spread in zip(places, one.spreads, strict=False):
        low, high = map(upwards, spread)
        yield f'<path class="spread {one.style}" d="M{left - 3:.1f} {low:.1f}h6m-3 0V{high:.1f}m-3 0h6"/>'
    if one.marks == "none":
        return
    radius = MARKS.get(one.marks, 4.5)
    for (left, height), (value, other) in zip(places, one.points, strict=True):
        hint = f"{one.label}: {value:,.6g} {x.label}, {other:,.4g} {y.label}"
        yield (
            f'<circle class="mark {one.marks} {one.style}" cx="{left:.1f}" cy="{height:.1f}" r="{radius}">'
            f"<title>{escape(hint)}</title></circle>"
        )


class _Box(NamedTuple):
    """What a name or a mark covers."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        """Whether two boxes overlap."""
        apart = self.right < other.left or other.right < self.left or self.bottom < other.top or other.bottom < self.top
        return not apart


def _names(series: Sequence[Series], rules: Sequence[Rule], across: _Scale, upwards: _Scale) -> Iterator[str]:
    """Names beside points, each where it covers neither marks nor other names nor labels; without room none."""
    taken = [_around(across(left), upwards(height), 6) for one in series for left, height in one.points]
    taken += [_of_label(rule, across if rule.axis == "x" else upwards) for rule in rules]
    for one in sorted(series, key=lambda one: one.marks != "large"):
        for (left, height), name in zip(one.points, one.names, strict=False):
            x, y, width = across(left), upwards(height), LETTER * len(name)
            gap = MARKS.get(one.marks, 4.5) + 4
            middle, *corners = [[(x + gap, top), (x - gap - width, top)] for top in (y - 6, y - 21, y + 9)]
            spots = [*middle, (x - width / 2, y - 21), (x - width / 2, y + 9), *corners[0], *corners[1]]
            boxes = (_Box(start, top, start + width, top + LINE) for start, top in spots)
            box = next((box for box in boxes if _inside(box) and not any(map(box.meets, taken))), None)
            if box is not None:
                taken.append(box)
                place = f'x="{box.left:.1f}" y="{box.bottom - 2:.1f}"'
                yield f'<text class="name {one.style}" {place}>{escape(name)}</text>'


def _of_label(rule: Rule, scale: _Scale) -> _Box:
    """What a rule's label covers, on either side of a vertical line."""
    place, width = scale(rule.value), LETTER * len(rule.label) + 8
    if rule.axis == "x":
        return _Box(place - width, TOP, place + width, TOP + 14)
    left = RIGHT - width if rule.right else LEFT
    return _Box(left, place - 14, left + width, place)


def _around(x: float, y: float, radius: float) -> _Box:
    return _Box(x - radius, y - radius, x + radius, y + radius)


def _inside(box: _Box) -> bool:
    return box.left >= LEFT and box.right <= RIGHT and box.top >= TOP - 8 and box.bottom <= BOTTOM


def _values(rules: Iterable[Rule], axis: str) -> list[float]:
    return [rule.value for rule in rules if rule.axis == axis]
