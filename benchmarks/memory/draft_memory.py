"""Memory of a draft.

`python -m benchmarks.memory.draft_memory none|lookup|window FOLDER CONTEXT` writes some tokens in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.rows import ROOT
from benchmarks.subjects import Source
from kvslim.runtime.generate import load_tokenizer
from kvslim.runtime.session import DecodeSession
from kvslim.runtime.writing import Completion, write
from kvslim.speculative.loop import write_speculatively
from kvslim.speculative.speculator import Speculator
from kvslim.types import Draft
from kvslim.validation.rss import own_peak_mib

CHUNK, NEW_TOKENS = 512, 32
TABLE = Table(
    (
        Column("context", "context", ","),
        Column("draft", "draft"),
        Column("peak_mib", "peak MiB", ".0f"),
        Column("ratio", "ratio", ".3f"),
    )
)


@benchmark("smollm2", table=TABLE, quick={"contexts": (32,), "weights": "fp32"})
def draft_memory(
    source: Source,
    *,
    contexts: tuple[int, ...] = (2048, 8000),
    drafts: tuple[str, ...] = ("none", "lookup", "window"),
    weights: str = "int4",
) -> Iterator[Values]:
    """Peak memory of a process that writes 32 tokens behind a context, with each draft; a float32 cache, one thread."""
    # Imported here, so that the memory of a child process is not that of torch.
    from benchmarks.models import OpenModel, add_speculative_graph
    from benchmarks.texts import LITTLE

    model = OpenModel(source, LITTLE, weights=weights)
    folder = model.export(companions=True)
    add_speculative_graph(folder)
    model.release()
    for context in contexts:
        plain = None
        for draft in drafts:
            command = [sys.executable, "-m", "benchmarks.memory.draft_memory", draft, str(folder), str(context)]
            peak = float(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)
            plain = plain or peak
            yield {"context": context, "draft": draft, "peak_mib": peak, "ratio": peak / plain}


def answer(kind: Any, folder: Path, context: int) -> None:
    """Writes behind a context, of which the end is run as a prompt."""
    graph = folder / ("model.onnx" if kind == "none" else "speculative.onnx")
    session = DecodeSession(graph, capacity=context + NEW_TOKENS, threads=1)
    ids = np.random.default_rng(0).integers(0, session.vocab, context).tolist()
    completion = Completion(load_tokenizer(folder), ids, NEW_TOKENS)
    session.fill(max(0, context - CHUNK))
    logits = session.prefill(ids[-CHUNK:])
    if kind == "none":
        list(write(session, [completion], logits[None]))
    else:
        list(write_speculatively(session, completion, logits, Speculator(session, Draft(kind=kind))))


if __name__ == "__main__":
    answer(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    print(own_peak_mib())
