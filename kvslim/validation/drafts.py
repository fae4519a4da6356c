"""What the drafts of artifacts gain: texts written with and without them, behind several contexts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tokenizers import Tokenizer

from kvslim.calibrate.own_text import OwnText, self_windows, start_token
from kvslim.calibrate.text_source import source_text
from kvslim.contract import Frozen
from kvslim.errors import UsageError
from kvslim.export.manifest import SPECULATIVE_GRAPH
from kvslim.measures import DraftKind
from kvslim.progress import Progress, Silent
from kvslim.runtime.generate import load_tokenizer
from kvslim.runtime.session import DecodeSession
from kvslim.speculative.choice import kind_at
from kvslim.types import Draft
from kvslim.validation.latency import LONG_PROMPT
from kvslim.validation.load import LoadWatch, doubt
from kvslim.validation.speculation import MOST, TEXTS, gain, written_in_turns

OWN_LENGTH, SEED = 512, 1  # tokens of each piece that an artifact writes itself
SHORTEST = 2 * MOST  # context: as many tokens before a text as it has itself


class DraftGain(Frozen):
    """What a draft gains behind one context.

    Attributes:
        context: Tokens of the cache at the end of a text.
        kind: What proposes tokens there.
        threads: Threads of one operator; None if onnxruntime chose.
        tokens: Tokens that were written without the draft.
        plain_tokens_per_second: Without the draft, median over the texts.
        tokens_per_second: With it.
        speed_ratio: The second over the first, median over the texts.
        tokens_per_round: Tokens of a run of the graph with the draft.
        acceptance: How often the first proposal of a run was right, the second ...
        uncertain: Why the speeds say little; None where nothing speaks against them.
    """

    context: int
    kind: DraftKind
    threads: int | None
    tokens: int
    plain_tokens_per_second: float
    tokens_per_second: float
    speed_ratio: float
    tokens_per_round: float
    acceptance: tuple[float, ...]
    uncertain: str | None


def bench_drafts(
    folders: Mapping[str, Path],
    drafts: Mapping[str, Draft],
    contexts: Sequence[int],
    threads: Sequence[int | None],
    source: str,
    progress: Progress,
) -> dict[str, tuple[DraftGain, ...]]:
    """What each draft gains, by the name of its artifact: for each number of threads the contexts in order.

    A draft gains what the text lets it gain, so prompts must be text. `self` is written once for artifacts with the
    same tokenizer.

    Args:
        folders: Artifacts by name.
        drafts: Their drafts, where they have one.
        contexts: Tokens of the cache at the end of a text, `SHORTEST` or more.
        threads: Threads of one operator; None leaves the choice to onnxruntime.
        source: What prompts are taken from: `self` for what artifacts write, a .txt or .jsonl file, or
            `hub:DATASET[:SPLIT]`.
        progress: Receives the progress.

    Raises:
        UsageError: The text has fewer tokens than the longest context.
    """
    texts = _texts(folders, drafts, source, max(contexts), progress)
    found: dict[str, list[DraftGain]] = {name: [] for name in drafts}

    def measured() -> Iterator[tuple[str, DraftGain]]:
        for name, count in product(drafts, threads):
            session = DecodeSession(folders[name] / SPECULATIVE_GRAPH, capacity=max(contexts) + 1, threads=count)
            tokenizer = load_tokenizer(folders[name])
            for context in contexts:
                yield name, _measured(session, tokenizer, drafts[name], texts[name], context, count)

    points = len(drafts) * len(threads) * len(contexts)
    for name, gained in progress.track(measured(), "contexts with a draft", points):
        found[name].append(gained)
    return {name: tuple(gains) for name, gains in found.items()}


def _texts(
    folders: Mapping[str, Path], drafts: Mapping[str, Draft], source: str, longest: int, progress: Progress
) -> dict[str, Sequence[int]]:
    """The tokens that each artifact reads."""
    by_tokenizer, found = dict[str, Sequence[int]](), dict[str, Sequence[int]]()
    for name in drafts:
        folder = folders[name]
        tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
        if tokenizer not in by_tokenizer:
            text = _own(folder, longest, progress) if source == "self" else _given(folder, source, longest)
            by_tokenizer[tokenizer] = text
        found[name] = by_tokenizer[tokenizer]
    return found


def _given(folder: Path, source: str, longest: int) -> list[int]:
    """The tokens of a text."""
    tokens: list[int] = load_tokenizer(folder).encode(source_text(source)).ids
    if len(tokens) < longest:
        raise UsageError(
            f"the text has {len(tokens):,} tokens, less than a context of {longest:,}",
            where="--text",
            fix=f"give more text, or --context {len(tokens)}",
        )
    return tokens


def _own(folder: Path, longest: int, progress: Progress) -> list[int]:
    """At least so many tokens that an artifact draws from its own distribution, in pieces that stand end to end."""
    length = min(OWN_LENGTH, longest)
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    start = start_token(SimpleNamespace(**{"bos_token_id": None, "eos_token_id": None, **generation}))
    text = OwnText(max(TEXTS, -(-longest // length)), length, SEED)
    (windows,) = self_windows(folder, start, [text], progress)
    tokens: list[int] = windows.reshape(-1).tolist()
    return tokens


def _measured(
    session: DecodeSession, tokenizer: Tokenizer, draft: Draft, text: Sequence[int], context: int, threads: int | None
) -> DraftGain:
    """What a draft gains at one point."""
    watch = LoadWatch()
    prompts = prompts_before(text, context - MOST, MOST)
    pairs = list(written_in_turns(session, tokenizer, draft, prompts, MOST, Silent()))
    plain, drafted = ([written.speed for written in side] for side in zip(*pairs, strict=True))
    where = f"behind {context:,} tokens, without the draft"
    return DraftGain(
        context=context,
        kind=kind_at(draft, context),
        threads=threads,
        plain_tokens_per_second=float(np.median(plain)),
        tokens_per_second=float(np.median(drafted)),
        uncertain=doubt({where: 1000 / np.array(plain)}, watch.busy_cores()),
        **gain(pairs)._asdict(),
    )


def prompts_before(text: Sequence[int], length: int, most: int) -> list[list[int]]:
    """Prompts of so many tokens from all over a text.

    Long ones are beginnings of the same text instead, `most` tokens apart, so that it is read once.
    """
    if length > LONG_PROMPT:
        return [list(text[: length - most * place]) for place in reversed(range(TEXTS))]
    starts = np.linspace(0, len(text) - length, TEXTS).astype(int)
    return [list(text[start : start + length]) for start in starts]
