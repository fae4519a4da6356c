"""How far an artifact is from the plain export, measured through the KV cache on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvslim.errors import UsageError
from kvslim.progress import Progress, Silent
from kvslim.runtime.opening import Logits
from kvslim.runtime.session import DecodeSession
from kvslim.validation.tally import Quality, Tally, Window

Windows = Sequence[Window] | npt.NDArray[np.int64]
CHUNK = 64  # tokens of one step
TEXT = "held-out text"  # for the progress
FLOOR_WINDOWS, FLOOR_TOKENS = 4, 64  # a floor goes token by token, which takes long
PAIRS = ((0, 1),)  # teacher and student: plain export and artifact
PAIRS_TO_ORIGINAL = (*PAIRS, (2, 0), (2, 1))  # and both next to the model in float32


@dataclass(frozen=True)
class QualityReport:
    """The quality columns of a report, but for the floor.

    Attributes:
        plain: The plain export, compared with itself: KL 0, agreement 1.
        artifact: The compressed export.
        to_original: Plain export, artifact and the model in float32 itself, compared with that; None where the weights
            of the other two are not quantised.
    """

    plain: Quality
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
    (tally,) = _together(compared([teacher, student], [(0, 1)], windows, chunk=chunk))
    return tally.student()


def measure_all(
    plain: DecodeSession, artifact: DecodeSession, windows: Windows, progress: Progress | None = None
) -> QualityReport:
    """The quality columns of a report but for the floor, where weights are not quantised.

    Args:
        plain: Session of the plain export.
        artifact: Session of the artifact.
        windows: As for `measure_quality`.
        progress: Receives the progress.

    Raises:
        UsageError: As for `measure_quality`.
    """
    return summed_up(compared([plain, artifact], PAIRS, windows, progress=progress))


@dataclass(frozen=True)
class Comparison:
    """The graphs of a report, which go through held-out text side by side.

    Attributes:
        folders: The plain export and the artifact, and the model in float32 where the weights of these are quantised.
        windows: All of the text.
        within: Tokens of a text that count; the KL of what lies beyond is told apart. None if all do.
        label: What an item is, for the progress.
    """

    folders: tuple[Path, ...]
    windows: Windows
    within: int | None = None
    label: str = TEXT

    def open(self, progress: Progress, threads: int | None) -> Callable[[Windows], Iterator[list[Tally]]]:
        """What compares the graphs on windows; where weights are quantised, with activations in float32."""
        is_quantised = len(self.folders) > len(PAIRS[0])
        floats = (is_quantised, is_quantised, False)
        sessions = [
            DecodeSession(
                folder,
                capacity=max(map(len, self.windows)),
                threads=threads,
                all_positions=True,
                float_activations=float_activations,
            )
            for folder, float_activations in zip(self.folders, floats, strict=False)
        ]
        pairs = PAIRS_TO_ORIGINAL if is_quantised else PAIRS
        piece = min(map(len, self.windows))
        return lambda windows: compared(sessions, pairs, windows, piece=piece, within=self.within, progress=progress)


def summed_up(found: Iterable[Sequence[Tally]]) -> QualityReport:
    """The columns of a report, from the tallies of each window."""
    tally, *others = _together(found)
    columns = QualityReport(plain=tally.teacher(), artifact=tally.student())
    if not others:
        return columns
    of_plain, of_artifact = others
    return replace(columns, to_original=(of_plain.student(), of_artifact.student(), of_plain.teacher()))


def measure_floor(plain: DecodeSession, windows: Windows, progress: Progress | None = None) -> Quality:
    """The plain export against itself token by token: the numerical noise of the measurement.

    It decodes the beginnings of a few windows token by token, as generation does, because onnxruntime then uses other
    matrix kernels. Chunks of two or more tokens agree to the last bit, whatever their length, and would give a floor of
    exactly 0. So little text has no perplexity.

    Args:
        plain: Session of the plain export.
        windows: As for `measure_quality`.
        progress: Receives the progress.
    """
    progress = progress or Silent()
    tally = Tally(FLOOR_TOKENS)
    for window in progress.track([window[:FLOOR_TOKENS] for window in windows[:FLOOR_WINDOWS]], "numerical floor"):
        reference = np.concatenate(list(_stepwise(plain, window, CHUNK)))
        for place, logits in enumerate(_stepwise(plain, window, 1)):
            tally.add(reference[place : place + 1], logits, window[place + 1 : place + 2])
        tally.end_window()
    return replace(tally.student(), perplexity=math.nan, perplexity_se=math.nan, kl_by_position={})


def compared(
    sessions: Sequence[DecodeSession],
    pairs: Sequence[tuple[int, int]],
    windows: Windows,
    *,
    chunk: int = CHUNK,
    piece: int | None = None,
    within: int | None = None,
    progress: Progress | None = None,
) -> Iterator[list[Tally]]:
    """For each window one tally for each pair of a teacher and a student among sessions, which go side by side.

    Args:
        sessions: Of all graphs.
        pairs: Places of teacher and student.
        windows: As for `measure_quality`.
        chunk: Tokens of one step.
        piece: Tokens of a piece; None for the shortest window.
        within: Tokens of a text that count; None if all do.
        progress: Receives the progress.

    Raises:
        UsageError: As for `measure_quality`.
    """
    for teacher, student in pairs:
        _check(sessions[teacher], sessions[student], windows)
    size = piece or min(map(len, windows))
    count = sum(-(-len(window) // chunk) for window in windows)
    steps = _side_by_side(sessions, windows, chunk)
    tallies: list[Tally] = []
    for window, start, logits in (progress or Silent()).track(steps, TEXT, count):
        if start == 0:
            tallies = [Tally(size, within) for _ in pairs]
        for tally, (teacher, student) in zip(tallies, pairs, strict=True):
            tally.add(logits[teacher], logits[student], window[start + 1 : start + 1 + chunk])
        if start + chunk >= len(window):
            for tally in tallies:
                tally.end_window()
            yield tallies


def _together(found: Iterable[Sequence[Tally]]) -> Sequence[Tally]:
    """One tally for each pair over all windows."""
    whole, *others = found
    for tallies in others:
        for tally, more in zip(whole, tallies, strict=True):
            tally.extend(more)
    return whole


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
