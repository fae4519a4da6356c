"""Texts with and without a draft, by kind of text and context."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.models import OpenModel
from benchmarks.prompts import KINDS, prompt
from benchmarks.registry import Values, benchmark
from benchmarks.render import Column, Table
from benchmarks.subjects import Source
from benchmarks.texts import LITTLE
from kvslim.export.speculative import write_speculative_graph
from kvslim.runtime.opening import Logits
from kvslim.runtime.session import DecodeSession
from kvslim.runtime.writing import Completion, write
from kvslim.speculative.loop import acceptance, tokens_per_round, write_speculatively
from kvslim.speculative.speculator import Speculator
from kvslim.types import Draft

DRAFTS: Mapping[str, Draft] = {"lookup": Draft(kind="lookup"), "window": Draft(kind="window")}
TABLE = Table(
    (Column("cache", "cache"), Column("context", "context", ","), Column("kind", "text")),
    pivot="draft",
    each=(
        Column("speed", "{}: speed", ".2f"),
        Column("per_round", "tokens a run", ".2f"),
        Column("first", "first right", ".0%"),
    ),
    format="",
)


QUICK = {"contexts": (48,), "tokens": 4, "kinds": ("chat",), "caches": ("float32",)}


@benchmark("smollm2", table=TABLE, quick=QUICK)
def speculative(
    source: Source,
    *,
    contexts: tuple[int, ...] = (128, 2048, 8000),
    kinds: tuple[str, ...] = tuple(KINDS),
    caches: tuple[str, ...] = ("float32", "int8"),
    tokens: int = 64,
    repeats: int = 2,
    weights: str = "int4",
) -> Iterator[Values]:
    """Tokens per second with a draft over those without, on five kinds of text.

    Greedy texts of one thread, written in turns in one session; the clock is the CPU time of that thread, which other
    load on the machine changes little. Speeds are medians over the repeats, of which a draft knows at the first nothing
    of the machine. `first` is how often the first proposal of a run was right.
    """
    model = OpenModel(source, LITTLE, weights=weights)
    plans = {"float32": lambda: None, "int8": lambda: model.decided({"kv_quant": {"bits": 8}})}
    graphs = {cache: model.export(plans[cache]()) for cache in caches}
    tokenizer = model.tokenizer
    model.release()
    for cache, folder in graphs.items():
        write_speculative_graph(folder)
        for context in contexts:
            session = DecodeSession(folder / "speculative.onnx", capacity=context + tokens, threads=1)
            speculators = {name: Speculator(session, draft, clock=time.thread_time) for name, draft in DRAFTS.items()}
            for kind in kinds:
                ids = prompt(kind, Path(source.validation), Path(source.calibration), ids_of(tokenizer), context)
                for name, values in compared(session, tokenizer, ids, speculators, tokens, repeats).items():
                    yield {"cache": cache, "context": context, "kind": kind, "draft": name, **values}


def ids_of(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Gives the ids of a text."""
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def compared(
    session: DecodeSession,
    tokenizer: Tokenizer,
    ids: list[int],
    speculators: Mapping[str, Speculator],
    tokens: int,
    repeats: int,
) -> dict[str, Values]:
    """What each draft gains on one text."""
    session.reset()
    logits = session.prefill(ids)
    speeds: dict[str, list[float]] = {name: [] for name in speculators}
    rounds: dict[str, list[tuple[int, int]]] = {}
    for _ in range(repeats):
        plain = _seconds(session, Completion(tokenizer, ids, tokens), logits, None)
        for name, speculator in speculators.items():
            completion = Completion(tokenizer, ids, tokens)
            speeds[name].append(plain / _seconds(session, completion, logits, speculator))
            rounds[name] = completion.rounds
    return {
        name: {
            "speed": float(np.median(speeds[name])),
            "per_round": tokens_per_round(rounds[name]),
            "first": next(iter(acceptance(rounds[name])), None),
        }
        for name in speculators
    }


def _seconds(session: DecodeSession, completion: Completion, logits: Logits, speculator: Speculator | None) -> float:
    session.rewind(len(completion.ids))
    start = time.thread_time()
    if speculator is None:
        list(write(session, [completion], logits[None]))
    else:
        speculator.begin(completion.ids)
        list(write_speculatively(session, completion, logits, speculator))
    return time.thread_time() - start
