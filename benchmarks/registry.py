"""What a benchmark is, and all of them by name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.render import Plot
from benchmarks.rows import Row
from benchmarks.subjects import Source

PACKAGES = ("quality", "speed", "memory")
Values = dict[str, Any]
Measure = Callable[..., Iterator[Values]]
Render = Callable[[Sequence[Row]], str]
BENCHMARKS: dict[str, Benchmark] = {}


@dataclass(frozen=True)
class Benchmark:
    """A measurement of one subject at a time.

    Attributes:
        name: What the command line calls it.
        subjects: Names of the subjects that its table shows.
        measure: Takes a source and settings by keyword, and yields the values of each row.
        table: Renders rows as Markdown.
        quick: Settings that let it run in seconds.
        plot: How its rows are drawn, where they are.
    """

    name: str
    subjects: tuple[str, ...]
    measure: Measure
    table: Render
    quick: Mapping[str, Any]
    plot: Plot | None = None

    @property
    def summary(self) -> str:
        """The first line of what it says of itself."""
        return (inspect.getdoc(self.measure) or "").partition("\n")[0]

    def settings(self, *, quick: bool = False) -> dict[str, Any]:
        """Settings of a run: the defaults of `measure`, and over them the quick ones where asked for."""
        parameters = inspect.signature(self.measure).parameters.values()
        defaults = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
        return defaults | (dict(self.quick) if quick else {})

    def values(self, source: Source, *, quick: bool = False) -> Iterator[Values]:
        """Measures a source."""
        return self.measure(source, **self.settings(quick=quick))


def benchmark(
    *subjects: str, table: Render, quick: Mapping[str, Any], plot: Plot | None = None
) -> Callable[[Measure], Measure]:
    """Registers a function as the benchmark of its name, with `-` for `_`."""

    def registered(measure: Measure) -> Measure:
        name = measure.__name__.replace("_", "-")
        BENCHMARKS[name] = Benchmark(name, subjects, measure, table, quick, plot)
        return measure

    return registered


def load() -> dict[str, Benchmark]:
    """All benchmarks, by name."""
    for package in PACKAGES:
        path = importlib.import_module(f"benchmarks.{package}").__path__
        for module in pkgutil.iter_modules(path):
            importlib.import_module(f"benchmarks.{package}.{module.name}")
    return BENCHMARKS
