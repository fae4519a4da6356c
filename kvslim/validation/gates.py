"""Checks measured values against the limits of the recipe, and puts them in a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from kvslim.contract import MIB
from kvslim.kv_ratios import smaller_than
from kvslim.measures import GateResult, Measures, Report, SampleAnswer, Speculation
from kvslim.settings import Gates

# Limits are decimal fractions; a difference of shares can miss one by a rounding error (1 - 0.95 > 0.05).
_TOLERANCE = 1e-9

NO_RECALL = "the plain export recalls nothing, so there was nothing to lose"

_VALUES: dict[str, Callable[[Measures, Measures], float | None]] = {
    "max_kl": lambda plain, artifact: artifact.kl_mean,
    "min_top1_agreement": lambda plain, artifact: artifact.top1_agreement,
    "max_recall_drop": lambda plain, artifact: _difference(plain.recall, artifact.recall),
    "max_kv_ratio": lambda plain, artifact: _quotient(artifact.kv_bytes_per_token, plain.kv_bytes_per_token),
    "max_file_mib": lambda plain, artifact: artifact.file_mib,
    "max_memory_mib": lambda plain, artifact: artifact.peak_rss_mib,
    "min_embedding_cosine": lambda plain, artifact: artifact.embedding_cosine_mean,
    "min_retrieval_rank_correlation": lambda plain, artifact: artifact.retrieval_rank_correlation,
    "min_masked_top1_agreement": lambda plain, artifact: artifact.masked_top1_agreement,
}


def check_gates(
    gates: Gates, plain: Measures, artifact: Measures, ratios: Measures | None = None, context: int | None = None
) -> tuple[GateResult, ...]:
    """One result per gate that is set, in the order of the recipe; a gate without a measured value fails.

    Args:
        gates: The limits.
        plain: What was measured of the plain export.
        artifact: What was measured of the artifact.
        ratios: The artifact over plain, times by pairs of turns; by default the quotients of the columns.
        context: Tokens of the cache that bytes per token are counted in.
    """
    limits = {name: limit for name, limit in gates.model_dump().items() if limit is not None}
    values = {name: value(plain, artifact) for name, value in _VALUES.items()}
    values["max_time_ratio"] = time_ratio(ratios or ratio(artifact, plain))
    values["max_kv_mib"] = _mib(artifact.kv_bytes_per_token, context)
    blind = NO_RECALL if plain.recall == 0 else None
    return tuple(
        _result(name, values[name], limit, blind if name == "max_recall_drop" else None)
        for name, limit in limits.items()
    )


def _result(name: str, value: float | None, limit: float, note: str | None) -> GateResult:
    if value is None or not math.isfinite(value):
        return GateResult(name=name, value=None, limit=limit, passed=False)
    excess = value - limit if name.startswith("max_") else limit - value
    return GateResult(name=name, value=value, limit=limit, passed=excess <= _TOLERANCE, note=note)


class Timed(NamedTuple):
    """What a run of timings says of artifact and plain export together.

    Attributes:
        ratios: Times of the artifact over plain's, medians over pairs of turns: by field of `Measures`, then by length.
        uncertain: Why the timings say little; None where nothing speaks against them.
    """

    ratios: Mapping[str, dict[str, float]] = {}
    uncertain: str | None = None


def ratio(artifact: Measures, plain: Measures) -> Measures:
    """The artifact divided by plain, for every field and key; None if one of them is missing or plain is 0.

    Quartiles have none, nor has what follows from the medians of times.
    """
    fields = [name for name in Measures.model_fields if not name.endswith(("_quartiles_ms", "tokens_per_second"))]
    return Measures.model_validate({name: _ratio(getattr(artifact, name), getattr(plain, name)) for name in fields})


def _ratio(
    artifact: float | dict[str, float] | None, plain: float | dict[str, float] | None
) -> float | dict[str, float] | None:
    if isinstance(artifact, dict) and isinstance(plain, dict):
        quotients = {key: _quotient(artifact[key], plain.get(key)) for key in artifact}
        return {key: quotient for key, quotient in quotients.items() if quotient is not None}
    if isinstance(artifact, dict) or isinstance(plain, dict):
        return None
    return _quotient(artifact, plain)


def _quotient(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or not denominator else numerator / denominator


def _mib(bytes_per_token: float | None, context: int | None) -> float | None:
    return None if bytes_per_token is None or context is None else bytes_per_token * context / MIB


def time_ratio(ratios: Measures) -> float | None:
    """Time per token over plain's at the longest context that both were timed at."""
    timed = ratios.tpot_ms or {}
    return timed[max(timed, key=int)] if timed else None


def _difference(minuend: float | None, subtrahend: float | None) -> float | None:
    return None if minuend is None or subtrahend is None else minuend - subtrahend


def report(
    gates: Gates,
    *,
    plain: Measures,
    floor: Measures,
    artifact: Measures,
    original: Measures | None = None,
    context: int | None = None,
    timed: Timed | None = None,
    samples: Sequence[SampleAnswer] = (),
    speculation: Speculation | None = None,
) -> Report:
    """The report of an artifact; it passes if every gate passes.

    Args:
        gates: Limits.
        plain: What was measured of the plain export.
        floor: Of plain next to itself.
        artifact: Of the artifact.
        original: Of the model before its weights were quantised.
        context: Tokens at which a cache's bytes count.
        timed: What the timings say of both together.
        samples: Answers to compare by eye.
        speculation: What a draft gains; texts of it that are not the model's fail the report.
    """
    timed = timed or Timed()
    ratios = ratio(artifact, plain).model_copy(update=dict(timed.ratios))
    results = check_gates(gates, plain, artifact, ratios, context)
    return Report(
        passed=all(result.passed for result in results) and not (speculation and speculation.differing),
        gates=results,
        plain=plain,
        floor=floor,
        artifact=artifact,
        ratio=ratios,
        original=original,
        smaller_than=smaller_than(artifact.kv_bytes_per_token, plain.kv_bytes_per_token),
        timings_uncertain=timed.uncertain,
        samples=tuple(samples),
        speculation=speculation,
    )
