from __future__ import annotations

import math

import pytest

from kvslim.measures import Measures
from kvslim.settings import Gates
from kvslim.validation.gates import Timed, check_gates, ratio, report

CONTEXT = 4096
PLAIN = Measures(kv_bytes_per_token=1024, recall=1.0, kl_mean=0.0, perplexity=10.0, tpot_ms={"128": 4.0, "1024": 8.0})
ARTIFACT = Measures(
    kv_bytes_per_token=256,
    recall=0.95,
    kl_mean=0.01,
    top1_agreement=0.9,
    embedding_cosine_mean=0.995,
    retrieval_rank_correlation=0.97,
    masked_top1_agreement=0.98,
    perplexity=11.0,
    tpot_ms={"128": 3.0, "4096": 9.0},
)


@pytest.mark.parametrize(
    ("name", "limit", "value", "passed"),
    [
        ("max_kl", 0.01, 0.01, True),
        ("max_kl", 0.009, 0.01, False),
        ("min_top1_agreement", 0.9, 0.9, True),
        ("min_top1_agreement", 0.91, 0.9, False),
        ("max_recall_drop", 0.05, 0.05, True),
        ("max_recall_drop", 0.04, 0.05, False),
        ("max_kv_ratio", 0.25, 0.25, True),
        ("max_kv_ratio", 0.2, 0.25, False),
        ("max_kv_mib", 1.0, 1.0, True),
        ("max_kv_mib", 0.99, 1.0, False),
        ("max_time_ratio", 0.75, 0.75, True),
        ("max_time_ratio", 0.74, 0.75, False),
        ("min_embedding_cosine", 0.99, 0.995, True),
        ("min_embedding_cosine", 0.999, 0.995, False),
        ("min_retrieval_rank_correlation", 0.97, 0.97, True),
        ("min_retrieval_rank_correlation", 0.98, 0.97, False),
        ("min_masked_top1_agreement", 0.98, 0.98, True),
        ("min_masked_top1_agreement", 0.99, 0.98, False),
    ],
)
def test_gate_compares_value_with_limit_when_measured(name: str, limit: float, value: float, passed: bool) -> None:
    (result,) = check_gates(Gates.model_validate({name: limit}), PLAIN, ARTIFACT, context=CONTEXT)
    assert (result.name, result.limit, result.passed) == (name, limit, passed)
    assert result.value == pytest.approx(value)


@pytest.mark.parametrize("name", list(Gates.model_fields))
def test_gate_fails_when_nothing_was_measured(name: str) -> None:
    (result,) = check_gates(Gates.model_validate({name: 0.5}), Measures(), Measures())
    assert (result.value, result.passed) == (None, False)


def test_gate_fails_when_the_value_is_nan() -> None:
    (result,) = check_gates(Gates(max_kl=1.0), PLAIN, Measures.model_construct(kl_mean=math.nan))
    assert (result.value, result.passed) == (None, False)


def test_gates_are_none_when_none_is_set() -> None:
    assert check_gates(Gates(), PLAIN, ARTIFACT) == ()


def test_ratio_divides_field_by_field_when_both_are_measured() -> None:
    quotient = ratio(ARTIFACT, PLAIN)
    assert quotient.kv_bytes_per_token == 0.25
    assert quotient.perplexity == pytest.approx(1.1)
    assert quotient.tpot_ms == {"128": 0.75}


def test_ratio_is_none_when_one_side_is_missing_or_plain_is_zero() -> None:
    quotient = ratio(ARTIFACT, PLAIN)
    assert quotient.top1_agreement is None
    assert quotient.kl_mean is None
    assert quotient.ttft_ms is None
    assert ratio(Measures(tpot_ms={"128": 1.0}), Measures()).tpot_ms is None


@pytest.mark.parametrize(("limit", "passed"), [(0.02, True), (0.001, False)])
def test_report_passes_when_every_gate_does(limit: float, passed: bool) -> None:
    made = report(Gates(max_kl=limit, max_kv_ratio=0.5), plain=PLAIN, floor=Measures(), artifact=ARTIFACT)
    assert made.passed is passed
    assert [gate.name for gate in made.gates] == ["max_kl", "max_kv_ratio"]
    assert made.ratio == ratio(ARTIFACT, PLAIN)


def test_ratios_of_times_are_those_of_pairs_of_turns() -> None:
    timed = Timed({"tpot_ms": {"128": 0.7}}, "the machine was busy")
    made = report(Gates(), plain=PLAIN, floor=Measures(), artifact=ARTIFACT, timed=timed)
    assert made.ratio.tpot_ms == {"128": 0.7}
    assert made.ratio.kv_bytes_per_token == 0.25
    assert made.timings_uncertain == "the machine was busy"
    assert made.smaller_than == {"fp32": 4, "fp16": 2, "q8_0": 8.5 / 8}


def test_recall_gate_says_so_when_there_was_nothing_to_lose() -> None:
    gates = Gates(max_recall_drop=0.01, max_kl=1.0)
    recall, other = (check_gates(gates, Measures(recall=0.0), Measures(recall=0.0, kl_mean=0.5)))[::-1]
    assert recall.passed
    assert recall.note is not None
    assert other.note is None
    assert check_gates(gates, Measures(recall=0.5), Measures(recall=0.5))[1].note is None
