"""Quantised checkpoints: read as the numbers that their codes stand for, or refused by name before weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_codes import BLOCK, Encoded, fp8_blocks, fp8_whole, int4_groups, int8_rows, write_codes

from kvslim.cli import app
from kvslim.errors import UnsupportedError
from kvslim.loading.model import load_model
from kvslim.loading.source import read_spec, resolve


def compressed(kind: str, **weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": {"weights": weights}}}


@pytest.mark.parametrize(
    ("quantization", "encode"),
    [
        ({"quant_method": "fp8", "weight_block_size": BLOCK}, fp8_blocks),
        ({"quant_method": "fp8", "weight_block_size": None}, fp8_whole),
        (compressed("int-quantized", num_bits=8), int8_rows),
        (compressed("pack-quantized", num_bits=4, group_size=16), int4_groups),
    ],
)
def test_codes_are_read_as_what_they_stand_for(
    tiny_llama: Path, tmp_path: Path, quantization: dict[str, Any], encode: Any
) -> None:
    expected = write_codes(tiny_llama, tmp_path / "model", quantization, encode)
    snapshot = resolve(str(tmp_path / "model"))
    snapshot.check()
    assert read_spec(snapshot) == read_spec(resolve(str(tiny_llama)))
    found = load_model(snapshot).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def plain(weight: torch.Tensor) -> Encoded:
    return {"weight": weight}, weight


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"gptq \(4 bits\)"),
        ({"quant_method": "awq", "bits": 4}, r"awq \(4 bits\)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"bitsandbytes \(4 bits\)"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        (compressed("nvfp4-pack-quantized", num_bits=4), r"compressed-tensors \(nvfp4-pack-quantized\)"),
        (compressed("pack-quantized", num_bits=3), r"compressed-tensors \(pack-quantized\)"),
        (compressed("pack-quantized", num_bits=4, actorder="group"), "compressed-tensors"),
    ],
)
def test_scheme_that_cannot_be_read_is_refused_by_name_but_inspected(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quantization: dict[str, Any], name: str
) -> None:
    write_codes(tiny_llama, tmp_path / "model", quantization, plain)
    with pytest.raises(UnsupportedError, match=f"quantised by {name}") as error:
        resolve(str(tmp_path / "model")).check()
    assert "the checkpoint that this one was made from" in error.value.fix
    assert error.value.exit_code == 4
    assert app.run(["inspect", str(tmp_path / "model"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["max_context"] == 2048
    assert found["refusal"] == f"{error.value.message}; {error.value.fix}"
    assert app.run(["inspect", str(tmp_path / "model")]) == 0
    assert f"compress refuses it: {found['refusal']}" in capsys.readouterr().err


def test_memory_holds_one_matrix_of_codes_at_a_time(tiny_llama: Path, tmp_path: Path) -> None:
    quantization = {"quant_method": "fp8", "weight_block_size": BLOCK}
    write_codes(tiny_llama, tmp_path / "model", quantization, fp8_blocks)
    unread = resolve(str(tmp_path / "model")).tensors()
    assert not any(isinstance(tensor, torch.Tensor) for tensor in unread.values())
