"""Time to first token and time per output token of several models, interleaved in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvslim.errors import UsageError
from kvslim.runtime.session import DecodeSession

Times = npt.NDArray[np.float64]
Quartiles = tuple[float, float]


@dataclass(frozen=True)
class Latency:
    """Timings of one model, by prompt length (TTFT) or context length (TPOT) in tokens.

    Attributes:
        ttft_ms: Median time to first token, the prefill of a prompt, milliseconds.
        tpot_ms: Median time per output token at a context, milliseconds.
        ttft_quartiles_ms: First and third quartile of the former.
        tpot_quartiles_ms: First and third quartile of the latter.
        ttft_ratio: Median over pairs of neighbouring turns of this model's time over the first model's.
        tpot_ratio: The same for time per output token. Load on the machine hits both models in a turn, and each goes
            first in one of two turns, so these are steadier than a ratio of medians.
    """

    ttft_ms: dict[str, float]
    tpot_ms: dict[str, float]
    ttft_quartiles_ms: dict[str, Quartiles]
    tpot_quartiles_ms: dict[str, Quartiles]
    ttft_ratio: dict[str, float]
    tpot_ratio: dict[str, float]


def measure_latency(
    models: Mapping[str, Path],
    prompts: Sequence[int],
    contexts: Sequence[int],
    repeats: int,
    threads: int | None = None,
) -> dict[str, Latency]:
    """Times models in turns (A B B A), so that slow changes of the machine's load hit all of them.

    A context is reached with random cache content, which takes the same time as real content, and is held
    there. A prefill is long and steady, so prompts are timed a quarter as often as contexts, but thrice at least.

    Args:
        models: Graph or folder by name; the first one is the reference of the ratios.
        prompts: Prompt lengths in tokens for TTFT.
        contexts: Context lengths in tokens for TPOT.
        repeats: Timed turns per context, at least 2.
        threads: Threads of one operator; None leaves the choice to onnxruntime.

    Raises:
        UsageError: A length is not positive, or there are less than 2 repeats.
        NotFoundError, ArtifactError: A model cannot be opened.
    """
    if min(repeats - 1, *prompts, *contexts) < 1:
        raise UsageError(
            "lengths must be positive, and repeats 2 or more", where="latency", fix="use longer lengths, more repeats"
        )
    capacity = max((1, *prompts, *(context + 1 for context in contexts)))
    sessions = {name: DecodeSession(path, capacity=capacity, threads=threads) for name, path in models.items()}
    ttft = {str(length): _prefill_times(sessions, length, max(3, repeats // 4)) for length in prompts}
    tpot = {str(length): _decode_times(sessions, length, repeats) for length in contexts}
    reference = next(iter(models), "")
    return {name: _latency(name, reference, ttft, tpot) for name in models}


def _prefill_times(sessions: Mapping[str, DecodeSession], length: int, repeats: int) -> dict[str, Times]:
    generator = np.random.default_rng(0)
    prompts = {name: generator.integers(session.vocab, size=length) for name, session in sessions.items()}

    def timed(name: str) -> float:
        sessions[name].reset()
        return milliseconds(lambda: sessions[name].prefill(prompts[name]))

    return in_turns(list(sessions), timed, repeats)


def _decode_times(sessions: Mapping[str, DecodeSession], context: int, repeats: int) -> dict[str, Times]:
    for session in sessions.values():
        session.fill(context)

    def timed(name: str) -> float:
        # The step before puts the model where a decode loop has it: its weights in the processor's caches, and the
        # other model's worker threads, which spin for a while after their last step, asleep.
        _step(sessions[name], context)
        return milliseconds(lambda: _step(sessions[name], context))

    return in_turns(list(sessions), timed, repeats)


def _step(session: DecodeSession, context: int) -> None:
    session.step([0])
    session.length = context  # the content is random, so what a window has dropped is not missed


def in_turns(names: Sequence[str], timed: Callable[[str], float], repeats: int) -> dict[str, Times]:
    """Milliseconds [repeats] by name, in changing order (A B B A); the first turn warms up and is not counted.

    What runs second finds the processor's caches as the first left them, which is worth some percent.
    """
    orders = [names if turn % 2 else names[::-1] for turn in range(repeats + 1)]
    turns = [{name: timed(name) for name in order} for order in orders]
    return {name: np.array([turn[name] for turn in turns[1:]]) for name in names}


def milliseconds(action: Callable[[], object]) -> float:
    """The time that an action takes."""
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3


def _latency(
    name: str, reference: str, ttft: Mapping[str, Mapping[str, Times]], tpot: Mapping[str, Mapping[str, Times]]
) -> Latency:
    return Latency(
        ttft_ms={length: float(np.median(times[name])) for length, times in ttft.items()},
        tpot_ms={length: float(np.median(times[name])) for length, times in tpot.items()},
        ttft_quartiles_ms={length: _quartiles(times[name]) for length, times in ttft.items()},
        tpot_quartiles_ms={length: _quartiles(times[name]) for length, times in tpot.items()},
        ttft_ratio={length: _ratio(times[name], times[reference]) for length, times in ttft.items()},
        tpot_ratio={length: _ratio(times[name], times[reference]) for length, times in tpot.items()},
    )


def _ratio(times: Times, reference: Times) -> float:
    """Median ratio over neighbouring turns, one in either order."""
    return float(np.median((times[1:] + times[:-1]) / (reference[1:] + reference[:-1])))


def _quartiles(times: Times) -> Quartiles:
    first, third = np.quantile(times, [0.25, 0.75])
    return float(first), float(third)
