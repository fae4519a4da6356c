"""Runs benchmarks, keeps their rows and prints their tables.

    python -m benchmarks NAME [--subject S] [--quick] [--render] [--plot]
    python -m benchmarks --list

Rows go to build/benchmarks/NAME.jsonl; the table is that of each subject's last run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks import render, rows
from benchmarks.registry import Benchmark, load
from benchmarks.subjects import SUBJECTS, Subject


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("name", nargs="?", help="of the benchmark")
    parser.add_argument("--list", action="store_true", help="name all benchmarks with their subjects")
    parser.add_argument("--subject", choices=SUBJECTS, help="in place of the benchmark's own subjects")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--render", action="store_true", help="measure nothing: print the table of the last run")
    parser.add_argument("--plot", action="store_true", help="draw docs/images/NAME.svg too")
    options = parser.parse_args(arguments)
    benchmarks = load()
    if options.list:
        print(listing(benchmarks))
        return
    if options.name not in benchmarks:
        parser.error(f"no benchmark {options.name!r}; see --list")
    benchmark, path = benchmarks[options.name], rows.path_of(options.name, quick=options.quick)
    if not options.render:
        for subject in subjects_of(benchmark, options.subject):
            run(benchmark, subject, path, quick=options.quick)
    show(benchmark, rows.latest(path), plot=options.plot)


def listing(benchmarks: dict[str, Benchmark]) -> str:
    """Benchmarks and subjects; of a subject that is not here, why."""
    lines = [f"{one.name:20} {', '.join(one.subjects):16} {one.summary}" for one in benchmarks.values()]
    lines += ["", "subjects:"]
    for subject in SUBJECTS.values():
        missing = subject.missing()
        lines.append(f"{subject.name:20} {subject.title}{'' if missing is None else f' (skipped: {missing})'}")
    return "\n".join(lines)


def subjects_of(benchmark: Benchmark, name: str | None) -> list[Subject]:
    """The subjects to measure; one that was asked for must be there, others are skipped with a reason."""
    found = []
    for subject in (SUBJECTS[one] for one in ((name,) if name else benchmark.subjects)):
        missing = subject.missing()
        if missing is not None and name:
            raise SystemExit(f"error: {subject.name}: {missing}")
        if subject.kind != SUBJECTS[benchmark.subjects[0]].kind:
            raise SystemExit(f"error: {benchmark.name} does not take {subject.name}")
        if missing is None:
            found.append(subject)
        else:
            print(f"{subject.name} skipped: {missing}", file=sys.stderr)
    return found


def run(benchmark: Benchmark, subject: Subject, path: Path, *, quick: bool = False) -> None:
    """Measures one subject; each row is kept as soon as it is there."""
    started, settings = rows.now(), benchmark.settings(quick=quick)
    with tempfile.TemporaryDirectory(prefix="kvslim-") as folder:
        for values in benchmark.values(subject.source(Path(folder)), quick=quick):
            print(f"{benchmark.name}, {subject.name}: {values}", file=sys.stderr, flush=True)
            rows.append(path, rows.row(benchmark.name, subject.name, settings, values, started))


def show(benchmark: Benchmark, found: list[rows.Row], *, plot: bool) -> None:
    """Prints the table of rows, and draws them where asked to."""
    if not found:
        raise SystemExit(f"error: no rows of {benchmark.name}; run it first")
    print(benchmark.table(found), end="")
    if plot:
        if benchmark.plot is None:
            raise SystemExit(f"error: {benchmark.name} has no plot")
        render.draw(benchmark.plot, found, render.FIGURES / f"{benchmark.name}.svg")
