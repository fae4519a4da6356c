"""What is computed on a GPU, as far as a machine without one can tell: the same as on the CPU.

A device that is made of the CPU stands for the GPU; see `support.far_device`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from support.far_device import FAR, far_device
from support.models import open_prepared, recipe_of

from kvslim.caches import ClusteredCache, LinearCache, SharedCache, WindowCache
from kvslim.healing import distil
from kvslim.healing.distil import healed
from kvslim.healing.text import Text, Texts
from kvslim.memory import usable_memory
from kvslim.methods import KvHdc, KvPca, KvQuant, Method
from kvslim.planning.decide import decide, planned
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.progress import Silent
from kvslim.recipe import Recipe
from kvslim.settings import Budget, Heal
from kvslim.transform import copies
from kvslim.transform.device import computing_device, free_bytes
from kvslim.transform.edits import Codes
from kvslim.types import LayerPlan, Plan
from kvslim.unexpected import MemoryLimitError, explained

CPU = torch.device("cpu")
RATE = 1e-4
SHARE = RATE / 5  # what two steps may end apart: each number takes steps of one size, however small its gradient
Measure = Callable[[PreparedDecoder], Sequence[object]]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Checks that numbers measured of a model on the CPU, and on the other device, are the same."""

    def measured(device: torch.device, model: Path, recipe: Recipe, measure: Measure) -> Sequence[object]:
        monkeypatch.setenv("KVSLIM_CACHE", str(tmp_path / device.type))
        monkeypatch.setattr(copies, "computing_device", lambda: device)
        monkeypatch.setattr(copies, "free_bytes", lambda _: 2**40)
        prepared = open_prepared(model, recipe)
        assert prepared.device_model.device == device
        assert prepared.model.device == CPU
        return measure(prepared)

    monkeypatch.setattr(distil, "free_bytes", lambda _: 2**40)

    def compare(model: Path, measure: Measure, *methods: Method, apart: float = 1e-6, **settings: object) -> None:
        recipe = recipe_of(methods).model_copy(update=settings)
        near, far = (measured(device, model, recipe, measure) for device in (CPU, FAR))
        assert near
        for one, other in zip(near, far, strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-4, atol=apart)

    with far_device():
        yield compare


def numbers_of(codes: Codes) -> list[np.ndarray]:
    """What is fitted and trained in codes."""
    outputs = [code.output.weight for code in codes if code.output is not None]
    return [*outputs, *(array for code in codes for array in code.weights.values())]


def losses(prepared: PreparedDecoder, codes: Codes) -> list[float]:
    """The KL and the recall of codes."""
    trials = prepared.trials()
    return [trials.loss(codes), *trials.recall.probabilities(codes), trials.more_recall.recall(codes)]


def refitted(prepared: PreparedDecoder, codes: Codes) -> Codes:
    *_, found = prepared.trials().refitting(codes)
    return found


def trained(prepared: PreparedDecoder, codes: Codes, folder: Path) -> list[object]:
    """The weights of two steps of healing, and what it told."""
    windows = Text(prepared.statistics.windows, None)
    texts, settings = Texts(windows, windows, windows), Heal(steps=2, rate=RATE)
    of = prepared.device_model, prepared.architecture, codes
    found, told = healed(*of, texts, settings, 0, folder / prepared.device_model.device.type, Silent())
    return [told.kl_before, told.kl_after, *numbers_of(found)]


CODES = KvPca(rank=8), KvHdc(bits=8)
PACKED = KvPca(rank=8), KvHdc(bits=2, window=16)
FAMILIES = [(family, CODES) for family in ("llama", "qwen3", "gpt_neox", "opt", "phi3")]


@pytest.mark.parametrize(("family", "methods"), [*FAMILIES, ("gemma2", (KvQuant(),)), ("llama", PACKED)])
def test_codes_of_every_family_are_measured_there(
    tiny_model: Callable[[str], Path], check: Callable[..., None], family: str, methods: tuple[Method, ...]
) -> None:
    def measure(prepared: PreparedDecoder) -> Sequence[object]:
        codes = prepared.codes(decide(prepared.recipe, prepared.spec, prepared.statistics))
        return losses(prepared, codes)

    check(tiny_model(family), measure, *methods)


def test_statistics_are_gathered_there(tiny_llama: Path, check: Callable[..., None]) -> None:
    check(tiny_llama, lambda prepared: list(vars(prepared.statistics).values()))


def test_taylor_scores_are_taken_there(tiny_llama: Path, check: Callable[..., None]) -> None:
    check(tiny_llama, lambda prepared: [prepared.trials().taylor])


CACHES = {
    "int4": LayerPlan(layer=1).with_cache(stored="int4"),
    "window": LayerPlan(layer=1, cache=WindowCache(window=8, sinks=2)),
    "state": LayerPlan(layer=1, cache=LinearCache(window=8, sinks=2, features=4)),
    "clustered": LayerPlan(layer=1, cache=ClusteredCache(clusters=(0, 0, 1, 1))),
    "shared": LayerPlan(layer=1, cache=SharedCache(source=0)),
    "no attention": LayerPlan(layer=1, heads=()),
    "no block": LayerPlan(layer=1, heads=(), mlp=False),
    "fewer heads": LayerPlan(layer=1, heads=(0, 1)),
    "narrower": LayerPlan(layer=1, mlp_width=64),
}


@pytest.mark.parametrize("kind", CACHES)
def test_every_kind_of_layer_is_fitted_measured_and_trained_there(
    tiny_llama: Path, tmp_path: Path, check: Callable[..., None], kind: str
) -> None:
    def measure(prepared: PreparedDecoder) -> Sequence[object]:
        codes = prepared.codes(Plan(layers=(LayerPlan(layer=0), CACHES[kind])))
        fitted = refitted(prepared, codes)
        return [*losses(prepared, codes), *numbers_of(fitted), *trained(prepared, fitted, tmp_path)]

    check(tiny_llama, measure, apart=SHARE)


def test_layers_that_are_recomputed_are_trained_there(
    tiny_llama: Path, tmp_path: Path, check: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "free_bytes", lambda _: 0)
    check(
        tiny_llama,
        lambda prepared: trained(prepared, prepared.codes(Plan(layers=(LayerPlan(layer=0), CACHES["int4"]))), tmp_path),
        apart=SHARE,
    )


def test_plans_are_chosen_there(tiny_llama: Path, check: Callable[..., None]) -> None:
    plans = []

    def measure(prepared: PreparedDecoder) -> Sequence[object]:
        summary = planned(prepared)
        plans.append(summary.plan)
        return [summary.kl]

    check(tiny_llama, measure, budget=Budget(kv_ratio=8))
    assert plans[0] == plans[1]


def test_model_that_the_gpu_has_no_room_for_stays_on_the_cpu(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "computing_device", lambda: FAR)
    prepared = open_prepared(tiny_llama, recipe_of())
    size = sum(each.nbytes for each in prepared.model.parameters())
    monkeypatch.setattr(copies, "free_bytes", lambda _: 2 * size - 1)
    assert prepared.device_model is prepared.model


def test_device_is_the_gpu_where_torch_sees_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for sees, kind in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda sees=sees: sees)
        assert computing_device().type == kind
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5, 9))
    assert free_bytes(computing_device()) == 5
    assert free_bytes(CPU) == pytest.approx(usable_memory(), rel=0.2)


def test_gpu_that_is_too_small_leaves_the_cpu() -> None:
    told = explained(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert isinstance(told, MemoryLimitError)
    assert "memory of the GPU" in told.message
    assert "CUDA_VISIBLE_DEVICES" in told.fix
