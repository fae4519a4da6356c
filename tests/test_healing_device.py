"""Training on a GPU, as far as a machine without one can tell: whatever a step computes with is where the weights are.

Torch's device `meta` stands for the GPU: it has shapes and no numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import open_prepared, recipe_of, tokens_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvslim.caches import ClusteredCache, LinearCache, SharedCache, WindowCache
from kvslim.errors import UsageError
from kvslim.healing.device import free_bytes, training_device, within_memory
from kvslim.healing.recompute import recompute
from kvslim.healing.student import Student, sharing_copy
from kvslim.memory import usable_memory
from kvslim.methods import KvHdc, KvPca, KvQuant, Method
from kvslim.planning.decide import decide
from kvslim.prepared.decoder import PreparedDecoder
from kvslim.transform import projections
from kvslim.transform.edits import Codes
from kvslim.transform.kl_evaluator import logits_at
from kvslim.types import LayerPlan, Plan

AWAY = torch.device("meta")
INDEXING = {"aten::index.Tensor", "aten::_index_put_impl_", "aten::index_put"}  # which take positions from anywhere


class _OneDevice(TorchDispatchMode):
    """Fails where an operation meets numbers that are elsewhere."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() not in INDEXING and not func.name().startswith("aten::_to_copy"):
            places = {each.device for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor) and each.dim()}
            assert len(places) < 2, (func.name(), places)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def shapes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Projections of a model without numbers are zeros, and transformers does not look for packed texts."""
    monkeypatch.setattr(projections, "_double", lambda tensor: np.zeros(tensor.shape))
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)


def check_step(prepared: PreparedDecoder, codes: Codes) -> None:
    teacher = sharing_copy(prepared.model, prepared.architecture, AWAY)
    student = Student(teacher, prepared.architecture, codes)
    assert {weight.device for weight in student.weights.values()} == {AWAY}
    assert all(weight.device == torch.device("cpu") for weight in prepared.model.parameters())
    tokens = torch.from_numpy(tokens_of(prepared)[None]).to(AWAY)
    places = torch.arange(1, tokens.shape[1], 2)
    recompute(student.layers[:1])
    with _OneDevice(), AWAY:
        expected = logits_at(teacher, tokens, places).softmax(-1)
        nn.functional.cross_entropy(logits_at(student.model, tokens, places)[0], expected[0]).backward()
    assert all(weight.grad is not None and weight.grad.device == AWAY for weight in student.weights.values())


CODES = KvPca(rank=8), KvHdc(bits=8)
PACKED = KvPca(rank=8), KvHdc(bits=2, window=16)
FAMILIES = [(family, CODES) for family in ("llama", "qwen3", "gpt_neox", "opt", "phi3")]


@pytest.mark.parametrize(("family", "methods"), [*FAMILIES, ("gemma2", (KvQuant(),)), ("llama", PACKED)])
@pytest.mark.usefixtures("shapes_alone")
def test_codes_of_every_family_are_where_the_weights_are(
    tiny_model: Callable[[str], Path], family: str, methods: tuple[Method, ...]
) -> None:
    prepared = open_prepared(tiny_model(family), recipe_of(methods))
    check_step(prepared, prepared.codes(decide(prepared.recipe, prepared.spec, prepared.statistics)))


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
@pytest.mark.usefixtures("shapes_alone")
def test_every_kind_of_layer_is_where_the_weights_are(tiny_llama: Path, kind: str) -> None:
    prepared = open_prepared(tiny_llama, recipe_of())
    check_step(prepared, prepared.codes(Plan(layers=(LayerPlan(layer=0), CACHES[kind]))))


def test_device_is_the_gpu_where_torch_sees_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for sees, kind in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda sees=sees: sees)
        assert training_device().type == kind
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5, 9))
    assert free_bytes(training_device()) == 5
    assert free_bytes(torch.device("cpu")) == pytest.approx(usable_memory(), rel=0.2)


def test_gpu_that_is_too_small_leaves_the_cpu() -> None:
    with pytest.raises(UsageError, match="memory of the GPU") as error, within_memory():
        raise torch.OutOfMemoryError
    assert "CUDA_VISIBLE_DEVICES" in error.value.fix
