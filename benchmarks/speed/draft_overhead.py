"""What a draft costs where there is nothing to propose: texts that nobody can foresee, beside plain decoding."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.speed.speculative import graphs
from benchmarks.subjects import Source
from kvslim.runtime.generate import Sampling
from kvslim.runtime.session import DecodeSession
from kvslim.runtime.writing import Completion, write
from kvslim.speculative.loop import write_speculatively
from kvslim.speculative.speculator import Speculator
from kvslim.types import Draft

PIECE = 16  # tokens that each side writes before it is the other's turn
TABLE = Table(
    (
        Column("cache", "cache"),
        Column("context", "context", ","),
        Column("ms", "plain, ms a token", ".2f"),
        Column("speed", "times the speed", ".3f"),
        Column("proposing", "runs with a proposal", ".0%"),
    )
)


@benchmark("demo", table=TABLE, quick={"contexts": (32,), "caches": ("float32",), "texts": 1, "tokens": 32})
def draft_overhead(
    source: Source,
    *,
    contexts: tuple[int, ...] = (128, 1024),
    caches: tuple[str, ...] = ("float32", "int8"),
    texts: int = 6,
    tokens: int = 256,
    weights: str = "int4",
) -> Iterator[Values]:
    """Speed with the lookup over that without, on texts of random words that it can foresee little of.

    CPU time of one thread. The same text is written with and without the draft, 16 tokens of one and 16 of the other in
    turns; the speed is the median over these pieces. The draft keeps what it learns from one text to the next.
    """
    for cache, folder, tokenizer in graphs(source, caches, weights):
        for context in contexts:
            sides = [
                DecodeSession(folder / name, capacity=context + tokens, threads=1)
                for name in ("model.onnx", "speculative.onnx")
            ]
            speculator, times, rounds = Speculator(sides[1], Draft(kind="lookup")), [], list[tuple[int, int]]()
            for seed in range(texts):
                ids = np.random.default_rng(seed).integers(4, sides[0].vocab, context).tolist()
                written = [Completion(tokenizer, ids, tokens, sampling=Sampling(2.0, seed=seed)) for _ in sides]
                times += in_turns(sides, written, speculator)
                rounds += written[1].rounds
            plain, drafted = np.array(times).T
            yield {
                "cache": cache,
                "context": context,
                "ms": 1000 * float(np.median(plain)),
                "speed": float(np.median(plain / drafted)),
                "proposing": sum(proposed > 0 for proposed, _ in rounds) / len(rounds),
            }


def in_turns(
    sides: list[DecodeSession], written: list[Completion], speculator: Speculator
) -> Iterator[tuple[float, float]]:
    """Seconds a token of each piece of a text, without and with the draft."""
    for side in sides:
        side.reset()
    plain, drafted = (side.prefill(completion.ids) for side, completion in zip(sides, written, strict=True))
    runs: list[Iterator[object]] = [
        write(sides[0], written[:1], plain[None]),
        write_speculatively(sides[1], written[1], drafted, speculator),
    ]
    for place in range(min(completion.left for completion in written) // PIECE):
        order = (0, 1) if place % 2 else (1, 0)
        took = {side: _seconds(runs[side], written[side], PIECE * (place + 1)) for side in order}
        yield took[0], took[1]


def _seconds(run: Iterator[object], completion: Completion, until: int) -> float:
    """Seconds a token until a completion has so many."""
    before, start = len(completion.tokens), time.thread_time()
    while len(completion.tokens) < until:
        next(run)
    return (time.thread_time() - start) / max(1, len(completion.tokens) - before)
