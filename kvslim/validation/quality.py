"""How far an artifact is from the plain export, measured through the KV cache on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvslim.errors import UsageError
from kvslim.progress import Progress, Silent
from kvslim.runtime.opening import Logits
from kvslim.runtime.session import DecodeSession

Window = npt.NDArray[np.int64]
Windows = Sequence[Window] | npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
CHUNK = 64  # tokens of one step
BLOCK = 16  # positions whose probabilities are in memory at once, in float64
FLOOR_WINDOWS, FLOOR_TOKENS = 4, 64  # a floor goes token by token, which takes long
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
    """

    kl_mean: float
    kl_se: float
    kl_p99: float
    top1_agreement: float
    perplexity: float
    perplexity_se: float
    kl_by_position: dict[int, float]

    def as_measures(self) -> dict[str, float | dict[str, float] | None]:
        """The fields of `types.Measures`; a number that is not finite becomes None."""
        numbers = {name: value for name, value in vars(self).items() if name != "kl_by_position"}
        found = {str(bound): value for bound, value in self.kl_by_position.items() if math.isfinite(value)}
        return {
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
            "kl_by_position": found or None,
        }


@dataclass(frozen=True)
class QualityReport:
    """The three quality columns of a report.

    Attributes:
        plain: The plain export, compared with itself: KL 0, agreement 1.
        floor: The plain export against itself token by token: the numerical noise of the measurement. It is measured on
            so little text that it has no perplexity.
        artifact: The compressed export.
    """

    plain: Quality
    floor: Quality
    artifact: Quality


def measure_quality(teacher: DecodeSession, student: DecodeSession, windows: Windows, chunk: int = CHUNK) -> Quality:
    """Compares a student with its teacher, both decoding `chunk` tokens at a time through their caches.

    Perplexity is exp(m), m the mean over pieces of text of the mean negative log-likelihood of a piece. A piece is a
    window, or a part of a longer one as long as the shortest. Tokens within a piece are not independent, but pieces
    nearly are. So the standard error of m is the sample deviation of their means over sqrt(n). The delta method
    multiplies it by the derivative of exp at m, which is the perplexity itself.

    Args:
        teacher: Session of the plain export.
        student: Session of the model to measure.
        windows: Token ids of at least one text, each of two or more; a long one is a multiple of the shortest.
        chunk: Tokens of one step.

    Raises:
        UsageError: The windows have another shape or do not fit a cache, or the vocabularies differ.
    """
    return _compared(teacher, student, windows, chunk, Silent()).student()


def measure_all(
    plain: DecodeSession, artifact: DecodeSession, windows: Windows, progress: Progress | None = None
) -> QualityReport:
    """All quality columns of a report; plain export and artifact run once, and the plain export again for the floor.

    The floor decodes the beginnings of a few windows token by token, as generation does, because onnxruntime then uses
    other matrix kernels. Chunks of two or more tokens agree to the last bit, whatever their length, and would give a
    floor of exactly 0.

    Args:
        plain: Session of the plain export.
        artifact: Session of the artifact.
        windows: As for `measure_quality`.
        progress: Receives the progress.

    Raises:
        UsageError: As for `measure_quality`.
    """
    progress = progress or Silent()
    tally = _compared(plain, artifact, windows, CHUNK, progress)
    floor = _floor(plain, [window[:FLOOR_TOKENS] for window in windows[:FLOOR_WINDOWS]], progress)
    return QualityReport(plain=tally.teacher(), floor=floor, artifact=tally.student())


def log_softmax(logits: npt.NDArray[np.floating]) -> Floats:
    """Log-probabilities over the last axis, in float64."""
    rows = _Rows.of(logits)
    return rows.shifted - np.log(rows.total)[..., None]


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
class _Tally:
    """What was measured of teacher and student: KL by window, all else by piece of text.

    Attributes:
        piece: Tokens of a piece.
    """

    piece: int
    kl: list[Floats] = field(default_factory=list)
    agreement: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    losses: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    def add(self, window: Window, teacher: Iterable[Logits], student: Iterable[Logits]) -> None:
        """Adds one window from the logits of both in equal pieces, at most `BLOCK` positions of which are expanded."""
        found: list[tuple[Floats, npt.NDArray[np.bool_], Floats, Floats]] = []
        start = 0
        for pair in zip(teacher, student, strict=True):
            for first in range(0, len(pair[0]), BLOCK):
                reference, logits = (piece[first : first + BLOCK] for piece in pair)
                found.append(_compared_rows(reference, logits, window[start + 1 : start + 1 + len(logits)]))
                start += len(logits)
        kl, agreement, *losses = (np.concatenate(parts) for parts in zip(*found, strict=True))
        self.kl.append(kl)
        self.agreement.append(agreement)
        for means, values in zip(self.losses, losses, strict=True):
            means += _means(values, self.piece)

    def student(self) -> Quality:
        """The student's measures over all windows so far."""
        kl = np.concatenate(self.kl)
        with np.errstate(invalid="ignore", over="ignore"):
            mean, error = _mean_and_error([mean for values in self.kl for mean in _means(values, self.piece)])
            tail, agreement = float(np.quantile(kl, 0.99)), float(np.concatenate(self.agreement).mean())
            by_position = {bound: float(np.concatenate(parts).mean()) for bound, parts in self._by_position().items()}
        return Quality(mean, error, tail, agreement, *_perplexity(self.losses[1]), by_position)

    def teacher(self) -> Quality:
        """The teacher's: it agrees with itself."""
        return Quality(0.0, 0.0, 0.0, 1.0, *_perplexity(self.losses[0]), dict.fromkeys(self._by_position(), 0.0))

    def _by_position(self) -> dict[int, list[Floats]]:
        """KL of the positions up to each bound; none where no window is longer than the first."""
        longest = max(map(len, self.kl))
        found: dict[int, list[Floats]] = {}
        start, bound = 0, FIRST_BOUND
        while start < longest and longest > FIRST_BOUND:
            found[min(bound, longest)] = [values[start:bound] for values in self.kl]
            start, bound = bound, 2 * bound
        return found


def _means(values: Floats, piece: int) -> list[float]:
    """The mean of each piece; the last position of a text has no next token, so its last piece may lack one."""
    return [float(values[start : start + piece].mean()) for start in range(0, len(values), piece)]


def _compared_rows(
    teacher: Logits, student: Logits, following: npt.NDArray[np.int64]
) -> tuple[Floats, npt.NDArray[np.bool_], Floats, Floats]:
    """KL, agreement and both losses of some positions; the infinities of a broken model shall fail a gate later."""
    agreement = teacher.argmax(axis=-1) == student.argmax(axis=-1)
    with np.errstate(invalid="ignore", over="ignore"):
        reference, rows = _Rows.of(teacher), _Rows.of(student)
        return reference.kl(rows), agreement, reference.losses(following), rows.losses(following)


def _perplexity(losses: list[float]) -> tuple[float, float]:
    """exp of the mean of the pieces' means, and its standard error."""
    with np.errstate(invalid="ignore", over="ignore"):
        mean, error = _mean_and_error(losses)
        perplexity = float(np.exp(mean))
        return perplexity, perplexity * error


def _mean_and_error(means: list[float]) -> tuple[float, float]:
    """The mean over pieces and its standard error, NaN for one piece."""
    values = np.array(means)
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(values.mean()), error


def _compared(
    teacher: DecodeSession, student: DecodeSession, windows: Windows, chunk: int, progress: Progress
) -> _Tally:
    _check(teacher, student, windows)
    tally = _Tally(min(map(len, windows)))
    for window in progress.track(windows, "held-out windows"):
        tally.add(window, _stepwise(teacher, window, chunk), _stepwise(student, window, chunk))
    return tally


def _floor(plain: DecodeSession, windows: Windows, progress: Progress) -> Quality:
    tally = _Tally(FLOOR_TOKENS)
    for window in progress.track(windows, "numerical floor"):
        reference = np.concatenate(list(_stepwise(plain, window, CHUNK)))
        tally.add(window, (row[None] for row in reference), _stepwise(plain, window, 1))
    return replace(tally.student(), perplexity=math.nan, perplexity_se=math.nan, kl_by_position={})


def _stepwise(session: DecodeSession, window: Window, chunk: int) -> Iterator[Logits]:
    session.reset()
    for start in range(0, len(window), chunk):
        yield session.step(window[start : start + chunk])


def _check(teacher: DecodeSession, student: DecodeSession, windows: Windows) -> None:
    if not len(windows) or any(window.ndim != 1 or len(window) < 2 for window in windows):
        raise UsageError(
            f"cannot measure on windows of shapes {[window.shape for window in windows]}",
            where="validation",
            fix="pass texts of two tokens or more",
        )
    if teacher.vocab != student.vocab:
        raise UsageError(
            f"vocabularies of {teacher.vocab} and {student.vocab} tokens cannot be compared",
            where="validation",
            fix="compare an artifact with the model it was made from",
        )
