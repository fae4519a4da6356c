"""Programs reach the exporter without being traced again, unless they hold what it cannot translate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from support.models import export_slim, open_prepared, recipe_of
from support.tiny_decoders import save_decoder
from torch import Tensor, nn
from torch.onnx._internal.exporter import _fx_passes

from kvslim.export.lowering import convert_types, quick_lowering
from kvslim.export.quiet import quiet
from kvslim.methods import method_class

DECOMPOSED, PROMOTED = "decompose_with_registry", "insert_type_promotion_nodes"


class Converting(nn.Module):
    """Converts to the type that is there, to another one and back; outputs are conversions too."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        same = x.to(torch.float32).detach()
        mixed = (same.to(torch.int32) + 1).to(torch.float32) * same
        return mixed, mixed.to(torch.int8), (mixed + 1).to(torch.float32)


class Uncommon(nn.Module):
    """Has operators that the exporter knows by their parts alone, one of which changes what it is given."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (((x > 0) | (x < -1)).float().add_(torch.eye(3)),)


class Mixed(nn.Module):
    """Operators on two types of tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        whole = (x * 2).to(torch.int32)
        return x * whole, whole - 1, whole.to(torch.int8) + whole, whole / 2


class Sized(nn.Module):
    """A number of rows, which is an int64, beside an int32."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x.to(torch.int32) + x.shape[0],)


class Nested(nn.Module):
    """Holds programs of its own, whose operators need to be looked at too."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (torch.cond(x.sum() > 0, lambda y: (y > 0) | (y < -1), lambda y: y < 0, (x,)),)


class Plain(nn.Module):
    """What a Python number multiplies or is taken from keeps its type."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x * 2 - 1, x.to(torch.int32) - 3, x > 1, x.to(torch.int64) + x.shape[0]


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each time that a program is run again."""
    runs: list[str] = []

    def noting(name: str) -> Callable[..., Any]:
        whole = getattr(_fx_passes, name)
        return lambda *arguments: runs.append(name) or whole(*arguments)

    for name in (DECOMPOSED, PROMOTED):
        monkeypatch.setattr(_fx_passes, name, noting(name))
    return runs


@pytest.mark.parametrize(
    ("module", "again"),
    [
        (Converting(), []),
        (Plain(), []),
        (Mixed(), [PROMOTED]),
        (Sized(), [PROMOTED]),
        (Uncommon(), [DECOMPOSED]),
        (Nested(), [DECOMPOSED, PROMOTED]),
    ],
)
def test_program_is_run_again_only_where_it_must_be(
    module: nn.Module, again: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, x = _counted(monkeypatch), torch.tensor([[1.5, -2.5, 3.0], [0.0, -0.5, 2.0], [4.0, 5.5, -6.0]])
    with quiet(), quick_lowering(), torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        exported = torch.onnx.export(program, verbose=False)
    assert exported is not None
    exported.save(tmp_path / "model.onnx")
    for found, expected in zip(
        ort.InferenceSession(tmp_path / "model.onnx").run(None, {"x": x.numpy()}), module(x), strict=True
    ):
        np.testing.assert_array_equal(found, expected.numpy())
    assert runs == again


def test_conversions_to_the_type_that_is_there_go() -> None:
    program = torch.export.export(Converting(), (torch.ones(3),))
    convert_types(program)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("aten._to_copy.default") == 3
    assert not [target for target in targets if target.startswith(("aten.to.", "aten.detach", "aten._assert"))]


@pytest.mark.parametrize(
    "methods",
    [
        ({"kv_pca": {}}, {"kv_hdc": {"bits": 4, "granularity": "per_channel"}}),
        ({"kv_window": {"window": 16}}, {"kv_quant": {"bits": 4}}),
        ({"kv_hdc": {"bits": 3, "window": 16}},),
    ],
    ids=["int4", "window", "codes"],
)
def test_program_of_no_kind_of_cache_is_run_again(
    methods: tuple[dict[str, dict[str, Any]], ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = _counted(monkeypatch)
    made = [method_class(name, "test").model_validate(options) for entry in methods for name, options in entry.items()]
    export_slim(open_prepared(save_decoder("llama", tmp_path / "model"), recipe_of(made)), tmp_path / "out")
    assert runs == []
