from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from support.tiny_graph import write_tiny

from kvslim.errors import UsageError
from kvslim.runtime.session import DecodeSession
from kvslim.validation import tally
from kvslim.validation.quality import PAIRS, compared, measure_all, measure_floor, measure_quality, summed_up
from kvslim.validation.tally import Quality, Tally

WINDOWS = np.random.default_rng(0).integers(24, size=(5, 37))


@pytest.fixture
def plain(tmp_path: Path) -> DecodeSession:
    return DecodeSession(write_tiny(tmp_path / "plain.onnx"), capacity=37)


@pytest.fixture
def artifact(tmp_path: Path) -> DecodeSession:
    return DecodeSession(write_tiny(tmp_path / "artifact.onnx", noise=0.05), capacity=37)


def reference(teacher: DecodeSession, student: DecodeSession) -> Quality:
    """The definitions, written out per token."""
    kl, agreement, nll = [], [], []
    for window in WINDOWS:
        pairs = []
        for session in (teacher, student):
            session.reset()
            logits = session.step(window).astype(np.float64)
            pairs.append(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
        kl += [sum(p * math.log(p / q) for p, q in zip(*rows, strict=True)) for rows in zip(*pairs, strict=True)]
        agreement += [int(p.argmax() == q.argmax()) for p, q in zip(*pairs, strict=True)]
        nll.append(np.mean([-math.log(q[token]) for q, token in zip(pairs[1][:-1], window[1:], strict=True)]))
    perplexity = math.exp(np.mean(nll))
    error = np.std(nll, ddof=1) / math.sqrt(len(nll))
    kl_se = np.std(np.reshape(kl, WINDOWS.shape).mean(1), ddof=1) / math.sqrt(len(nll))
    return Quality(np.mean(kl), kl_se, np.quantile(kl, 0.99), np.mean(agreement), perplexity, perplexity * error, {})


def _numbers(quality: Quality) -> list[float]:
    return [value for value in vars(quality).values() if isinstance(value, float)]


def test_quality_equals_the_definition_when_the_student_is_perturbed(
    plain: DecodeSession, artifact: DecodeSession
) -> None:
    measured, expected = measure_quality(plain, artifact, WINDOWS), reference(plain, artifact)
    assert measured.kl_mean > 1e-3
    for name, value in vars(expected).items():
        found = getattr(measured, name)
        assert found == (None if value is None else pytest.approx(value, rel=1e-3)), name


def test_quality_is_zero_divergence_when_a_model_meets_itself(plain: DecodeSession, tmp_path: Path) -> None:
    same = DecodeSession(write_tiny(tmp_path / "same.onnx"), capacity=37)
    quality = measure_quality(plain, same, WINDOWS)
    assert (quality.kl_mean, quality.kl_p99, quality.top1_agreement) == (0, 0, 1)


@pytest.mark.parametrize("chunk", [1, 5, 16, 37, 100])
def test_quality_is_the_same_when_chunks_differ(plain: DecodeSession, artifact: DecodeSession, chunk: int) -> None:
    expected = measure_quality(plain, artifact, WINDOWS)
    measured = measure_quality(plain, artifact, WINDOWS, chunk=chunk)
    assert _numbers(measured) == pytest.approx(_numbers(expected), rel=1e-3)


def test_fewer_positions_are_expanded_at_a_time_when_the_vocabulary_is_larger(
    plain: DecodeSession, artifact: DecodeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seen = measure_quality(plain, artifact, WINDOWS), list[int]()
    compared_rows = tally._compared_rows
    monkeypatch.setattr(tally, "_compared_rows", lambda *logits: seen.append(len(logits[0])) or compared_rows(*logits))
    monkeypatch.setattr(tally, "BLOCK", 5 * plain.vocab)
    assert _numbers(measure_quality(plain, artifact, WINDOWS)) == pytest.approx(_numbers(whole), rel=1e-9)
    assert max(seen) == 5


def test_quality_differs_when_the_cache_is_int8(plain: DecodeSession, tmp_path: Path) -> None:
    int8 = DecodeSession(write_tiny(tmp_path / "int8.onnx", int8=True), capacity=37)
    assert measure_quality(plain, int8, WINDOWS).kl_mean > 1e-6


def test_measure_all_equals_single_measurements_when_columns_are_compared(
    plain: DecodeSession, artifact: DecodeSession, tmp_path: Path
) -> None:
    plain_again = DecodeSession(write_tiny(tmp_path / "again.onnx"), capacity=37)
    report = measure_all(plain, artifact, WINDOWS)
    assert report.artifact == measure_quality(plain, artifact, WINDOWS)
    assert (report.plain.kl_mean, report.plain.top1_agreement) == (0, 1)
    assert report.plain.perplexity == pytest.approx(measure_quality(plain, plain_again, WINDOWS).perplexity)


def test_floor_is_noise_and_has_no_perplexity(plain: DecodeSession) -> None:
    floor = measure_floor(plain, WINDOWS)
    assert 0 < floor.kl_mean < 1e-9
    assert math.isnan(floor.perplexity)


def test_floor_is_taken_of_a_few_beginnings_when_counting_tokens(
    plain: DecodeSession, artifact: DecodeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvslim.validation.quality.FLOOR_TOKENS", 20)
    counts = {id(plain): 0, id(artifact): 0}
    step = DecodeSession.step

    def counting(self: DecodeSession, tokens: np.ndarray) -> np.ndarray:
        counts[id(self)] += len(tokens)
        return step(self, tokens)

    monkeypatch.setattr(DecodeSession, "step", counting)
    measure_all(plain, artifact, WINDOWS)
    assert list(counts.values()) == [WINDOWS.size, WINDOWS.size]
    measure_floor(plain, WINDOWS)
    assert list(counts.values()) == [WINDOWS.size + 2 * 4 * 20, WINDOWS.size]


def test_kl_is_told_by_position_when_one_text_is_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvslim.validation.tally.FIRST_BOUND", 10)
    graphs = write_tiny(tmp_path / "plain.onnx"), write_tiny(tmp_path / "artifact.onnx", noise=0.05)
    plain, artifact = (DecodeSession(graph, capacity=60) for graph in graphs)
    long = np.random.default_rng(1).integers(24, size=60)
    short = long[:12], long[30:42]
    found = measure_quality(plain, artifact, [*short, long])
    alone = [measure_quality(plain, artifact, [window]) for window in (*short, long)]
    assert list(found.kl_by_position) == [10, 20, 40, 60]
    assert found.kl_by_position[60] == pytest.approx(alone[2].kl_by_position[60])
    assert found.kl_by_position[10] == pytest.approx(np.mean([one.kl_by_position[10] for one in alone]))
    assert found.kl_mean == pytest.approx(np.average([one.kl_mean for one in alone], weights=[12, 12, 60]))
    assert list(measure_all(plain, artifact, [*short, long]).plain.kl_by_position.values()) == [0.0] * 4


def test_what_lies_beyond_the_context_is_told_apart(tmp_path: Path) -> None:
    graphs = write_tiny(tmp_path / "plain.onnx"), write_tiny(tmp_path / "artifact.onnx", noise=0.05)
    plain, artifact = (DecodeSession(graph, capacity=60) for graph in graphs)
    text = np.random.default_rng(1).integers(24, size=60)
    short = text[:12]
    found = summed_up(compared([plain, artifact], PAIRS, [short, text], within=48))
    within, whole = (measure_quality(plain, artifact, [short, each]) for each in (text[:48], text))
    assert found.artifact.kl_mean == pytest.approx(within.kl_mean)
    assert found.artifact.kl_beyond == pytest.approx((72 * whole.kl_mean - 60 * within.kl_mean) / 12)
    assert found.plain.kl_beyond == 0
    assert found.artifact.top1_agreement == pytest.approx(within.top1_agreement)
    assert "kl_beyond" in found.artifact.as_measures()
    assert within.kl_beyond is None


def test_a_long_text_counts_as_many_pieces_when_errors_are_told(
    plain: DecodeSession, artifact: DecodeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = WINDOWS[0, :36]
    pieces = [measure_quality(plain, artifact, [long]).kl_mean]
    counts: list[int] = []
    monkeypatch.setattr(
        "kvslim.validation.tally._mean_and_error",
        lambda pieces: counts.append(len(pieces)) or (float(np.mean([piece.mean for piece in pieces])), math.nan),
    )
    found = measure_quality(plain, artifact, [WINDOWS[1, :12], long])
    assert counts == [4, 4]
    assert found.kl_mean == pytest.approx(
        np.average([*pieces, measure_quality(plain, artifact, [WINDOWS[1, :12]]).kl_mean], weights=[36, 12])
    )


def test_short_pieces_count_by_their_tokens() -> None:
    tally = Tally(piece=8)
    values = [np.random.default_rng(seed).random(count) for seed, count in enumerate((16, 19))]
    for kl in values:
        tally.rows.append((kl, kl < 0.5, kl, 2 * kl[:-1]))
        tally.end_window()
    found = tally.student()
    assert found.kl_mean == pytest.approx(np.concatenate(values).mean())
    assert np.log(found.perplexity) == pytest.approx(np.concatenate([2 * kl[:-1] for kl in values]).mean())
    even = Tally(piece=8)
    even.rows.append((values[0], values[0] < 0.5, values[0], values[0]))
    even.end_window()
    means = values[0].reshape(2, 8).mean(1)
    assert even.student().kl_se == pytest.approx(means.std(ddof=1) / np.sqrt(2))


def test_measures_are_none_when_not_finite() -> None:
    measures = Quality(math.nan, math.nan, math.inf, 0.5, 2.0, math.nan, {512: 0.1, 600: math.nan}).as_measures()
    assert measures == {
        "kl_mean": None,
        "kl_se": None,
        "kl_p99": None,
        "top1_agreement": 0.5,
        "perplexity": 2.0,
        "perplexity_se": None,
        "kl_by_position": {"512": 0.1},
        "kl_beyond": None,
    }


def test_quality_is_not_finite_when_the_student_is_broken(plain: DecodeSession, tmp_path: Path) -> None:
    broken = DecodeSession(write_tiny(tmp_path / "broken.onnx", noise=math.inf), capacity=37)
    measures = measure_quality(plain, broken, WINDOWS).as_measures()
    assert measures["kl_mean"] is None
    assert measures["perplexity"] is None


def test_standard_errors_are_none_when_there_is_one_window(plain: DecodeSession, artifact: DecodeSession) -> None:
    measures = measure_quality(plain, artifact, WINDOWS[:1]).as_measures()
    assert (measures["kl_se"], measures["perplexity_se"]) == (None, None)


@pytest.mark.parametrize("shape", [(0, 8), (4, 1), (8,)])
def test_quality_raises_usage_error_when_windows_hold_no_pairs(plain: DecodeSession, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="windows"):
        measure_quality(plain, plain, np.zeros(shape, np.int64))


def test_quality_raises_usage_error_when_vocabularies_differ(plain: DecodeSession, tmp_path: Path) -> None:
    other = DecodeSession(write_tiny(tmp_path / "other.onnx", vocab=25), capacity=37)
    with pytest.raises(UsageError, match="24 and 25"):
        measure_quality(plain, other, WINDOWS)
