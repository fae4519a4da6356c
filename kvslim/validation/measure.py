"""Measures everything in a report against the plain export: quality, recall, latency, bytes, memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvslim import stages
from kvslim.contract import MIB
from kvslim.export.manifest import GRAPH, SPECULATIVE_GRAPH, WEIGHTS
from kvslim.measures import Measures, Report
from kvslim.memory import give_back
from kvslim.progress import Progress
from kvslim.runtime.session import DecodeSession
from kvslim.settings import Gates, Validation
from kvslim.types import DraftChoice
from kvslim.validation.gates import Timed, report
from kvslim.validation.latency import Latency, measure_latency
from kvslim.validation.quality import FLOOR_WINDOWS, Comparison, measure_all, measure_floor, summed_up
from kvslim.validation.recall import Questions, RecallItem, capacity_for, compare_recall, texts_of
from kvslim.validation.rss import peak_rss
from kvslim.validation.samples import sample_answers
from kvslim.validation.speculation import measure_speculation
from kvslim.workers.base import Workers


class DecoderEvaluation(NamedTuple):
    """Held-out material of a decoder, and how artifacts are measured on it.

    Attributes:
        windows: Token ids of short texts, and where the target context is long, of one long text behind them. What
            of it lies beyond the context is measured apart.
        items: Recall questions.
        settings: What is timed.
        gates: Limits.
        context: Tokens of the cache that bytes per token are counted in.
        timed_prompts: Prompt lengths that are timed.
        timed_contexts: Contexts that a token is timed at.
        original: Folder of the graph in float32 where the weights of plain export and artifact are quantised.
        progress: Receives the progress.
        draft: Which draft the artifact has, as in a recipe.
        workers: Who compares the two on pieces of the text.
    """

    windows: Sequence[np.ndarray]
    items: Sequence[RecallItem]
    settings: Validation
    gates: Gates
    context: int
    timed_prompts: Sequence[int]
    timed_contexts: Sequence[int]
    original: Path | None
    progress: Progress
    draft: DraftChoice = "none"
    workers: Workers = Workers()

    def measure(self, plain: Path, artifact: Path) -> Report:
        """The report of an artifact next to the plain export of its model, gates judged.

        Args:
            plain: Folder of the plain export.
            artifact: Folder of the artifact.
        """
        return _measure(plain, artifact, self)


def _measure(plain: Path, artifact: Path, evaluation: DecoderEvaluation) -> Report:
    windows, items, settings, gates, context, prompts, timed, original, progress, draft, workers = evaluation
    folders = {"plain": plain, "artifact": artifact}
    quality = _quality(plain, artifact, windows, original, context, progress, workers)
    progress.stage(stages.RECALL)
    hits = workers.measure(Questions((plain, artifact), capacity_for(items)), texts_of(items), progress)
    recall = compare_recall(hits, items, gates.max_recall_drop)
    by_distance = [{str(reach): shares[side] for reach, shares in recall.by_reach.items()} for side in (0, 1)]
    found = {
        name: {
            "recall": share,
            "recall_questions": recall.questions,
            "recall_drop_se": error,
            "recall_by_distance": by_distance[side],
        }
        for side, (name, share, error) in enumerate(
            (("plain", recall.teacher, 0.0), ("artifact", recall.student, recall.drop_se))
        )
    }
    layouts = {name: DecodeSession(path, capacity=1).layout for name, path in folders.items()}
    sizes = {name: layout.bytes_per_token(context) for name, layout in layouts.items()}
    samples = sample_answers(plain, artifact, windows, progress)
    speculation = measure_speculation(artifact, draft, windows, context, progress)
    progress.stage(stages.TIME)
    latency = measure_latency(folders, prompts, timed, settings.repeats, progress=progress)
    slim = latency["artifact"]
    give_back()  # what the graphs took: memory is measured in other processes beside this one
    measures = {
        name: _costs(folders[name], latency[name], timed).model_copy(
            update={**column, **found[name], "kv_bytes_per_token": sizes[name]}
        )
        for name, column in (("plain", quality.plain), ("artifact", quality.artifact))
    }
    of_original = None if original is None else Measures(file_mib=file_mib(original), **quality.original)
    return report(
        gates,
        plain=measures["plain"],
        floor=Measures.model_validate(quality.floor),
        artifact=measures["artifact"],
        original=of_original,
        timed=Timed({"ttft_ms": slim.ttft_ratio, "tpot_ms": slim.tpot_ratio}, slim.uncertain),
        samples=samples,
        speculation=speculation,
        context=context,
    )


class _Quality(NamedTuple):
    """Fields of `Measures` for each column of a report."""

    plain: dict[str, Any]
    floor: dict[str, Any]
    artifact: dict[str, Any]
    original: dict[str, Any]


def _quality(
    plain: Path,
    artifact: Path,
    windows: Sequence[np.ndarray],
    original: Path | None,
    context: int,
    progress: Progress,
    workers: Workers,
) -> _Quality:
    """What a report tells of quality.

    onnxruntime rounds what enters a product with quantised weights. That noise does not depend on the cache, and it
    amplifies whatever differs. So where weights are quantised, everything is measured without it, and the KL once more
    with it on a few windows.
    """
    longest = max(map(len, windows))
    folders = (plain, artifact, *([] if original is None else [original]))
    found = summed_up(workers.measure(Comparison(folders, windows, context), windows, progress))
    as_it_runs = DecodeSession(plain, capacity=longest, all_positions=True)
    floor = measure_floor(as_it_runs, windows, progress).as_measures()
    plain_kept, artifact_kept = found.plain.as_measures(), found.artifact.as_measures()
    if found.to_original is None:
        return _Quality(plain_kept, floor, artifact_kept, {})
    artifact_runs = DecodeSession(artifact, capacity=longest, all_positions=True)
    as_run = measure_all(as_it_runs, artifact_runs, windows[:FLOOR_WINDOWS], progress)
    of_plain, of_artifact, itself = (column.as_measures() for column in found.to_original)
    noisy = {"kl_as_run": as_run.artifact.as_measures()["kl_mean"], "kl_to_original": of_artifact["kl_mean"]}
    return _Quality(
        {**plain_kept, "kl_to_original": of_plain["kl_mean"]},
        floor,
        {**artifact_kept, **noisy},
        {name: itself[name] for name in ("perplexity", "perplexity_se")},
    )


def file_mib(folder: Path) -> float:
    """Size of the graphs in a folder and the weights that they share."""
    files = (folder / name for name in (GRAPH, SPECULATIVE_GRAPH, WEIGHTS))
    return sum(file.stat().st_size for file in files if file.is_file()) / MIB


def _costs(folder: Path, latency: Latency, contexts: Sequence[int]) -> Measures:
    return Measures(
        file_mib=file_mib(folder),
        ttft_ms=latency.ttft_ms,
        tpot_ms=latency.tpot_ms,
        ttft_quartiles_ms=latency.ttft_quartiles_ms,
        tpot_quartiles_ms=latency.tpot_quartiles_ms,
        prompt_tokens_per_second={length: 1000 * int(length) / ms for length, ms in latency.ttft_ms.items()},
        tokens_per_second={context: 1000 / ms for context, ms in latency.tpot_ms.items()},
        peak_rss_mib=peak_rss(folder, max(contexts)),
    )
