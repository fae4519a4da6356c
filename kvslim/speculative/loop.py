"""The loop: propose, verify in one run, keep what the model draws itself, rewind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvslim.runtime.opening import Logits
from kvslim.runtime.session import DecodeSession
from kvslim.runtime.writing import Completion
from kvslim.speculative.speculator import Speculator


def write_speculatively(
    session: DecodeSession, completion: Completion, logits: Logits, speculator: Speculator
) -> Iterator[str]:
    """Writes a text to its end, several tokens in a run where proposals turn out right.

    Every token is drawn from the model's logits by the randomness of its place, and a proposal is kept where it is the
    token that was drawn. So the text is the one that `write` gives, as far as the graph computes the same for one token
    and for several.

    Args:
        session: Holds the prompt; its graph gives logits of several positions.
        completion: The text.
        logits: What follows the prompt, float32 [vocab].
        speculator: Proposes.

    Yields:
        The text that is certain after each run, which may be empty.

    Raises:
        UsageError: The cache is full.
        ArtifactError: onnxruntime fails on the graph.
    """
    speculator.begin(completion.ids)
    if completion.finish_reason is None:
        yield completion.add(logits)
        speculator.learn(completion.tokens, 0)
    length = session.length
    while completion.finish_reason is None:
        before = len(completion.tokens)
        proposals = speculator.proposals(completion, length)
        fed = [completion.tokens[-1], *proposals]
        start = speculator.clock()
        found = session.step(fed)
        speculator.ran(length, len(fed), speculator.clock() - start)
        text = taken_text(completion, found, proposals)
        taken = completion.rounds[-1][1]
        length += 1 + taken
        if proposals:
            session.rewind(length)
        speculator.learn(completion.tokens[before:], taken)
        yield text


def taken_text(completion: Completion, found: Logits, proposals: list[int]) -> str:
    """Draws tokens until one is no proposal; their text. The completion notes how many proposals were right."""
    text, taken = "", 0
    for logits, proposal in zip(found, [*proposals, None], strict=True):
        text += completion.add(logits)
        if completion.finish_reason is not None or completion.tokens[-1] != proposal:
            break
        taken += 1
    completion.rounds.append((len(proposals), taken))
    return text


def tokens_per_round(rounds: Sequence[tuple[int, int]]) -> float | None:
    """Tokens of a run of the graph in the mean; None where there was no run that could verify more than one."""
    return 1 + sum(taken for _, taken in rounds) / len(rounds) if rounds else None


def acceptance(rounds: Sequence[tuple[int, int]]) -> tuple[float, ...]:
    """How often the first, the second ... proposal of a run was right, of those runs that proposed so many."""
    most = max((proposed for proposed, _ in rounds), default=0)
    asked = [[taken for proposed, taken in rounds if proposed > place] for place in range(most)]
    return tuple(sum(taken > place for taken in found) / len(found) for place, found in enumerate(asked))
