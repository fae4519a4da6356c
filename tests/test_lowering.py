"""Programs reach the exporter without being traced again, unless they hold what it cannot translate."""

from __future__ import annotations

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


class Nested(nn.Module):
    """Holds programs of its own, whose operators need to be looked at too."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (torch.cond(x.sum() > 0, lambda y: (y > 0) | (y < -1), lambda y: y < 0, (x,)),)


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Notes each program that is decomposed."""
    programs: list[Any] = []
    whole = _fx_passes.decompose_with_registry
    monkeypatch.setattr(
        _fx_passes,
        "decompose_with_registry",
        lambda program, registry: programs.append(program) or whole(program, registry),
    )
    return programs


@pytest.mark.parametrize(("module", "decomposed"), [(Converting(), 0), (Uncommon(), 1), (Nested(), 1)])
def test_program_is_decomposed_only_where_it_must_be(
    module: nn.Module, decomposed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs, x = _counted(monkeypatch), torch.tensor([[1.5, -2.5, 3.0], [0.0, -0.5, 2.0], [4.0, 5.5, -6.0]])
    with quiet(), quick_lowering(), torch.no_grad():
        exported = torch.onnx.export(torch.export.export(module, (x,)), verbose=False)
    assert exported is not None
    exported.save(tmp_path / "model.onnx")
    for found, expected in zip(
        ort.InferenceSession(tmp_path / "model.onnx").run(None, {"x": x.numpy()}), module(x), strict=True
    ):
        np.testing.assert_array_equal(found, expected.numpy())
    assert len(programs) == decomposed


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
def test_no_kind_of_cache_needs_to_be_decomposed(
    methods: tuple[dict[str, dict[str, Any]], ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = _counted(monkeypatch)
    made = [method_class(name, "test").model_validate(options) for entry in methods for name, options in entry.items()]
    export_slim(open_prepared(save_decoder("llama", tmp_path / "model"), recipe_of(made)), tmp_path / "out")
    assert programs == []
