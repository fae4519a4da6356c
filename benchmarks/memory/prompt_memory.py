"""Memory of a long prompt.

`python -m benchmarks.memory.prompt_memory GRAPH LENGTH CHUNK` reads one prompt in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.rows import ROOT
from benchmarks.subjects import Source
from kvslim.runtime.session import DecodeSession
from kvslim.validation.rss import own_peak_mib

TABLE = Table(
    (
        Column("prompt", "prompt", ","),
        Column("cache_mib", "cache MiB", ".0f"),
        Column("chunk", "chunk"),
        Column("peak_mib", "peak MiB", ".0f"),
        Column("seconds", "seconds", ".1f"),
    )
)


@benchmark("smollm2-shape", table=TABLE, quick={"lengths": (64,), "chunks": (0,), "weights": "fp32"})
def prompt_memory(
    source: Source,
    *,
    lengths: tuple[int, ...] = (2048, 8192),
    chunks: tuple[int, ...] = (128, 512, 0),
    weights: str = "int4",
) -> Iterator[Values]:
    """Peak memory and time of a long prompt, in chunks and in one piece, with int4 weights.

    Each run is a fresh process; a chunk of 0 is one piece. The cache itself takes what the column says.
    """
    # Imported here, so that the memory of a child process is not that of torch.
    from benchmarks.models import OpenModel
    from benchmarks.texts import LITTLE

    model = OpenModel(source, LITTLE, weights=weights)
    graph = model.export()
    model.release()
    for length in lengths:
        for chunk in chunks:
            command = [sys.executable, "-m", "benchmarks.memory.prompt_memory", str(graph), str(length), str(chunk)]
            output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
            cache, peak, seconds = map(float, output.split())
            shown = {"cache_mib": cache, "chunk": str(chunk or "all"), "peak_mib": peak, "seconds": seconds}
            yield {"prompt": length, **shown}


def read_prompt(graph: Path, length: int, chunk: int) -> tuple[float, float, float]:
    """MiB of the cache, this process's peak in MiB, and seconds."""
    session = DecodeSession(graph, capacity=length)
    tokens = np.random.default_rng(0).integers(0, session.vocab, length)
    start = time.perf_counter()
    session.prefill(tokens, chunk=chunk or length)
    seconds = time.perf_counter() - start
    return session.layout.bytes_at(length) / 2**20, own_peak_mib(), seconds


if __name__ == "__main__":
    print(*read_prompt(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
