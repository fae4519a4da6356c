"""How far an artifact is from the plain export, measured through the KV cache on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvslim.errors import UsageError
from kvslim.runtime.opening import Logits
from kvslim.runtime.session import DecodeSession

Windows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Quality:
    """A model compared with its teacher.

    Attributes:
        kl_mean: Mean of KL(teacher || student) over all positions, nats per token.
        kl_p99: Its 99th percentile.
        top1_agreement: Share of positions where both have the same most likely token.
        perplexity: exp of the student's mean negative log-likelihood of the next token.
        perplexity_se: Standard error of that over the windows; NaN for a single window.
    """

    kl_mean: float
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
        floor: The plain export against itself with another chunk size: the numerical noise of the measurement.
        artifact: The compressed export.
    """

    plain: Quality
    floor: Quality
    artifact: Quality


def measure_quality(teacher: DecodeSession, student: DecodeSession, windows: Windows, chunk: int = 16) -> Quality:
    """Compares a student with its teacher, both decoding `chunk` tokens at a time through their caches.

    Perplexity is exp(m), m the mean over windows of the mean negative log-likelihood of a window (all windows are
    equally long, so that is the mean over tokens). Tokens within a window are not independent, but windows nearly are.
    So the standard error of m is the sample deviation of the window means over sqrt(n). The delta method multiplies it
    by the derivative of exp at m, which is the perplexity itself. Logits of one window at a time are held in memory.

    Args:
        teacher: Session of the plain export.
        student: Session of the model to measure.
        windows: Token ids [n, length], length >= 2.
        chunk: Tokens of one step.

    Raises:
        UsageError: The windows have another shape or do not fit a cache, or the vocabularies differ.
    """
    _check(teacher, student, windows)
    tally = _Tally()
    for window in windows:
        tally.add(window, _logits(teacher, window, chunk), _stepwise(student, window, chunk))
    return tally.quality()


def measure_all(
    plain: DecodeSession, artifact: DecodeSession, windows: Windows, chunk: int = 16, floor_chunk: int = 1
) -> QualityReport:
    """All quality columns of a report; the plain export runs twice, the artifact once.

    The floor decodes token by token, as generation does, because onnxruntime then uses other matrix kernels. Chunks of
    two or more tokens agree to the last bit, whatever their length, and would give a floor of exactly 0.

    Args:
        plain: Session of the plain export.
        artifact: Session of the artifact.
        windows: Token ids [n, length], length >= 2.
        chunk: Tokens of one step.
        floor_chunk: Tokens of one step in the second run of the plain export.

    Raises:
        UsageError: As for `measure_quality`.
    """
    _check(plain, artifact, windows)
    itself, floor, student = _Tally(), _Tally(), _Tally()
    for window in windows:
        reference = _logits(plain, window, chunk)
        itself.add(window, reference, _pieces(reference, chunk))
        floor.add(window, reference, _stepwise(plain, window, floor_chunk))
        student.add(window, reference, _stepwise(artifact, window, chunk))
    return QualityReport(plain=itself.quality(), floor=floor.quality(), artifact=student.quality())


def log_softmax(logits: npt.NDArray[np.floating]) -> Floats:
    """Log-probabilities over the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@dataclass
class _Tally:
    """Sums over the windows for one student."""

    kl: list[Floats] = field(default_factory=list)
    agreement: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    window_nll: list[float] = field(default_factory=list)

    def add(self, window: npt.NDArray[np.int64], teacher: Logits, student: Iterator[Logits]) -> None:
        """Adds one window from the teacher's logits [length, vocab] and the student's in pieces of them."""
        nll = []
        start = 0
        for piece in student:
            stop = start + len(piece)
            reference = teacher[start:stop]
            self.agreement.append(reference.argmax(axis=-1) == piece.argmax(axis=-1))
            # The infinities of a broken model should lead to a failed gate, not to a warning here.
            with np.errstate(invalid="ignore", over="ignore"):
                student_log, teacher_log = log_softmax(piece), log_softmax(reference)
                self.kl.append((np.exp(teacher_log) * (teacher_log - student_log)).sum(axis=-1))
            following = window[start + 1 : stop + 1]
            nll.append(-student_log[np.arange(len(following)), following])
            start = stop
        self.window_nll.append(float(np.concatenate(nll).mean()))

    def quality(self) -> Quality:
        """The measures over all windows so far."""
        kl = np.concatenate(self.kl)
        nll = np.array(self.window_nll)
        with np.errstate(invalid="ignore", over="ignore"):
            perplexity = float(np.exp(nll.mean()))
            error = float(nll.std(ddof=1) / np.sqrt(len(nll))) if len(nll) > 1 else math.nan
            return Quality(
                kl_mean=float(kl.mean()),
                kl_p99=float(np.quantile(kl, 0.99)),
                top1_agreement=float(np.concatenate(self.agreement).mean()),
                perplexity=perplexity,
                perplexity_se=perplexity * error,
            )


def _stepwise(session: DecodeSession, window: npt.NDArray[np.int64], chunk: int) -> Iterator[Logits]:
    session.reset()
    for start in range(0, len(window), chunk):
        yield session.step(window[start : start + chunk])


def _logits(session: DecodeSession, window: npt.NDArray[np.int64], chunk: int) -> Logits:
    return np.concatenate(list(_stepwise(session, window, chunk)))


def _pieces(logits: Logits, chunk: int) -> Iterator[Logits]:
    return (logits[start : start + chunk] for start in range(0, len(logits), chunk))


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
