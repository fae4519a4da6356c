"""How far an artifact is from the plain export, measured through the KV cache on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
    """The quality columns of a report.

    Attributes:
        plain: The plain export, compared with itself: KL 0, agreement 1.
        floor: The plain export against itself token by token: the numerical noise of the measurement. It is measured on
            so little text that it has no perplexity.
        artifact: The compressed export.
        to_original: Plain export, artifact and the model in float32 itself, compared with that; None where the weights
            of the other two are not quantised.
    """

    plain: Quality
    floor: Quality
    artifact: Quality
    to_original: tuple[Quality, Quality, Quality] | None = None


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
    (tally,) = _compared([teacher, student], [(0, 1)], windows, chunk, Silent())
    return tally.student()


def measure_all(
    plain: DecodeSession,
    artifact: DecodeSession,
    windows: Windows,
    original: DecodeSession | None = None,
    progress: Progress | None = None,
) -> QualityReport:
    """All quality columns of a report; each session runs once, and the plain export again for the floor.

    The floor decodes the beginnings of a few windows token by token, as generation does, because onnxruntime then uses
    other matrix kernels. Chunks of two or more tokens agree to the last bit, whatever their length, and would give a
    floor of exactly 0.

    Args:
        plain: Session of the plain export.
        artifact: Session of the artifact.
        windows: As for `measure_quality`.
        original: Session of the model in float32, where the weights of the other two are quantised.
        progress: Receives the progress.

    Raises:
        UsageError: As for `measure_quality`.
    """
    progress = progress or Silent()
    sessions = [plain, artifact, *([] if original is None else [original])]
    pairs = [(0, 1)] if original is None else [(0, 1), (2, 0), (2, 1)]
    tally, *others = _compared(sessions, pairs, windows, CHUNK, progress)
    floor = measure_floor(plain, windows, progress)
    found = QualityReport(plain=tally.teacher(), floor=floor, artifact=tally.student())
    if not others:
        return found
    of_plain, of_artifact = others
    return replace(found, to_original=(of_plain.student(), of_artifact.student(), of_plain.teacher()))


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
        rows: What was measured of the positions of the window that is not ended yet.
    """

    piece: int
    rows: list[tuple[Floats, npt.NDArray[np.bool_], Floats, Floats]] = field(default_factory=list)
    kl: list[Floats] = field(default_factory=list)
    agreement: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    losses: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    def add(self, teacher: Logits, student: Logits, following: Window) -> None:
        """Adds the logits of some positions of a window, of which at most `BLOCK` are expanded at a time."""
        for first in range(0, len(teacher), BLOCK):
            part = slice(first, first + BLOCK)
            self.rows.append(_compared_rows(teacher[part], student[part], following[part]))

    def end_window(self) -> None:
        """Sums up what was added since the last window."""
        kl, agreement, *losses = (np.concatenate(parts) for parts in zip(*self.rows, strict=True))
        self.rows.clear()
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


def measure_floor(plain: DecodeSession, windows: Windows, progress: Progress) -> Quality:
    """The plain export against itself token by token; see `measure_all`."""
    tally = _Tally(FLOOR_TOKENS)
    for window in progress.track([window[:FLOOR_TOKENS] for window in windows[:FLOOR_WINDOWS]], "numerical floor"):
        reference = np.concatenate(list(_stepwise(plain, window, CHUNK)))
        for place, logits in enumerate(_stepwise(plain, window, 1)):
            tally.add(reference[place : place + 1], logits, window[place + 1 : place + 2])
        tally.end_window()
    return replace(tally.student(), perplexity=math.nan, perplexity_se=math.nan, kl_by_position={})


def _compared(
    sessions: Sequence[DecodeSession],
    pairs: Sequence[tuple[int, int]],
    windows: Windows,
    chunk: int,
    progress: Progress,
) -> list[_Tally]:
    """One tally for each pair of a teacher and a student among sessions, which go through the text side by side."""
    for teacher, student in pairs:
        _check(sessions[teacher], sessions[student], windows)
    tallies = [_Tally(min(map(len, windows))) for _ in pairs]
    count = sum(-(-len(window) // chunk) for window in windows)
    steps = _side_by_side(sessions, windows, chunk)
    for window, start, logits in progress.track(steps, "held-out text", count):
        for tally, (teacher, student) in zip(tallies, pairs, strict=True):
            tally.add(logits[teacher], logits[student], window[start + 1 : start + 1 + chunk])
        if start + chunk >= len(window):
            for tally in tallies:
                tally.end_window()
    return tallies


def _side_by_side(
    sessions: Sequence[DecodeSession], windows: Windows, chunk: int
) -> Iterator[tuple[Window, int, Sequence[Logits]]]:
    """Each window, the place of each of its chunks, and the logits of all sessions there."""
    for window in windows:
        steps = zip(*(_stepwise(session, window, chunk) for session in sessions), strict=True)
        for start, logits in zip(range(0, len(window), chunk), steps, strict=True):
            yield window, start, logits


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
