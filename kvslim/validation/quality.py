"""How far an artifact is from the plain export, measured through the KV cache on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvslim.errors import UsageError
from kvslim.progress import Progress, Silent
from kvslim.runtime.opening import Logits
from kvslim.runtime.session import DecodeSession

Windows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
CHUNK = 64  # tokens of one step
BLOCK = 16  # positions whose probabilities are in memory at once, in float64
FLOOR_WINDOWS, FLOOR_TOKENS = 4, 64  # a floor goes token by token, which takes long


@dataclass(frozen=True)
class Quality:
    """A model compared with its teacher.

    Attributes:
        kl_mean: Mean of KL(teacher || student) over all positions, nats per token.
        kl_se: Standard error of that over the windows; NaN for a single window.
        kl_p99: Its 99th percentile.
        top1_agreement: Share of positions where both have the same most likely token.
        perplexity: exp of the student's mean negative log-likelihood of the next token.
        perplexity_se: Standard error of that over the windows; NaN for a single window.
    """

    kl_mean: float
    kl_se: float
    kl_p99: float
    top1_agreement: float
    perplexity: float
    perplexity_se: float

    def as_measures(self) -> dict[str, float | None]:
        """The fields of `types.Measures`; a number that is not finite becomes None."""
        return {name: value if math.isfinite(value) else None for name, value in vars(self).items()}


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

    Perplexity is exp(m), m the mean over windows of the mean negative log-likelihood of a window (all windows are
    equally long, so that is the mean over tokens). Tokens within a window are not independent, but windows nearly are.
    So the standard error of m is the sample deviation of the window means over sqrt(n). The delta method multiplies it
    by the derivative of exp at m, which is the perplexity itself.

    Args:
        teacher: Session of the plain export.
        student: Session of the model to measure.
        windows: Token ids [n, length], length >= 2.
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
        windows: Token ids [n, length], length >= 2.
        progress: Receives the progress.

    Raises:
        UsageError: As for `measure_quality`.
    """
    progress = progress or Silent()
    tally = _compared(plain, artifact, windows, CHUNK, progress)
    floor = _floor(plain, windows[:FLOOR_WINDOWS, :FLOOR_TOKENS], progress)
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
    """What was measured of teacher and student, one array per window."""

    kl: list[Floats] = field(default_factory=list)
    agreement: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    losses: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    def add(self, window: npt.NDArray[np.int64], teacher: Iterable[Logits], student: Iterable[Logits]) -> None:
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
            means.append(float(values.mean()))

    def student(self) -> Quality:
        """The student's measures over all windows so far."""
        kl = np.concatenate(self.kl)
        with np.errstate(invalid="ignore", over="ignore"):
            mean, error = _mean_and_error([float(values.mean()) for values in self.kl])
            tail, agreement = float(np.quantile(kl, 0.99)), float(np.concatenate(self.agreement).mean())
            return Quality(mean, error, tail, agreement, *_perplexity(self.losses[1]))

    def teacher(self) -> Quality:
        """The teacher's: it agrees with itself."""
        return Quality(0.0, 0.0, 0.0, 1.0, *_perplexity(self.losses[0]))


def _compared_rows(
    teacher: Logits, student: Logits, following: npt.NDArray[np.int64]
) -> tuple[Floats, npt.NDArray[np.bool_], Floats, Floats]:
    """KL, agreement and both losses of some positions; the infinities of a broken model shall fail a gate later."""
    agreement = teacher.argmax(axis=-1) == student.argmax(axis=-1)
    with np.errstate(invalid="ignore", over="ignore"):
        reference, rows = _Rows.of(teacher), _Rows.of(student)
        return reference.kl(rows), agreement, reference.losses(following), rows.losses(following)


def _perplexity(losses: list[float]) -> tuple[float, float]:
    """exp of the mean of window means, and its standard error."""
    with np.errstate(invalid="ignore", over="ignore"):
        mean, error = _mean_and_error(losses)
        perplexity = float(np.exp(mean))
        return perplexity, perplexity * error


def _mean_and_error(means: list[float]) -> tuple[float, float]:
    """The mean over windows and its standard error, NaN for one window."""
    values = np.array(means)
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(values.mean()), error


def _compared(
    teacher: DecodeSession, student: DecodeSession, windows: Windows, chunk: int, progress: Progress
) -> _Tally:
    _check(teacher, student, windows)
    tally = _Tally()
    for window in progress.track(windows, "held-out windows"):
        tally.add(window, _stepwise(teacher, window, chunk), _stepwise(student, window, chunk))
    return tally


def _floor(plain: DecodeSession, windows: Windows, progress: Progress) -> Quality:
    tally = _Tally()
    for window in progress.track(windows, "numerical floor"):
        reference = np.concatenate(list(_stepwise(plain, window, CHUNK)))
        tally.add(window, (row[None] for row in reference), _stepwise(plain, window, 1))
    return replace(tally.student(), perplexity=math.nan, perplexity_se=math.nan)


def _stepwise(session: DecodeSession, window: npt.NDArray[np.int64], chunk: int) -> Iterator[Logits]:
    session.reset()
    for start in range(0, len(window), chunk):
        yield session.step(window[start : start + chunk])


def _check(teacher: DecodeSession, student: DecodeSession, windows: Windows) -> None:
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise UsageError(
            f"cannot measure on windows of shape {windows.shape}",
            where="validation",
            fix="pass [n, length >= 2] tokens",
        )
    if teacher.vocab != student.vocab:
        raise UsageError(
            f"vocabularies of {teacher.vocab} and {student.vocab} tokens cannot be compared",
            where="validation",
            fix="compare an artifact with the model it was made from",
        )
