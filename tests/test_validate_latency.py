from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from support.tiny_graph import write_tiny

from kvslim.errors import ArtifactError, NotFoundError, UsageError
from kvslim.progress import Silent
from kvslim.runtime.session import DecodeSession
from kvslim.validation.latency import measure_latency
from kvslim.validation.rss import peak_rss

T = TypeVar("T")


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    return {
        "plain": write_tiny(tmp_path / "plain.onnx"),
        "artifact": write_tiny(tmp_path / "artifact.onnx", int8=True),
    }


def test_latency_has_every_length_when_measured(models: dict[str, Path]) -> None:
    latencies = measure_latency(models, prompts=(4, 32), contexts=(8, 64), repeats=5, threads=1)
    assert list(latencies) == ["plain", "artifact"]
    for latency in latencies.values():
        for table in (latency.ttft_ms, latency.ttft_quartiles_ms, latency.ttft_ratio):
            assert list(table) == ["4", "32"]
        for table in (latency.tpot_ms, latency.tpot_quartiles_ms, latency.tpot_ratio):
            assert list(table) == ["8", "64"]
        for length, (first, third) in latency.tpot_quartiles_ms.items():
            assert 0 < first <= latency.tpot_ms[length] <= third
    assert set(latencies["plain"].tpot_ratio.values()) == {1.0}


def test_latency_takes_turns_when_there_are_two_models(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, int]] = []
    step = DecodeSession.step

    def recording(self: DecodeSession, tokens: np.ndarray) -> np.ndarray:
        order.append((self.layout.tensors[0].dtype, self.length))
        return step(self, tokens)

    monkeypatch.setattr(DecodeSession, "step", recording)
    measure_latency(models, prompts=(), contexts=(8,), repeats=3)
    plain, slim = 2 * [("float32", 8)], 2 * [("int8", 8)]
    assert order == 2 * (slim + plain + plain + slim)


@pytest.mark.parametrize(("limit", "pairs"), [(8, 2), (7, 1)])
def test_long_prompt_is_timed_in_one_pair_of_turns(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, limit: int, pairs: int
) -> None:
    order: list[str] = []
    prefill = DecodeSession.prefill

    def recording(self: DecodeSession, tokens: np.ndarray) -> np.ndarray:
        order.append("plain" if self.layout.tensors[0].dtype == "float32" else "slim")
        return prefill(self, tokens)

    monkeypatch.setattr(DecodeSession, "prefill", recording)
    monkeypatch.setattr("kvslim.validation.latency.LONG_PROMPT", limit)
    slim = measure_latency(models, prompts=(8,), contexts=(), repeats=3)["artifact"]
    assert order == pairs * ["slim", "plain", "plain", "slim"]
    assert slim.ttft_quartiles_ms["8"][0] < slim.ttft_ms["8"] < slim.ttft_quartiles_ms["8"][1]


def test_prompts_weigh_as_many_tokens_as_they_have_in_all_turns(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, told, prefill = dict[int, int](), dict[str, Sequence[float] | None](), DecodeSession.prefill

    class Listening(Silent):
        def track(
            self, items: Iterable[T], label: str, total: int | None = None, weights: Sequence[float] | None = None
        ) -> Iterator[T]:
            told[label] = weights
            yield from items

    def recording(self: DecodeSession, prompt: np.ndarray) -> np.ndarray:
        tokens[len(prompt)] = tokens.get(len(prompt), 0) + len(prompt)
        return prefill(self, prompt)

    monkeypatch.setattr(DecodeSession, "prefill", recording)
    monkeypatch.setattr("kvslim.validation.latency.LONG_PROMPT", 8)
    measure_latency(models, prompts=(4, 8, 16), contexts=(), repeats=16, progress=Listening())
    assert told["prompts timed"] == [count / len(models) for count in tokens.values()]


@pytest.mark.parametrize("wrong", [{"prompts": (0,)}, {"contexts": (0,)}, {"repeats": 2}])
def test_latency_raises_usage_error_when_a_number_is_too_small(
    models: dict[str, Path], wrong: dict[str, object]
) -> None:
    with pytest.raises(UsageError, match="positive"):
        measure_latency(models, **{"prompts": (4,), "contexts": (4,), "repeats": 3, **wrong})


def test_latency_raises_not_found_when_a_model_is_missing(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        measure_latency({"plain": tmp_path}, prompts=(4,), contexts=(4,), repeats=3)


def test_peak_rss_grows_with_the_cache_when_context_does(models: dict[str, Path]) -> None:
    contexts = (16, 200_000)
    small, large = (peak_rss(models["plain"], context, threads=1) for context in contexts)
    cache = DecodeSession(models["plain"], capacity=1).layout.bytes_at(contexts[1] - contexts[0]) / 2**20
    assert 10 < small < 400
    assert large - small == pytest.approx(cache, rel=0.3)


def test_peak_rss_ignores_its_parent_when_that_is_large(models: dict[str, Path]) -> None:
    small = peak_rss(models["plain"], 16, threads=1)
    ballast = np.ones(400 * 2**20, np.int8)
    assert peak_rss(models["plain"], 16, threads=1) < small + ballast.nbytes / 2**21


def test_peak_rss_raises_artifact_error_when_the_model_is_broken(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match="measuring memory failed"):
        peak_rss(tmp_path, 16)


def test_rss_imports_neither_torch_nor_transformers_when_loaded() -> None:
    script = "import kvslim.validation.rss, sys; print({'torch', 'transformers'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
