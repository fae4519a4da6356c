"""Compares an encoder's artifact with the plain export: embeddings, masked tokens, latency, bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvslim.calibrate.sentences import Sentences
from kvslim.contract import ModelSpec
from kvslim.measures import Measures, Report
from kvslim.runtime.encoder import EncoderSession, pad
from kvslim.settings import Gates
from kvslim.validation.gates import Timed, report
from kvslim.validation.latency import Cost, Times, cost, in_turns, quartiles, ratio
from kvslim.validation.load import LoadWatch, doubt
from kvslim.validation.measure import file_mib
from kvslim.validation.retrieval import retrieval_rank_correlation
from kvslim.validation.rss import peak_rss

BATCH = 8


class EncoderEvaluation(NamedTuple):
    """Held-out material of an encoder, and how artifacts are measured on it.

    Attributes:
        held_out: Sentences.
        spec: The model's shape.
        lengths: Tokens of the texts that are timed.
        repeats: Timed turns per length.
        gates: Limits; a model without a masked-token head is spared that of masked tokens.
    """

    held_out: Sentences
    spec: ModelSpec
    lengths: Sequence[int]
    repeats: int
    gates: Gates

    def measure(self, plain: Path, artifact: Path) -> Report:
        """The report of an artifact next to the plain export of its model, gates judged.

        The reference is the plain export on one sentence at a time; artifact and floor run padded batches, as users do.

        Args:
            plain: Folder of the plain export, fp32.
            artifact: Folder of the artifact.
        """
        reference = answers(plain, self.held_out, batch=1)
        quality = {
            "plain": compare(reference, reference),
            "floor": compare(reference, answers(plain, self.held_out, BATCH)),
            "artifact": compare(reference, answers(artifact, self.held_out, BATCH)),
        }
        folders = {"plain": plain, "artifact": artifact}
        costs, timed = encoder_costs(folders, self.lengths, self.repeats)
        of_plain, of_artifact = (costs[name].model_copy(update=quality[name]) for name in folders)
        gates = self.gates
        if self.spec.task != "fill-mask":
            gates = gates.model_copy(update={"min_masked_top1_agreement": None})
        floor = Measures.model_validate(quality["floor"])
        return report(gates, plain=of_plain, floor=floor, artifact=of_artifact, timed=timed)


def encoder_costs(
    models: Mapping[str, Path], lengths: Sequence[int], repeats: int
) -> tuple[dict[str, Measures], Timed]:
    """File size, memory at the longest text, and latency of one text by length, timed in turns; by name.

    Raises:
        NotFoundError, ArtifactError: A model cannot be opened, or has fewer positions than a length.
    """
    sessions, watch = {name: EncoderSession(path) for name, path in models.items()}, LoadWatch()
    runs = {length: time_texts(sessions, length, repeats) for length in lengths}
    busy_cores = watch.busy_cores()
    del sessions
    times = {name: {str(length): runs[length][name][:, 0] for length in lengths} for name in models}
    first, last = (times[name] for name in (next(iter(models)), list(models)[-1]))
    places = {
        f"for a text of {length} tokens, {name}": each for name, own in times.items() for length, each in own.items()
    }
    timed = Timed({"latency_ms": {key: ratio(last[key], first[key]) for key in last}}, doubt(places, busy_cores))
    measured = {
        name: Measures(
            file_mib=file_mib(path),
            latency_ms={length: float(np.median(each)) for length, each in times[name].items()},
            latency_quartiles_ms={length: quartiles(each) for length, each in times[name].items()},
            peak_rss_mib=peak_rss(path, max(lengths), use="encode"),
        )
        for name, path in models.items()
    }
    return measured, timed


def time_texts(sessions: Mapping[str, EncoderSession], length: int, repeats: int, batch: int = 1) -> dict[str, Times]:
    """Times texts of `length` tokens in turns: costs [repeats, 2] by name, milliseconds and joules."""
    ids, mask = pad([[0] * length] * batch)

    def timed(name: str) -> Cost:
        # The untimed run first brings the model's weights into the processor's caches, where a busy service has them.
        sessions[name].hidden_states(ids, mask)
        return cost(lambda: sessions[name].hidden_states(ids, mask))

    return in_turns(list(sessions), timed, repeats)


class Answers(NamedTuple):
    """Embeddings [n, hidden], and the most likely token at each masked position."""

    embeddings: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int64] | None


def answers(folder: Path, held_out: Sentences, batch: int) -> Answers:
    """The outputs of a graph for sentences, in batches."""
    session = EncoderSession(folder)
    starts = range(0, len(held_out.texts), batch)
    embeddings = [session.embed(held_out.texts[start : start + batch]) for start in starts]
    tokens = [_predicted(session, held_out, slice(start, start + batch)) for start in starts if held_out.masked]
    return Answers(np.concatenate(embeddings), np.concatenate(tokens) if tokens else None)


def _predicted(session: EncoderSession, held_out: Sentences, part: slice) -> npt.NDArray[np.int64]:
    best = session.logits(*pad(held_out.masked[part])).argmax(-1)
    rows = zip(best, held_out.targets[part], strict=True)
    return np.concatenate([row[: len(target)][target] for row, target in rows])


def compare(reference: Answers, found: Answers) -> dict[str, float | None]:
    """The quality measures of a report, by name; None for what is no number, as of a broken model."""
    cosines = _cosines(reference.embeddings, found.embeddings)
    measures: dict[str, float | None] = {
        "embedding_cosine_mean": float(cosines.mean()),
        "embedding_cosine_min": float(cosines.min()),
        "retrieval_rank_correlation": retrieval_rank_correlation(reference.embeddings, found.embeddings),
    }
    if reference.tokens is not None:
        measures["masked_top1_agreement"] = float((reference.tokens == found.tokens).mean())
    return {name: None if value is None or not math.isfinite(value) else value for name, value in measures.items()}


def _cosines(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Cosine between the same rows of two matrices, in float64."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    cosines: npt.NDArray[np.float64] = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    return cosines
