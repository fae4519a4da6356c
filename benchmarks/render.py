"""Tables and plots of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.rows import ROOT, Row, Value
from benchmarks.subjects import title_of

FIGURES = ROOT / "docs" / "images"
NONE = "-"


class Column(NamedTuple):
    """One column of a table.

    Attributes:
        key: Of a row's values.
        header: Above it; in a column that repeats, `{}` is filled with the value that it repeats for.
        format: Of numbers, as in an f-string.
    """

    key: str
    header: str
    format: str = ""


@dataclass(frozen=True)
class Table:
    """Rows as a Markdown table, one table per subject.

    Attributes:
        columns: Columns that stand once; together they name a line of the table.
        pivot: The value for whose every content the columns in `each` repeat.
        each: Columns that repeat.
        format: Of the pivot's content in headers.
    """

    columns: tuple[Column, ...]
    pivot: str = ""
    each: tuple[Column, ...] = ()
    format: str = "g"

    def __call__(self, rows: Sequence[Row]) -> str:
        """The tables; each under its subject's title where there are several."""
        return per_subject(rows, self.of_subject)

    def of_subject(self, rows: Sequence[Row]) -> str:
        """The table of one subject's rows."""
        wide = list(dict.fromkeys(row.values[self.pivot] for row in rows)) if self.pivot else []
        lines: dict[tuple[Value, ...], dict[Value, Mapping[str, Value]]] = {}
        for row in rows:
            name = tuple(row.values.get(column.key) for column in self.columns)
            lines.setdefault(name, {})[row.values.get(self.pivot)] = row.values
        headers = [column.header for column in self.columns]
        headers += [column.header.format(format(of, self.format)) for of in wide for column in self.each]
        body = [[*self._fixed(name), *self._repeated(found, wide)] for name, found in lines.items()]
        return markdown(headers, body)

    def _fixed(self, name: tuple[Value, ...]) -> list[str]:
        return [cell(value, column.format) for value, column in zip(name, self.columns, strict=True)]

    def _repeated(self, found: Mapping[Value, Mapping[str, Value]], wide: Sequence[Value]) -> list[str]:
        return [cell(found.get(of, {}).get(column.key), column.format) for of in wide for column in self.each]


@dataclass(frozen=True)
class Plot:
    """Values against each other, a panel for each subject and each value that it has.

    Attributes:
        x: The value along the horizontal axis, and its label.
        ys: Values along the vertical axes, and their labels.
        name: The value that names a point.
        styles: Marker of each series, by how its points' names begin.
        logarithmic: Those of `ys` whose axis is logarithmic.
    """

    x: tuple[str, str]
    ys: Mapping[str, str]
    name: str
    styles: Mapping[str, str]
    logarithmic: frozenset[str] = frozenset()


def per_subject(rows: Sequence[Row], table: object) -> str:
    """What `table` makes of each subject's rows, under the subject's title where there are several."""
    assert callable(table)
    subjects = list(dict.fromkeys(row.subject for row in rows))
    tables = {subject: table([row for row in rows if row.subject == subject]) for subject in subjects}
    if len(tables) == 1:
        return next(iter(tables.values()))
    return "\n".join(f"{_capitalised(title_of(subject))}:\n\n{text}" for subject, text in tables.items())


def markdown(headers: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table; columns of numbers are aligned to the right."""
    right = [all(_is_number(line[place]) for line in body) for place in range(len(headers))]
    rule = ["---:" if numbers else "---" for numbers in right]
    return "".join(f"| {' | '.join(line)} |\n" for line in (headers, rule, *body))


def cell(value: Value, format_: str = "") -> str:
    """A value as text; of several numbers the mean, and behind it their range."""
    if value is None:
        return NONE
    if isinstance(value, tuple | list):
        mean, low, high = (format(float(of(value)), format_) for of in (np.mean, np.min, np.max))
        return f"{mean} ({low} - {high})"
    return str(value) if isinstance(value, str | bool) else format(value, format_)


def draw(plot: Plot, rows: Sequence[Row], path: Path) -> None:
    """Writes a plot as SVG, the same bytes for the same rows."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "kvslim", "svg.fonttype": "none"})
    from matplotlib import pyplot

    panels = _panels(plot, rows)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.6), squeeze=False)
    for axis, (subject, y, of) in zip(axes[0], panels, strict=True):
        for series, style in plot.styles.items():
            points = [row.values for row in of if str(row.values[plot.name]).startswith(series)]
            axis.plot(*([point[key] for point in points] for key in (plot.x[0], y)), style, label=series.strip("`"))
        axis.set(title=title_of(subject), xlabel=plot.x[1], ylabel=plot.ys[y])
        axis.grid(alpha=0.3)
        axis.set(**({"yscale": "log"} if y in plot.logarithmic else {"ylim": (-0.03, 1.03)}))
    axes[0, 0].legend(fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _panels(plot: Plot, rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """Subject, value and rows of each panel."""
    panels = []
    for y in plot.ys:
        for subject in dict.fromkeys(row.subject for row in rows):
            of = [row for row in rows if row.subject == subject and row.values.get(y) is not None]
            panels += [(subject, y, of)] if of else []
    return panels


def _is_number(text: str) -> bool:
    return text[:1] == NONE or text[:1].isdigit()


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
