"""Timings over a grid of lengths, threads and batches. All artifacts are timed at one point before the next point."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from kvslim.contract import Frozen, ModelSpec
from kvslim.progress import Progress
from kvslim.recipe import shortened, up_to
from kvslim.runtime.encoder import EncoderSession
from kvslim.runtime.session import DecodeSession
from kvslim.runtime.text import Speculative, used_draft
from kvslim.settings import LEAST_REPEATS
from kvslim.stages import DRAFTS
from kvslim.types import Manifest
from kvslim.validation.drafts import SHORTEST, DraftGain, bench_drafts
from kvslim.validation.encoder import time_texts
from kvslim.validation.latency import Times, joules_per_token, quartiles, ratio, time_models
from kvslim.validation.load import LoadWatch, doubt
from kvslim.validation.measure import file_mib
from kvslim.validation.rss import Use, peak_rss

Metric = Literal["ttft_ms", "tpot_ms", "latency_ms"]


class Grid(Frozen):
    """What to time: all combinations of these.

    Attributes:
        prompts: Prompt lengths in tokens for time to first token; text lengths for an encoder.
        contexts: Context lengths in tokens for time per output token; an encoder has none.
        threads: Threads of one operator; None leaves the choice to onnxruntime.
        batches: Sequences per batch.
        repeats: Timed turns per point.
        speculative: Whether to write texts with and without the drafts that artifacts have, too, up to each context
            that is long enough.
        text: What these are written behind; as for `bench_drafts`.
    """

    prompts: tuple[int, ...] = (128, 512)
    contexts: tuple[int, ...] = (128, 1024)
    threads: tuple[int | None, ...] = (None,)
    batches: tuple[int, ...] = (1,)
    repeats: int = Field(16, ge=LEAST_REPEATS)
    speculative: Speculative = "auto"
    text: str = "self"

    def fitted(self, specs: Sequence[ModelSpec], target: int | None = None) -> Grid:
        """This grid with lengths that all models have positions for; a longer one that somebody set stays as it is.

        A context of all positions means the last token that fits.

        Args:
            specs: The models' shapes.
            target: Context that decoders were made for, which their defaults end with; None for encoders.
        """
        most = min((spec.max_context for spec in specs), default=max(self.prompts))
        grid = shortened(self, prompts=most, contexts=most - 1)
        lengths = {"prompts": grid.prompts, "contexts": grid.contexts}
        if target is not None:
            for name in lengths.keys() - self.model_fields_set:
                lengths[name] = up_to(min(target, most), lengths[name])
        lengths["contexts"] = tuple(most - 1 if context == most else context for context in lengths["contexts"])
        return grid.model_copy(update=lengths)

    @property
    def points(self) -> Iterator[tuple[int | None, int]]:
        """Threads and batches."""
        return product(self.threads, self.batches)


def least_target(manifests: Sequence[Manifest]) -> int | None:
    """The smallest context that an artifact among these was made for; None where all are encoders."""
    return min((manifest.context for manifest in manifests if not manifest.spec.is_encoder), default=None)


class Point(NamedTuple):
    """A point of the grid; the fields are those of `Timing`."""

    metric: Metric
    tokens: int
    threads: int | None
    batch: int


class Timing(Frozen):
    """One point of the grid.

    Attributes:
        metric: What was timed: a prompt, a step that gives one token to each sequence, or texts.
        tokens: Length of the prompt, the context or each text.
        threads: Threads of one operator; None if onnxruntime chose.
        batch: Sequences per batch.
        median_ms, first_quartile_ms, third_quartile_ms: Over all turns.
        tokens_per_second: Of all sequences together, from the median.
        ratio: This time divided by the first artifact's, median over pairs of neighbouring turns.
        joules_per_token: Mean energy of the processor's packages; None if the machine does not report it.
        uncertain: Why the timing says little; None where nothing speaks against it.
    """

    metric: Metric
    tokens: int
    threads: int | None
    batch: int
    median_ms: float
    first_quartile_ms: float
    third_quartile_ms: float
    tokens_per_second: float
    ratio: float
    joules_per_token: float | None
    uncertain: str | None


class BenchResult(Frozen):
    """Timings and sizes of one artifact, and what its draft gains.

    Memory: a fresh process at the largest length and batch of the grid, without the draft.
    """

    kv_bytes_per_token: float | None
    file_mib: float
    peak_rss_mib: float
    timings: tuple[Timing, ...]
    drafts: tuple[DraftGain, ...] = ()


def bench_all(
    folders: Sequence[Path], manifests: Sequence[Manifest], grid: Grid, progress: Progress
) -> dict[str, BenchResult]:
    """Times artifacts of models that are all decoders or all encoders; by the path given."""
    artifacts = {str(folder): folder for folder in folders}
    drafted = (
        (str(folder), used_draft(each, grid.speculative)) for folder, each in zip(folders, manifests, strict=True)
    )
    contexts = tuple(context for context in grid.contexts if context >= SHORTEST)
    drafts = {name: draft for name, draft in drafted if draft is not None and contexts}
    progress.expect({**({DRAFTS: 1.0} if drafts else {}), **{_name_of(*point): 1.0 for point in grid.points}})
    gains: Mapping[str, tuple[DraftGain, ...]] = {}
    if drafts:
        progress.stage(DRAFTS)
        gains = bench_drafts(artifacts, drafts, contexts, grid.threads, grid.text, progress)
    timed = bench_encoders if any(manifest.spec.is_encoder for manifest in manifests) else bench_decoders
    found = timed(artifacts, grid, progress)
    return {name: result.model_copy(update={"drafts": gains.get(name, ())}) for name, result in found.items()}


def bench_decoders(artifacts: Mapping[str, Path], grid: Grid, progress: Progress) -> dict[str, BenchResult]:
    """Times prompts and decoding.

    Raises:
        NotFoundError, ArtifactError, UsageError: A model cannot be opened, or does not run such a batch.
    """
    timings: dict[str, list[Timing]] = {name: [] for name in artifacts}
    for threads, batch in grid.points:
        progress.stage(_name_of(threads, batch))
        runs = time_models(artifacts, grid.prompts, grid.contexts, grid.repeats, threads, batch, progress=progress)
        for length, costs in runs.ttft.items():
            _add(timings, Point("ttft_ms", length, threads, batch), costs, batch * length, runs.busy_cores)
        for length, costs in runs.tpot.items():
            _add(timings, Point("tpot_ms", length, threads, batch), costs, batch, runs.busy_cores)
    longest = max(grid.contexts)
    layouts = {name: DecodeSession(path, capacity=1).layout for name, path in artifacts.items()}
    return {
        name: _result(path, grid, timings[name], longest, "decode", layouts[name].bytes_per_token(longest))
        for name, path in artifacts.items()
    }


def bench_encoders(artifacts: Mapping[str, Path], grid: Grid, progress: Progress) -> dict[str, BenchResult]:
    """Times texts. The contexts of the grid are ignored.

    Raises:
        NotFoundError, ArtifactError: A model cannot be opened, or has fewer positions than a length.
    """
    timings: dict[str, list[Timing]] = {name: [] for name in artifacts}
    for threads, batch in grid.points:
        progress.stage(_name_of(threads, batch))
        sessions = {name: EncoderSession(path, threads=threads) for name, path in artifacts.items()}
        for length in progress.track(grid.prompts, "lengths timed"):
            watch = LoadWatch()
            costs = time_texts(sessions, length, grid.repeats, batch)
            _add(timings, Point("latency_ms", length, threads, batch), costs, batch * length, watch.busy_cores())
    longest = max(grid.prompts)
    return {name: _result(path, grid, timings[name], longest, "encode", None) for name, path in artifacts.items()}


def _name_of(threads: int | None, batch: int) -> str:
    """A stage of the grid."""
    return f"{'threads as onnxruntime chooses' if threads is None else f'threads: {threads}'}, batch: {batch}"


def _add(
    timings: dict[str, list[Timing]], point: Point, costs: Mapping[str, Times], tokens: int, busy_cores: float
) -> None:
    """Adds the timings of each artifact at a point of the grid, in runs of `tokens` tokens."""
    reference = next(iter(costs.values()))[:, 0]
    uncertain = doubt({f"at {point.tokens:,} tokens, {name}": runs[:, 0] for name, runs in costs.items()}, busy_cores)
    for name, runs in costs.items():
        times = runs[:, 0]
        first, third = quartiles(times)
        timings[name].append(
            Timing(
                **point._asdict(),
                median_ms=float(np.median(times)),
                first_quartile_ms=first,
                third_quartile_ms=third,
                tokens_per_second=1000 * tokens / float(np.median(times)),
                ratio=ratio(times, reference),
                joules_per_token=joules_per_token(runs, tokens),
                uncertain=uncertain,
            )
        )


def _result(
    path: Path, grid: Grid, timings: Sequence[Timing], tokens: int, use: Use, kv_bytes: float | None
) -> BenchResult:
    threads = max((count for count in grid.threads if count is not None), default=None)
    return BenchResult(
        kv_bytes_per_token=kv_bytes,
        file_mib=file_mib(path),
        peak_rss_mib=peak_rss(path, tokens, threads, use, max(grid.batches)),
        timings=tuple(timings),
    )
