"""What the logits of a model and of its teacher add up to: KL, agreement, perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvslim.runtime.opening import Logits

Window = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
BLOCK = 2**19  # logits whose probabilities are in memory at once, in float64; they fit a processor's cache
FIRST_BOUND = 512  # tokens; KL is also told from here to twice as many, and so on


@dataclass(frozen=True)
class Quality:
    """A model compared with its teacher.

    Attributes:
        kl_mean: Mean of KL(teacher || student) over all positions, nats per token.
        kl_se: Standard error of that over the pieces of text; NaN for a single one.
        kl_p99: Its 99th percentile.
        top1_agreement: Share of positions where both have the same most likely token.
        perplexity: exp of the student's mean negative log-likelihood of the next token.
        perplexity_se: Standard error of that over the pieces of text; NaN for a single one.
        kl_by_position: Mean KL from the bound before (or the start) up to each bound in tokens; empty for short texts.
        kl_beyond: Mean KL of what lies beyond the tokens that all other numbers are of; None where nothing does.
    """

    kl_mean: float
    kl_se: float
    kl_p99: float
    top1_agreement: float
    perplexity: float
    perplexity_se: float
    kl_by_position: dict[int, float]
    kl_beyond: float | None = None

    def as_measures(self) -> dict[str, float | dict[str, float] | None]:
        """The fields of `types.Measures`; a number that is not finite becomes None."""
        numbers = {name: value for name, value in vars(self).items() if name != "kl_by_position"}
        found = {str(bound): value for bound, value in self.kl_by_position.items() if math.isfinite(value)}
        return {
            **{name: value if value is not None and math.isfinite(value) else None for name, value in numbers.items()},
            "kl_by_position": found or None,
        }


def log_softmax(logits: npt.NDArray[np.floating]) -> Floats:
    """Log-probabilities over the last axis, in float64."""
    rows = _Rows.of(logits)
    return rows.shifted - np.log(rows.total)[..., None]


class _Piece(NamedTuple):
    """The mean of some numbers, one for each token, and their count."""

    mean: float
    tokens: int


class _Rows(NamedTuple):
    """Logits in float64, shifted so that the largest is 0, their exponentials, and the sums of these."""

    shifted: Floats
    powers: Floats
    total: Floats

    @classmethod
    def of(cls, logits: npt.NDArray[np.floating]) -> _Rows:
        shifted = logits.astype(np.float64)
        shifted -= shifted.max(axis=-1, keepdims=True)
        powers = np.exp(shifted)
        return cls(shifted, powers, powers.sum(axis=-1))

    def losses(self, following: npt.NDArray[np.int64]) -> Floats:
        """Negative log-likelihood of the tokens that follow the first rows."""
        count = len(following)
        losses: Floats = np.log(self.total[:count]) - self.shifted[np.arange(count), following]
        return losses

    def kl(self, student: _Rows) -> Floats:
        """KL(self || student) of each row."""
        difference = self.shifted - student.shifted
        mean: Floats = np.einsum("nv,nv->n", self.powers, difference) / self.total
        return mean - np.log(self.total) + np.log(student.total)


@dataclass
class Tally:
    """What was measured of teacher and student: KL by window, all else by piece of text.

    Attributes:
        piece: Tokens of a piece.
        within: Tokens of a text that count; what lies beyond has a mean of its own. None if all do.
        rows: What was measured of the positions of the window that is not ended yet.
        kl: Of each window that is ended, of its positions that count.
        beyond: The same of those that lie beyond.
        agreement: Of each window, where both have the same most likely token.
        losses: Pieces of the teacher's negative log-likelihoods and of the student's.
    """

    piece: int
    within: int | None = None
    rows: list[tuple[Floats, npt.NDArray[np.bool_], Floats, Floats]] = field(default_factory=list)
    kl: list[Floats] = field(default_factory=list)
    beyond: list[Floats] = field(default_factory=list)
    agreement: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    losses: tuple[list[_Piece], list[_Piece]] = field(default_factory=lambda: ([], []))

    def add(self, teacher: Logits, student: Logits, following: Window) -> None:
        """Adds the logits of some positions of a window, of which about `BLOCK` are expanded at a time."""
        rows = max(1, BLOCK // teacher.shape[1])
        for first in range(0, len(teacher), rows):
            part = slice(first, first + rows)
            self.rows.append(_compared_rows(teacher[part], student[part], following[part]))

    def end_window(self) -> None:
        """Sums up what was added since the last window."""
        kl, agreement, *losses = (np.concatenate(parts) for parts in zip(*self.rows, strict=True))
        self.rows.clear()
        self.kl.append(kl[: self.within])
        self.beyond.append(kl[len(self.kl[-1]) :])
        self.agreement.append(agreement[: self.within])
        for pieces, values in zip(self.losses, losses, strict=True):
            pieces += _pieces(values[: self.within], self.piece)

    def extend(self, other: Tally) -> None:
        """Adds the windows of another tally behind those so far."""
        self.kl += other.kl
        self.beyond += other.beyond
        self.agreement += other.agreement
        for pieces, more in zip(self.losses, other.losses, strict=True):
            pieces += more

    def student(self) -> Quality:
        """The student's measures over all windows so far."""
        kl = np.concatenate(self.kl)
        with np.errstate(invalid="ignore", over="ignore"):
            mean, error = _mean_and_error([each for values in self.kl for each in _pieces(values, self.piece)])
            tail, agreement = float(np.quantile(kl, 0.99)), float(np.concatenate(self.agreement).mean())
            by_position = {bound: float(np.concatenate(parts).mean()) for bound, parts in self._by_position().items()}
            beyond = float(further.mean()) if (further := np.concatenate(self.beyond)).size else None
        return Quality(mean, error, tail, agreement, *_perplexity(self.losses[1]), by_position, beyond)

    def teacher(self) -> Quality:
        """The teacher's: it agrees with itself."""
        by_position = dict.fromkeys(self._by_position(), 0.0)
        beyond = 0.0 if any(map(len, self.beyond)) else None
        return Quality(0.0, 0.0, 0.0, 1.0, *_perplexity(self.losses[0]), by_position, beyond)

    def _by_position(self) -> dict[int, list[Floats]]:
        """KL of the positions up to each bound; none where no window is longer than the first."""
        longest = max(map(len, self.kl))
        found: dict[int, list[Floats]] = {}
        start, bound = 0, FIRST_BOUND
        while start < longest and longest > FIRST_BOUND:
            found[min(bound, longest)] = [values[start:bound] for values in self.kl]
            start, bound = bound, 2 * bound
        return found


def _pieces(values: Floats, piece: int) -> list[_Piece]:
    """The pieces of a text. Its last one may be short: the last position has no next token, and a text may end."""
    parts = (values[start : start + piece] for start in range(0, len(values), piece))
    return [_Piece(float(part.mean()), len(part)) for part in parts]


def _compared_rows(
    teacher: Logits, student: Logits, following: npt.NDArray[np.int64]
) -> tuple[Floats, npt.NDArray[np.bool_], Floats, Floats]:
    """KL, agreement and both losses of some positions; the infinities of a broken model shall fail a gate later."""
    agreement = teacher.argmax(axis=-1) == student.argmax(axis=-1)
    with np.errstate(invalid="ignore", over="ignore"):
        reference, rows = _Rows.of(teacher), _Rows.of(student)
        return reference.kl(rows), agreement, reference.losses(following), rows.losses(following)


def _perplexity(losses: list[_Piece]) -> tuple[float, float]:
    """exp of the mean over all tokens, and its standard error."""
    with np.errstate(invalid="ignore", over="ignore"):
        mean, error = _mean_and_error(losses)
        perplexity = float(np.exp(mean))
        return perplexity, perplexity * error


def _mean_and_error(pieces: list[_Piece]) -> tuple[float, float]:
    """The mean over all tokens, and its standard error by the pieces, NaN for one piece."""
    means, tokens = np.array(pieces).T
    mean = float(np.average(means, weights=tokens))
    if len(pieces) == 1:
        return mean, math.nan
    spread = np.square(tokens * (means - mean)).sum() * len(pieces) / (len(pieces) - 1)
    return mean, float(np.sqrt(spread) / tokens.sum())
