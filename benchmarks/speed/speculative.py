"""Texts with and without a draft, by kind of text and context."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks.models import OpenModel, add_speculative_graph
from benchmarks.prompts import KINDS, prompt
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import LITTLE
from kvslim.demo.world import heldout_text
from kvslim.prefix import shared_length
from kvslim.runtime.opening import Logits
from kvslim.runtime.session import DecodeSession
from kvslim.runtime.writing import Completion, write
from kvslim.speculative.estimates import MOST_PROPOSED
from kvslim.speculative.loop import acceptance, tokens_per_round, write_speculatively
from kvslim.speculative.speculator import Speculator
from kvslim.types import Draft

DRAFTS: Mapping[str, Draft] = {"lookup": Draft(kind="lookup"), "window": Draft(kind="window")}
COUNTS = (1, 2, 3, 4, 6, 8, 12, MOST_PROPOSED + 1)
TABLE = Table(
    (Column("cache", "cache"), Column("context", "context", ","), Column("kind", "text")),
    pivot="draft",
    each=(
        Column("speed", "{}: speed", ".2f"),
        Column("per_round", "tokens a run", ".2f"),
        Column("first", "first right", ".0%"),
        Column("same", "same tokens"),
    ),
    format="",
)
COSTS = Table(
    (Column("cache", "cache"), Column("context", "context", ",")),
    pivot="tokens",
    each=(Column("ms", "{} at once", ".1f"),),
)
QUICK = {"contexts": (48,), "caches": ("float32",)}


@benchmark("smollm2", table=TABLE, quick={**QUICK, "tokens": 4, "kinds": ("chat",), "repeats": 1})
def speculative(
    source: Source,
    *,
    contexts: tuple[int, ...] = (128, 2048, 8000),
    kinds: tuple[str, ...] = tuple(KINDS),
    caches: tuple[str, ...] = ("float32", "int8"),
    tokens: int = 64,
    repeats: int = 5,
    weights: str = "int4",
) -> Iterator[Values]:
    """Tokens per second with a draft over those without, on five kinds of text.

    Greedy texts of one thread. A run of the graph counts as what `verify-cost` finds for it, and all else as the CPU
    time that it takes, so that other load on the machine changes little. `first right` is how often the first proposal
    of a run was right, `same tokens` how many tokens of plain decoding the text begins with. A draft keeps what it
    learnt from one text to the next, as in a conversation.
    """
    story, document = (text_file(text, source.folder) for text in (source.validation, source.calibration))
    for cache, folder, tokenizer in graphs(source, caches, weights):
        for context in contexts:
            session = Timetable(folder / "speculative.onnx", capacity=context + max(tokens, COUNTS[-1]), threads=1)
            session.measure(context, repeats)
            speculators = {name: Speculator(session, draft, clock=session.clock) for name, draft in DRAFTS.items()}
            for kind in kinds:
                ids = prompt(kind, story, document, ids_of(tokenizer), context)
                for name, values in compared(session, tokenizer, ids, speculators, tokens).items():
                    yield {"cache": cache, "context": context, "kind": kind, "draft": name, **values}


@benchmark("smollm2", table=COSTS, quick={**QUICK, "repeats": 1})
def verify_cost(
    source: Source,
    *,
    contexts: tuple[int, ...] = (264, 128, 2048, 8000),
    caches: tuple[str, ...] = ("float32", "int8"),
    repeats: int = 9,
    weights: str = "int4",
) -> Iterator[Values]:
    """Milliseconds of a run of several tokens by context; 264 rows are what a window draft reads.

    CPU time of one thread, the least of the repeats, which go through all numbers of tokens in turn.
    """
    for cache, folder, _ in graphs(source, caches, weights):
        for context in contexts:
            session = Timetable(folder / "speculative.onnx", capacity=context + COUNTS[-1], threads=1)
            for count, seconds in session.measure(context, repeats).items():
                yield {"cache": cache, "context": context, "tokens": count, "ms": 1000 * seconds}


def graphs(source: Source, caches: Sequence[str], weights: str) -> Iterator[tuple[str, Path, Tokenizer]]:
    """The graph of each kind of cache."""
    model = OpenModel(source, LITTLE, weights=weights)
    for cache in caches:
        folder = model.export(None if cache == "float32" else model.decided({"kv_quant": {"bits": 8}}))
        add_speculative_graph(folder)
        yield cache, folder, model.tokenizer


def text_file(text: str, folder: Path) -> Path:
    """A text's file; the demo's stories where the model would write the text itself."""
    if text != "self":
        return Path(text)
    path = folder / "stories.txt"
    path.write_text("\n".join(heldout_text(40, 450)), encoding="utf-8")
    return path


def ids_of(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Gives the ids of a text."""
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


class Timetable(DecodeSession):
    """A session whose clock takes each run for what such a run was measured to cost; so does that of a sibling."""

    def measure(self, context: int, repeats: int) -> dict[int, float]:
        """Seconds of runs of `COUNTS` tokens behind a context, which are kept for the clock."""
        found: dict[int, list[float]] = {count: [] for count in COUNTS}
        self.fill(context)
        for _ in range(repeats + 1):
            for count, times in found.items():
                self.lengths[:] = context
                start = time.thread_time()
                super().step(list(range(count)))
                times.append(time.thread_time() - start)
        least = np.maximum.accumulate([min(times[1:]) for times in found.values()])
        self.reset()
        if not hasattr(self, "passed"):
            self.passed, self.tables = [0.0], dict[int, Any]()
        self.tables[self.capacity] = np.interp(np.arange(COUNTS[-1] + 1), COUNTS, least)
        return dict(zip(COUNTS, map(float, least), strict=True))

    def sibling(self, capacity: int) -> DecodeSession:
        """Another cache, with a timetable of its own."""
        other = super().sibling(capacity)
        assert isinstance(other, Timetable)
        other.measure(capacity - COUNTS[-1], 9)
        return other

    def step(self, tokens: Any, last: int | None = None) -> Logits:
        """As of any session; prompts pass without taking time."""
        start, count = time.thread_time(), len(tokens)
        logits = super().step(tokens, last)
        planned = self.tables[self.capacity][count] if count <= COUNTS[-1] else 0.0
        self.passed[0] += planned - (time.thread_time() - start)
        return logits

    def clock(self) -> float:
        """Seconds."""
        return time.thread_time() + self.passed[0]


def compared(
    session: Timetable, tokenizer: Tokenizer, ids: list[int], speculators: Mapping[str, Speculator], tokens: int
) -> dict[str, Values]:
    """What each draft gains on one text."""
    session.reset()
    logits = session.prefill(ids)
    plain = Completion(tokenizer, ids, tokens)
    plain_seconds = _seconds(session, plain, logits, None)
    found: dict[str, Values] = {}
    for name, speculator in speculators.items():
        completion = Completion(tokenizer, ids, tokens)
        seconds = _seconds(session, completion, logits, speculator)
        found[name] = {
            "speed": plain_seconds / seconds,
            "per_round": tokens_per_round(completion.rounds),
            "first": next(iter(acceptance(completion.rounds)), None),
            "same": shared_length(plain.tokens, completion.tokens),
        }
    return found


def _seconds(session: Timetable, completion: Completion, logits: Logits, speculator: Speculator | None) -> float:
    session.rewind(len(completion.ids))
    start = session.clock()
    if speculator is None:
        list(write(session, [completion], logits[None]))
    else:
        list(write_speculatively(session, completion, logits, speculator))
    return session.clock() - start
