"""Compressing a model that is larger than the memory that is left."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from benchmarks.memory.group import missing, run_within
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source

HOURS = 6  # after which it is given up
TABLE = Table(
    (
        Column("stage", "stage"),
        Column("seconds", "seconds", ",.0f"),
        Column("peak_mib", "peak MiB", ",.0f"),
        Column("own_mib", "of these own", ",.0f"),
        Column("limit_mib", "limit", ",.0f"),
    )
)


@benchmark("llama-3b-shape", table=TABLE, quick={"limit_gib": 2.0, "length": 48})
def beyond_memory(
    source: Source, *, limit_gib: float = 8.0, weights: str = "int4", samples: int = 4, length: int = 256
) -> Iterator[Values]:
    """Time and peak memory of each stage of `kvslim compress` under a hard limit of memory, in a fresh process.

    A group of processes has the limit, so pages of files count too. Keys and values in 4 bits with the refit, a little
    text, and a short validation: what a stage takes beside the text is what the table is about.
    """
    if (reason := missing()) is not None:
        raise SystemExit(f"error: {reason}")
    recipe = {
        "name": "beyond-memory",
        "weights": weights,
        "methods": [{"kv_hdc": {"bits": 4}}],
        "calibration": {"source": source.calibration, "samples": samples, "length": length, "context": 1024},
        "validation": {
            "source": source.validation,
            "samples": 2,
            "length": length,
            "recall_items": 2,
            "recall_distance": 16,
            "prompts": [length],
            "contexts": [1024],
            "repeats": 3,
        },
    }
    cache = f"KVSLIM_CACHE={source.folder / 'cache'}"  # nothing is known from other runs
    command = ["env", cache, sys.executable, "-m", "benchmarks.memory.stages", source.model, json.dumps(recipe)]
    found = run_within(limit_gib * 2**10, [*command, str(source.folder / "out")], HOURS * 3600)
    if found is None:
        raise SystemExit(f"error: it takes more than {HOURS} hours")
    for line in found.stdout.splitlines():
        yield {**json.loads(line), "limit_mib": limit_gib * 2**10}
    if found.returncode:
        raise SystemExit(f"error: it ended with {found.returncode} within {limit_gib:g} GiB: {found.stderr}")
