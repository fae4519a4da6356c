"""Writes a tiny model's folder with weights as codes, in the forms of the hub's quantised checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Encoded = tuple[dict[str, torch.Tensor], torch.Tensor]
BLOCK = [24, 40]


def write_codes(
    folder: Path, out: Path, quantization: dict[str, Any], encode: Callable[[torch.Tensor], Encoded]
) -> dict[str, torch.Tensor]:
    """Copies a folder with its projections encoded; returns all weights as they should be read again.

    Args:
        folder: A model as `save_decoder` writes it.
        out: The folder to be.
        quantization: `quantization_config` of its config.json.
        encode: From a matrix to what is stored, by the end of its name, and to the values that this stands for.
    """
    shutil.copytree(folder, out)
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    stored, expected = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            parts, expected[name] = encode(weight)
            stored |= {name.removesuffix("weight") + part: tensor.contiguous() for part, tensor in parts.items()}
        else:
            stored[name] = expected[name] = weight
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    return expected


def fp8_blocks(weight: torch.Tensor) -> Encoded:
    """Float8 with a scale for each block of `BLOCK`, the last of which are cut off."""
    rows, columns = weight.shape
    scales = torch.rand(-(-rows // BLOCK[0]), -(-columns // BLOCK[1])) + 0.5
    spread = torch.empty_like(weight)
    for row in range(rows):
        for column in range(columns):
            spread[row, column] = scales[row // BLOCK[0], column // BLOCK[1]]
    codes = (weight / spread).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * spread


def fp8_whole(weight: torch.Tensor) -> Encoded:
    """Float8 with one scale for the matrix."""
    codes = (weight / 0.25).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": torch.tensor(0.25)}, codes.float() * 0.25


def int8_rows(weight: torch.Tensor) -> Encoded:
    """Int8 with a scale for each row."""
    scales = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scales).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales


def int4_groups(weight: torch.Tensor, group: int = 16) -> Encoded:
    """Int4 with scales and zero points for groups of 16 columns, packed as compressed-tensors does."""
    groups = weight.reshape(len(weight), -1, group)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = (high - low) / 15
    zeros = (-8 - low / scales).round().clamp(-8, 7)
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(-8, 7)
    values = ((codes - zeros[..., None]) * scales[..., None]).reshape(weight.shape)
    parts = {
        "weight_packed": packed(codes.reshape(weight.shape).int()),
        "weight_scale": scales,
        "weight_zero_point": packed(zeros.int().T).T,
        "weight_shape": torch.tensor(weight.shape),
    }
    return parts, values


def packed(codes: torch.Tensor) -> torch.Tensor:
    """Signed four-bit numbers, eight in an int32, the first in the lowest bits."""
    words = []
    for row in (codes + 8).tolist():
        row += [0] * (-len(row) % 8)
        numbers = [sum(row[start + place] << 4 * place for place in range(8)) for start in range(0, len(row), 8)]
        words.append([number - 2**32 if number >= 2**31 else number for number in numbers])
    return torch.tensor(words, dtype=torch.int32)
