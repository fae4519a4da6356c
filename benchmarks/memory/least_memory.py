"""The least memory in which a model answers."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.memory.group import answers_within, missing
from benchmarks.models import OpenModel
from benchmarks.page_cache import drop
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.rows import ROOT
from benchmarks.subjects import Source
from benchmarks.texts import LITTLE
from kvslim.contract import MIB
from kvslim.devices.demand import Cache
from kvslim.devices.peak import memory
from kvslim.devices.stored_weights import artifact_weights
from kvslim.validation.measure import file_mib

OURS, GENAI = "ours", "genai"
PLAIN, SMALL = "plain", "int4, 8x"
FIRST_GUESS = 0.7  # of the peak without a limit
GENAI_MORE = 8  # MiB that genai is expected to need beyond ours, to begin its search with
PATIENCE, LEAST_PATIENCE = 3, 120  # times as long as without a limit, and seconds
TABLE = Table(
    (
        Column("context", "context", ","),
        Column("what", "cache"),
        Column("cache_mib", "cache MiB", ".1f"),
        Column("limit_mib", "least limit MiB", ".0f"),
        Column("ratio", "ratio", ".2f"),
        Column("peak_mib", "peak MiB without a limit", ".0f"),
        Column("predicted_mib", "predicted", ".0f"),
        Column("error", "predicted / peak", ".2f"),
        Column("beyond_mib", "of the peak, beside file and cache", ".0f"),
    )
)


@benchmark(
    "smollm2-shape",
    table=TABLE,
    quick={"contexts": (32,), "genai_contexts": (), "step_mib": 64, "weights": "fp32"},
)
def least_memory(
    source: Source,
    *,
    contexts: tuple[int, ...] = (1024, 8192, 16384),
    genai_contexts: tuple[int, ...] = (1024, 8192, 16384),
    step_mib: int = 4,
    weights: str = "int4",
) -> Iterator[Values]:
    """The least limit of memory, found by bisection, under which a process answers; int4 weights, one thread.

    It opens the graph, takes a context of which the last 512 tokens are read as a prompt (all that comes before fills
    the cache at once, which takes no more memory), and decodes 8 tokens. genai reads the whole prompt in such chunks,
    so its search, of few trials, begins near our own limit.
    A process ends when its own memory exceeds the limit. Pages of files count too, but can be read again, and what
    other processes have of libraries in memory is theirs, so the peak without a limit is told as well.
    """
    if (reason := missing()) is not None:
        raise SystemExit(f"error: {reason}")
    model = OpenModel(source, LITTLE, weights={"type": weights, "method": "rtn"} if weights == "int4" else weights)
    plans = {PLAIN: model.identity, SMALL: model.decided({"kv_quant": {"bits": 4}})}
    graphs = {name: model.export(plan, companions=True) for name, plan in plans.items()}
    model.release()
    files = {name: file_mib(graph) for name, graph in graphs.items()}
    needs = {
        name: artifact_weights(graph, model.spec, weights, int(files[name] * MIB)) for name, graph in graphs.items()
    }
    tried = [(OURS, context, name) for context in contexts for name in graphs]
    tried += [(GENAI, context, name) for context in genai_contexts for name in graphs]
    limits: dict[tuple[int, str], float] = {}
    for runtime, context, name in tried:
        arguments = [runtime, str(graphs[name]), str(context)]
        ours = limits.get((context, name))
        limit, peak = least_limit(arguments, graphs[name], step_mib, None if ours is None else ours + GENAI_MORE)
        limits.setdefault((context, name), limit)
        cache = model.size(plans[name], context) * context / MIB
        predicted = memory(needs[name], Cache.of(name, model.spec, plans[name]), context) / MIB
        yield {
            "context": context,
            "what": name if runtime == OURS else f"{name}, in genai",
            "cache_mib": cache,
            "limit_mib": limit,
            "ratio": limit / limits[context, PLAIN],
            "peak_mib": peak,
            "predicted_mib": predicted if runtime == OURS else None,
            "error": predicted / peak if runtime == OURS else None,
            "beyond_mib": peak - cache - files[name],
        }


def least_limit(
    arguments: Sequence[str], graph: Path, step_mib: int, guess: float | None = None
) -> tuple[float, float]:
    """The least limit in MiB, to `step_mib`, and the peak without one.

    From a guess the search moves away in steps that double until it has a limit that is too small and one that is not.
    """
    command = [sys.executable, "-m", "benchmarks.memory.answer", *arguments]
    started = time.perf_counter()
    peak = float(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)
    patience = max(LEAST_PATIENCE, PATIENCE * (time.perf_counter() - started))
    low, high, stride = 0.0, math.inf, 2 * step_mib
    tried = guess or FIRST_GUESS * peak
    while high - low > step_mib:
        if _answers(tried, command, graph, patience):
            high = tried
        else:
            low = tried
        if low and high < math.inf:
            tried = (low + high) / 2
        else:
            tried, stride = max(tried + (stride if low else -stride), step_mib), 2 * stride
    return high, peak


def _answers(mib: float, command: Sequence[str], graph: Path, patience: float) -> bool:
    drop(list(graph.iterdir()))  # what is in memory already would not count
    return answers_within(mib, command, patience)
