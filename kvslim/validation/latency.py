"""Time to first token and time per output token of several models, interleaved in one process, and their energy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvslim.errors import UsageError
from kvslim.progress import Progress, Silent
from kvslim.runtime.session import DecodeSession
from kvslim.settings import LEAST_REPEATS
from kvslim.validation.energy import joules_since, microjoules
from kvslim.validation.load import LoadWatch, doubt

LONG_PROMPT = 1024  # tokens; a longer prompt takes as long as hundreds of tokens, and is timed in one pair of turns
Times = npt.NDArray[np.float64]
Quartiles = tuple[float, float]


class Cost(NamedTuple):
    """Time and energy of one run."""

    milliseconds: float
    joules: float


@dataclass(frozen=True)
class Latency:
    """Timings of one model, by prompt length (TTFT) or context length (TPOT) in tokens.

    Attributes:
        ttft_ms: Median time to first token, the prefill of a prompt, milliseconds.
        tpot_ms: Median time per output token at a context, milliseconds.
        ttft_quartiles_ms: First and third quartile of `ttft_ms`.
        tpot_quartiles_ms: First and third quartile of `tpot_ms`.
        ttft_ratio: This model's time divided by the first model's, median over pairs of neighbouring turns.
        tpot_ratio: The same for time per output token. Load on the machine affects both models of a turn, and
            each goes first in every other turn, so these vary less than a ratio of medians.
        uncertain: Why the timings of all models say little; None where nothing speaks against them.
    """

    ttft_ms: dict[str, float]
    tpot_ms: dict[str, float]
    ttft_quartiles_ms: dict[str, Quartiles]
    tpot_quartiles_ms: dict[str, Quartiles]
    ttft_ratio: dict[str, float]
    tpot_ratio: dict[str, float]
    uncertain: str | None


class Runs(NamedTuple):
    """Costs of models, by length in tokens and then by name: [repeats, 2], milliseconds and joules.

    Attributes:
        ttft: Of prompts.
        tpot: Of tokens.
        busy_cores: Cores that other programs used meanwhile.
    """

    ttft: dict[int, dict[str, Times]]
    tpot: dict[int, dict[str, Times]]
    busy_cores: float

    @property
    def uncertain(self) -> str | None:
        """Why these timings say little; None where nothing speaks against them."""
        kinds = (("for a prompt of", self.ttft), ("at a context of", self.tpot))
        times = {
            f"{where} {length:,}, {name}": costs[:, 0]
            for where, table in kinds
            for length, models in table.items()
            for name, costs in models.items()
        }
        return doubt(times, self.busy_cores)


def measure_latency(
    models: Mapping[str, Path],
    prompts: Sequence[int],
    contexts: Sequence[int],
    repeats: int,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Latency]:
    """Times models in turns. Arguments and errors as for `time_models`; ratios are relative to the first model."""
    runs = time_models(models, prompts, contexts, repeats, threads, progress=progress)
    return {name: _latency(name, next(iter(models)), runs) for name in models}


def time_models(
    models: Mapping[str, Path],
    prompts: Sequence[int],
    contexts: Sequence[int],
    repeats: int,
    threads: int | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Runs:
    """Times models in turns (A B B A), so that slow changes of the machine's load affect all of them.

    The cache is filled with random content, which takes the same time as real content, and is kept at the same context.
    A prefill is long, so prompts are timed half as often as contexts, and at least three times; those of more than
    1,024 tokens twice, each model first once, without a turn to warm up. Two turns still tell how far they differ.

    Args:
        models: Graph or folder by name.
        prompts: Prompt lengths in tokens for TTFT.
        contexts: Context lengths in tokens for TPOT.
        repeats: Timed turns per context, at least 3.
        threads: Threads of one operator; None leaves the choice to onnxruntime.
        batch: Sequences per batch; one step gives one token for each.
        progress: Receives the progress.

    Raises:
        UsageError: A length is not positive, there are too few repeats, or a model decodes only one sequence.
        NotFoundError, ArtifactError: A model cannot be opened.
    """
    if min(1, *prompts, *contexts) < 1 or repeats < LEAST_REPEATS:
        message = f"lengths must be positive, and repeats at least {LEAST_REPEATS}"
        raise UsageError(message, where="latency", fix="use larger values")
    capacity = max((1, *prompts, *(context + 1 for context in contexts)))
    sessions = {
        name: DecodeSession(path, capacity=capacity, threads=threads, batch=batch) for name, path in models.items()
    }
    track, watch = (progress or Silent()).track, LoadWatch()
    prefills = max(LEAST_REPEATS, repeats // 2)
    tokens = [length * sum(_prefill_turns(length, prefills)) for length in prompts]
    ttft = {
        length: _prefill_times(sessions, length, prefills) for length in track(prompts, "prompts timed", weights=tokens)
    }
    tpot = {length: _decode_times(sessions, length, repeats) for length in track(contexts, "contexts timed")}
    return Runs(ttft, tpot, watch.busy_cores())


def _prefill_times(sessions: Mapping[str, DecodeSession], length: int, repeats: int) -> dict[str, Times]:
    generator = np.random.default_rng(0)
    prompts = {name: generator.integers(session.vocab, size=length) for name, session in sessions.items()}

    def timed(name: str) -> Cost:
        sessions[name].reset()
        return cost(lambda: sessions[name].prefill(prompts[name]))

    turns, warms_up = _prefill_turns(length, repeats)
    return in_turns(list(sessions), timed, turns, warms_up=warms_up)


def _prefill_turns(length: int, repeats: int) -> tuple[int, bool]:
    """How often a prompt is timed, and whether a turn before that warms up."""
    return (2, False) if length > LONG_PROMPT else (repeats, True)


def _decode_times(sessions: Mapping[str, DecodeSession], context: int, repeats: int) -> dict[str, Times]:
    for session in sessions.values():
        session.fill(context)

    def timed(name: str) -> Cost:
        # The untimed step first brings the weights into the processor's caches, where a decode loop has them.
        _step(sessions[name], context)
        return cost(lambda: _step(sessions[name], context))

    return in_turns(list(sessions), timed, repeats)


def _step(session: DecodeSession, context: int) -> None:
    session.step([0])
    session.lengths[:] = context  # the content is random anyway, so it does not matter what a window has dropped


def in_turns(
    names: Sequence[str], timed: Callable[[str], float | Cost], repeats: int, *, warms_up: bool = True
) -> dict[str, Times]:
    """Milliseconds [repeats] or costs [repeats, 2] by name, in changing order (A B B A).

    Another turn before them warms up and is not counted. The order alternates because the second model of a turn finds
    the processor's caches as the first left them, which makes a difference of a few percent.
    """
    orders = [names if turn % 2 else names[::-1] for turn in range(repeats + warms_up)]
    turns = [{name: timed(name) for name in order} for order in orders]
    return {name: np.array([turn[name] for turn in turns[-repeats:]]) for name in names}


def cost(action: Callable[[], object]) -> Cost:
    """Time and energy of an action; joules are nan if the machine does not report them."""
    before = microjoules()
    start = time.perf_counter()
    action()
    milliseconds = (time.perf_counter() - start) * 1e3
    return Cost(milliseconds, joules_since(before))


def joules_per_token(costs: Times, tokens: int) -> float | None:
    """Mean energy of runs of so many tokens; None if the machine does not report it.

    The counter is updated about once per millisecond, so a single run is inaccurate. The mean averages
    that out; a median would not.
    """
    joules = float(costs[:, 1].mean()) / tokens
    return joules if np.isfinite(joules) else None


def ratio(times: Times, reference: Times) -> float:
    """Median ratio over pairs of neighbouring turns, one in each order."""
    return float(np.median((times[1:] + times[:-1]) / (reference[1:] + reference[:-1])))


def quartiles(times: Times) -> Quartiles:
    """The first and the third quartile."""
    first, third = np.quantile(times, [0.25, 0.75])
    return float(first), float(third)


def _latency(name: str, reference: str, runs: Runs) -> Latency:
    ttft, tpot = (
        {str(length): (costs[name][:, 0], costs[reference][:, 0]) for length, costs in table.items()}
        for table in (runs.ttft, runs.tpot)
    )
    return Latency(
        ttft_ms={length: float(np.median(times)) for length, (times, _) in ttft.items()},
        tpot_ms={length: float(np.median(times)) for length, (times, _) in tpot.items()},
        ttft_quartiles_ms={length: quartiles(times) for length, (times, _) in ttft.items()},
        tpot_quartiles_ms={length: quartiles(times) for length, (times, _) in tpot.items()},
        ttft_ratio={length: ratio(*pair) for length, pair in ttft.items()},
        tpot_ratio={length: ratio(*pair) for length, pair in tpot.items()},
        uncertain=runs.uncertain,
    )
