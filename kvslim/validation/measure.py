"""Measures everything in a report against the plain export: quality, recall, latency, bytes, memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvslim.export.manifest import GRAPH, WEIGHTS
from kvslim.progress import Progress
from kvslim.recipe import Gates, Validation
from kvslim.runtime.session import DecodeSession
from kvslim.types import Measures, Report
from kvslim.validation.gates import report
from kvslim.validation.latency import Latency, measure_latency
from kvslim.validation.quality import measure_all
from kvslim.validation.recall import RecallItem, capacity_for, compare_recall
from kvslim.validation.rss import peak_rss


class DecoderEvaluation(NamedTuple):
    """Held-out material of a decoder, and how artifacts are measured on it.

    Attributes:
        windows: Token ids of short texts, and where the target context is long, of one long text behind them.
        items: Recall questions.
        settings: What is timed.
        gates: Limits.
        context: Tokens of the cache that bytes per token are counted in.
        timed_contexts: Contexts that a token is timed at.
        progress: Receives the progress.
    """

    windows: Sequence[np.ndarray]
    items: Sequence[RecallItem]
    settings: Validation
    gates: Gates
    context: int
    timed_contexts: Sequence[int]
    progress: Progress

    def measure(self, plain: Path, artifact: Path) -> Report:
        """The report of an artifact next to the plain export of its model, gates judged.

        Args:
            plain: Folder of the plain export.
            artifact: Folder of the artifact.
        """
        return _measure(plain, artifact, self)


def _measure(plain: Path, artifact: Path, evaluation: DecoderEvaluation) -> Report:
    windows, items, settings, gates, context, timed, progress = evaluation
    longest = max([*map(len, windows), capacity_for(items)])
    sessions = {
        name: DecodeSession(path, capacity=longest, all_positions=True)
        for name, path in (("plain", plain), ("slim", artifact))
    }
    quality = measure_all(sessions["plain"], sessions["slim"], windows, progress)
    progress.stage("validate: recall")
    recall = compare_recall(sessions["plain"], sessions["slim"], items, gates.max_recall_drop, progress)
    by_distance = [{str(reach): shares[side] for reach, shares in recall.by_reach.items()} for side in (0, 1)]
    found = {
        name: {
            "recall": share,
            "recall_questions": recall.questions,
            "recall_drop_se": error,
            "recall_by_distance": by_distance[side],
        }
        for side, (name, share, error) in enumerate(
            (("plain", recall.teacher, 0.0), ("slim", recall.student, recall.drop_se))
        )
    }
    sizes = {name: session.layout.bytes_per_token(context) for name, session in sessions.items()}
    del sessions
    progress.stage("validate: time and memory")
    latency = measure_latency(
        {"plain": plain, "slim": artifact}, settings.prompts, timed, settings.repeats, progress=progress
    )
    measures = {
        name: _costs(path, latency[name], timed).model_copy(
            update={**column.as_measures(), **found[name], "kv_bytes_per_token": sizes[name]}
        )
        for name, path, column in (("plain", plain, quality.plain), ("slim", artifact, quality.artifact))
    }
    floor = Measures.model_validate(quality.floor.as_measures())
    return report(gates, plain=measures["plain"], floor=floor, artifact=measures["slim"])


def file_mib(folder: Path) -> float:
    """Size of a graph and its weights."""
    return sum((folder / name).stat().st_size for name in (GRAPH, WEIGHTS) if (folder / name).is_file()) / 2**20


def _costs(folder: Path, latency: Latency, contexts: Sequence[int]) -> Measures:
    return Measures(
        file_mib=file_mib(folder),
        ttft_ms=latency.ttft_ms,
        tpot_ms=latency.tpot_ms,
        peak_rss_mib=peak_rss(folder, max(contexts)),
    )
