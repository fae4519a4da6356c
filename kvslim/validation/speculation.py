"""Whether texts that a draft helps to write are the model's own, and how much faster they are."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from kvslim.export.manifest import SPECULATIVE_GRAPH
from kvslim.measures import Speculation
from kvslim.prefix import shared_length
from kvslim.progress import Progress
from kvslim.runtime.generate import load_tokenizer
from kvslim.runtime.opening import Logits
from kvslim.runtime.session import DecodeSession
from kvslim.runtime.writing import Completion, write
from kvslim.speculative.choice import draft_of
from kvslim.speculative.estimates import FreeRuns, RunCosts
from kvslim.speculative.loop import acceptance, tokens_per_round, write_speculatively
from kvslim.speculative.speculator import Speculator
from kvslim.types import Draft, DraftChoice

TEXTS, MOST = 4, 64  # texts to write, and tokens of each at most
TIE = 1e-3  # logits as close as this may be taken in either order: sums of floats depend on how many rows they are of


class Written(NamedTuple):
    """A text, and how long it took to write."""

    completion: Completion
    seconds: float

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return len(self.completion.tokens) / self.seconds


Pair = tuple[Written, Written]  # a text without and with a draft


def measure_speculation(
    artifact: Path, choice: DraftChoice, windows: Sequence[np.ndarray], context: int, progress: Progress
) -> Speculation | None:
    """What the artifact's draft gains on held-out text; None where it has no draft.

    With quantised weights onnxruntime rounds one row and several rows in other ways. So whether texts are the model's
    is judged with activations in float32, where all is proposed that the draft has, and the speed is measured as the
    artifact runs.

    Args:
        artifact: The folder.
        choice: Which draft it has, as in a recipe.
        windows: Token ids of texts; of the longest, if it is longer than others, the last places are used.
        context: The target context in tokens; texts may be shorter.
        progress: Receives the progress.
    """
    if choice == "none":
        return None
    prompts, most = _prompts(windows, context)
    graph, capacity = artifact / SPECULATIVE_GRAPH, max(map(len, prompts)) + most
    tokenizer = load_tokenizer(artifact)
    session = DecodeSession(graph, capacity=capacity)
    draft = draft_of(choice, session.layout, context)
    assert draft is not None
    pairs = list(written_in_turns(session, tokenizer, draft, prompts, most, progress))
    del session
    exact = DecodeSession(graph, capacity=capacity, float_activations=True)
    texts = list(written_in_turns(exact, tokenizer, draft, prompts, most, progress, FreeRuns()))
    return Speculation(
        kind=draft.kind,
        context=max(map(len, prompts)),
        differing=sum(_differs(exact, plain.completion, drafted.completion) for plain, drafted in texts),
        checked=sum(proposed for _, drafted in texts for proposed, _ in drafted.completion.rounds),
        **gain(pairs)._asdict(),
    )


def _prompts(windows: Sequence[np.ndarray], context: int) -> tuple[list[list[int]], int]:
    """Tokens before the texts to write, which end near the target context, and tokens of such a text."""
    *others, longest = sorted(windows, key=len)
    room = min(context, len(longest))
    if room >= 2 * TEXTS * MOST and all(len(window) < room for window in others):
        return [longest[: room - place * MOST].tolist() for place in range(TEXTS, 0, -1)], MOST
    texts = sorted(windows, key=len, reverse=True)[:TEXTS]
    most = min(MOST, len(texts[-1]) // 2)
    return [window[: max(1, min(context, len(window)) - most)].tolist() for window in texts], most


class Gain(NamedTuple):
    """What a draft gains on some texts; the fields are those of `Speculation`."""

    tokens: int
    tokens_per_round: float
    acceptance: tuple[float, ...]
    speed_ratio: float


def gain(pairs: Sequence[Pair]) -> Gain:
    """What a draft gains on some texts."""
    rounds = [each for _, drafted in pairs for each in drafted.completion.rounds]
    return Gain(
        tokens=sum(len(plain.completion.tokens) for plain, _ in pairs),
        tokens_per_round=tokens_per_round(rounds) or 1.0,
        acceptance=acceptance(rounds),
        speed_ratio=float(np.median([drafted.speed / plain.speed for plain, drafted in pairs])),
    )


def written_in_turns(
    session: DecodeSession,
    tokenizer: Tokenizer,
    draft: Draft,
    prompts: Sequence[list[int]],
    most: int,
    progress: Progress,
    costs: RunCosts | None = None,
) -> Iterator[Pair]:
    """Each text without and with the draft, which keeps what it learns from one text to the next.

    Args:
        session: Of the graph for speculation, with room for the longest prompt and its text.
        tokenizer: The model's.
        draft: What proposes.
        prompts: Tokens before each text; those that begin like the ones before are not run again.
        most: Tokens to write of each.
        progress: Receives the progress.
        costs: Of runs; None to learn them.
    """
    speculator, held = Speculator(session, draft, costs=costs), list[int]()
    for ids in progress.track(prompts, "texts with a draft"):
        logits = session.prefill(ids[session.keep_shared(held, ids[:-1]) :])
        plain = _timed(session, Completion(tokenizer, ids, most), logits, None)
        if session.keep_shared(ids, ids) < len(ids):  # a ring has moved on
            logits = session.prefill(ids)
        yield plain, _timed(session, Completion(tokenizer, ids, most), logits, speculator)
        held = ids


def _timed(session: DecodeSession, completion: Completion, logits: Logits, speculator: Speculator | None) -> Written:
    start = time.perf_counter()
    if speculator is None:
        list(write(session, [completion], logits[None]))
    else:
        list(write_speculatively(session, completion, logits, speculator))
    return Written(completion, time.perf_counter() - start)


def _differs(session: DecodeSession, plain: Completion, drafted: Completion) -> bool:
    """Whether the first token in which two texts differ is another one, and not as likely but for rounding."""
    if plain.tokens == drafted.tokens:
        return False
    place = shared_length(plain.tokens, drafted.tokens)
    if place == min(len(plain.tokens), len(drafted.tokens)):
        return True
    session.reset()
    logits = session.prefill([*plain.ids, *plain.tokens[:place]])
    return bool(abs(logits[plain.tokens[place]] - logits[drafted.tokens[place]]) > TIE)
