"""What onnxruntime's options, and smaller chunks of a prompt, do to the memory of a session."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import numpy as np

from benchmarks.memory.changed_session import CHANGES, STORED, store_packed
from benchmarks.models import OpenModel
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.rows import ROOT
from benchmarks.subjects import Source
from benchmarks.texts import LITTLE

CRASHES = {-signal.SIGABRT, -signal.SIGBUS, -signal.SIGSEGV}
TABLE = Table(
    (
        Column("change", "changed"),
        Column("opened_mib", "own MiB once open", ".0f"),
        Column("own_mib", "own MiB at the end", ".0f"),
        Column("peak_mib", "peak MiB", ".0f"),
        Column("difference", "logits differ by", ".0e"),
    )
)


@benchmark("smollm2-shape", table=TABLE, quick={"context": 32, "weights": "fp32"})
def session_options(source: Source, *, context: int = 1024, weights: str = "int4") -> Iterator[Values]:
    """Memory of a process that answers over a plain cache, by what is changed of its session; int4 weights, one thread.

    A process's own memory is all of it but pages of files, which the system can give up. The peak counts both. A change
    with which onnxruntime crashes at its first run, or gives no numbers, says so.
    """
    model = OpenModel(source, LITTLE, weights=weights)
    graph = model.export()
    model.release()
    logits, expected = source.folder / "logits.npy", None
    for change in CHANGES:
        folder = store_packed(graph, source.folder / "packed") if change == STORED else graph
        command = [sys.executable, "-m", "benchmarks.memory.changed_session", change]
        done = subprocess.run(
            [*command, str(folder), str(context), str(logits)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        opened, *ended = map(float, done.stdout.split())
        if done.returncode in CRASHES:
            yield {"change": f"{change}, crashes", "opened_mib": opened}
            continue
        done.check_returncode()
        found = np.load(logits)
        expected = found if expected is None else expected
        is_number = bool(np.isfinite(found).all())
        yield {
            "change": change if is_number else f"{change}, gives NaN",
            "opened_mib": opened,
            "own_mib": ended[0],
            "peak_mib": ended[1],
            "difference": float(np.abs(found - expected).max()) if is_number else None,
        }
