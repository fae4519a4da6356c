"""How tokens are drawn from logits, and the files of a folder that say where a text ends and what its tokens mean."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from kvslim.errors import ArtifactError, NotFoundError, UsageError
from kvslim.runtime.opening import Logits

Weights = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]
PENALTIES = (0.01, 100.0)  # beyond these the penalty is all that counts


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 takes the most likely token; otherwise what the logits are divided by.
        top_k: Sample from this many most likely tokens; 0 for all.
        top_p: Sample from the smallest set of most likely tokens that holds this probability, in (0, 1].
        seed: Seed of the sampling.
        repetition_penalty: What logits of tokens of the text so far are divided by, or multiplied with if negative; 1
            changes nothing. Keskar et al., "CTRL", 2019, section 4.1, and as in transformers.

    Raises:
        UsageError: An option is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < math.inf and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise UsageError(
                f"cannot sample with temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}",
                where="generate",
                fix="use temperature >= 0, top_k >= 0 and 0 < top_p <= 1",
            )
        if self.seed < 0:
            raise UsageError(f"a seed of {self.seed} is negative", where="generate", fix="use 0 or more")
        if not PENALTIES[0] <= self.repetition_penalty <= PENALTIES[1]:
            raise UsageError(
                f"a repetition penalty of {self.repetition_penalty} is out of range",
                where="generate",
                fix="use {} to {}; 1 changes nothing, 1.1 is common".format(*PENALTIES),
            )


GREEDY = Sampling()


class Sampler:
    """Draws the tokens of one text.

    The randomness of a draw depends on the seed and on the token's place in the text alone. So a text is the same
    whether or not its tokens were proposed by a draft, and a draft that draws with the same randomness proposes what
    the model draws wherever the two agree well enough. Daliri, Musco, Suresh, "Coupling without Communication and
    Drafter-Invariant Speculative Decoding", 2024, section 3.

    Args:
        sampling: How.
        tokens: Those that are there already, which a repetition penalty counts too.
    """

    def __init__(self, sampling: Sampling, tokens: Iterable[int]) -> None:
        self._sampling = sampling
        self._seen, self._drawn = set(tokens), 0

    def draw(self, logits: Logits) -> int:
        """The next token, from logits [vocab]."""
        token = self.foreseen(logits)
        self._seen.add(token)
        self._drawn += 1
        return token

    def foreseen(self, logits: Logits, ahead: Sequence[int] = ()) -> int:
        """The token that these logits [vocab] would give after `ahead`, more tokens that may be drawn next."""
        generator = np.random.default_rng((self._sampling.seed, self._drawn + len(ahead)))
        return sample(self._penalised(logits, ahead), generator, self._sampling)

    def _penalised(self, logits: Logits, ahead: Sequence[int]) -> Logits:
        penalty = self._sampling.repetition_penalty
        if penalty == 1:
            return logits
        seen, changed = [*self._seen, *ahead], logits.copy()
        changed[seen] = np.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
        return changed


def sample(logits: Logits, generator: np.random.Generator, sampling: Sampling = GREEDY) -> int:
    """Draws one token; temperature first, then top-k, then top-p over what top-k left, as in transformers.

    It draws by a race of exponential variables, which is the same as Gumbel's trick: every token has its own, so that
    the same generator gives the same token to distributions that are alike.

    Args:
        logits: float32 [vocab].
        generator: Source of randomness; untouched at temperature 0.
        sampling: Temperature, top-k and top-p.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    weights = logits.astype(np.float64)  # changed in place: with large vocabularies each copy takes a millisecond
    weights -= weights.max()
    with np.errstate(over="ignore"):  # so cold that all but the most likely are out of reach
        weights /= sampling.temperature
    np.exp(weights, out=weights)
    kept = _kept(weights, sampling)
    weights /= generator.standard_exponential(len(weights))
    return int(weights.argmax() if kept is None else kept[weights[kept].argmax()])


def _kept(weights: Weights, sampling: Sampling) -> Places | None:
    """Where the weights [vocab] are that top-k and top-p leave, in order; None for everywhere."""
    kept = _largest(weights, sampling.top_k) if 0 < sampling.top_k < len(weights) else None
    if sampling.top_p == 1:
        return kept
    left = weights if kept is None else weights[kept]
    falling = np.sort(left)[::-1]
    before = np.cumsum(falling) - falling
    found = _largest(left, int((before < sampling.top_p * falling.sum()).sum()))
    return found if kept is None else kept[found]


def _largest(weights: Weights, count: int) -> Places:
    """Where the largest so many weights are, in order; of equal ones the first."""
    least = np.partition(weights, -count)[-count]
    found = np.flatnonzero(weights >= least)
    equal = np.flatnonzero(weights[found] == least)
    return np.delete(found, equal[len(equal) - (len(found) - count) :])


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, set to neither pad nor cut.

    Raises:
        NotFoundError: There is no tokenizer.json.
        ArtifactError: It cannot be read.
    """
    path = folder / "tokenizer.json"
    text = _read(path)
    try:
        tokenizer = Tokenizer.from_str(text)
    # The library raises Exception itself.
    except Exception as error:
        raise ArtifactError(
            f"cannot read the tokenizer: {error}", where=str(path), fix="export the model again"
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def eos_ids(folder: Path) -> frozenset[int]:
    """The ids that end a text, from generation_config.json; empty if it names none.

    Raises:
        NotFoundError: There is no generation_config.json.
        ArtifactError: It cannot be read.
    """
    path = folder / "generation_config.json"
    try:
        found = json.loads(_read(path)).get("eos_token_id")
        ids = [found] if isinstance(found, int) else found or ()
        if not all(isinstance(token, int) for token in ids):
            raise TypeError(f"eos_token_id is {found!r}")
        return frozenset(ids)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"cannot read the stop tokens: {error}", where=str(path), fix="export the model again"
        ) from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise NotFoundError(
            f"cannot open {path.name}", where=str(path), fix="name a folder that `kvslim compress` wrote"
        ) from error
    except UnicodeDecodeError as error:
        raise ArtifactError(
            f"{path.name} is not UTF-8: {error}", where=str(path), fix="export the model again"
        ) from error
