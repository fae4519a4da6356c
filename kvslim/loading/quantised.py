"""Weights stored as codes with scales: they become float32, one matrix at a time, or are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvslim.errors import UnsupportedError
from kvslim.loading.snapshot import Unread

if TYPE_CHECKING:
    import torch

SCALED = ("fp8", "fbgemm_fp8")
# Formats of compressed-tensors whose codes are numbers (float8, int8); `dense` has none.
SCALED_FORMATS = ("dense", "naive-quantized", "float-quantized", "int-quantized")
PACKED_FORMAT = "pack-quantized"
SCALES = ("weight_scale_inv", "weight_scale")  # despite its name, codes are multiplied with the first too
PARTS = (*SCALES, "weight_zero_point", "weight_shape")  # what `Scaled` reads beside the codes
# How inputs and caches were rounded where the checkpoint ran; here they are not.
ROUNDED_AT_RUN_TIME = ("input_scale", "input_scale_ub", "activation_scale", "input_zero_point", "k_scale", "v_scale")


def check_scheme(quantization: Mapping[str, Any], where: str) -> None:
    """Refuses codes that `dequantised` cannot read.

    Args:
        quantization: `quantization_config` of config.json; empty for a model that is not quantised.
        where: Where it stands.

    Raises:
        UnsupportedError: The scheme is not known; the message names it.
    """
    if not quantization or quantization.get("quant_method") in SCALED or not _strange_formats(quantization):
        return
    raise UnsupportedError(
        f"weights quantised by {_name(quantization)} cannot be read",
        where=where,
        fix="give the checkpoint that this one was made from (its model card names it), or a GGUF of the same model; "
        "KVSlim reads fp8 and compressed-tensors with float8 or integer weights",
    )


def dequantised(stored: dict[str, Any], quantization: Mapping[str, Any]) -> dict[str, Unread]:
    """The tensors with codes and scales joined; all others as they are, also scales that belong to no codes.

    Args:
        stored: Slices of safetensors by name.
        quantization: `quantization_config` of config.json, which `check_scheme` let pass.
    """
    if not quantization:
        return stored
    block = quantization.get("weight_block_size")
    found: dict[str, Unread] = {}
    for name, tensor in stored.items():
        base, _, last = name.rpartition(".")
        scale = next((stored[f"{base}.{kind}"] for kind in SCALES if f"{base}.{kind}" in stored), None)
        if last == "weight_packed":
            bits, zeros = _bits(quantization), stored.get(f"{base}.weight_zero_point")
            codes = Packed(tensor, stored[f"{base}.weight_shape"], bits)
            found[f"{base}.weight"] = Scaled(codes, scale, None if zeros is None else PackedZeros(zeros, bits))
        elif last == "weight" and scale is not None:
            found[name] = Scaled(tensor, scale, stored.get(f"{base}.weight_zero_point"), block)
        elif last not in ROUNDED_AT_RUN_TIME and not (last in PARTS and _has_codes(base, scale, stored)):
            found[name] = tensor
    return found


def _has_codes(base: str, scale: Any, stored: Mapping[str, Any]) -> bool:
    """Whether there are codes that a scale and what lies beside it were read with."""
    return scale is not None and (f"{base}.weight" in stored or f"{base}.weight_packed" in stored)


@dataclass(frozen=True)
class Scaled:
    """(codes - zeros) * scales.

    Attributes:
        codes: [rows, columns] numbers.
        scales: One for all, or one for each block of rows and columns.
        zeros: What codes are counted from, in the shape of the scales; None for 0.
        block: Rows and columns of a block; None if the blocks divide the matrix evenly.
    """

    codes: Unread
    scales: Any
    zeros: Any = None
    block: list[int] | None = None

    def __getitem__(self, index: Any, /) -> torch.Tensor:
        """The matrix in float32."""
        codes = self.codes[...].float()
        if self.zeros is not None:
            codes -= self._spread(self.zeros[...].float(), codes)
        return codes.mul_(self._spread(self.scales[...].float(), codes))

    def _spread(self, values: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """One value for each code, or fewer that broadcast."""
        if values.ndim < 2:
            return values.reshape(-1, 1) if values.numel() == len(codes) else values
        for axis, (own, all_) in enumerate(zip(values.shape, codes.shape, strict=True)):
            if own > 1:
                size = self.block[axis] if self.block else -(-all_ // own)
                values = values.repeat_interleave(size, axis).narrow(axis, 0, all_)
        return values


@dataclass(frozen=True)
class Packed:
    """Signed integers of a few bits, packed into int32 along the columns by compressed-tensors, lowest bits first."""

    words: Any
    shape: Any
    bits: int

    def __getitem__(self, index: Any, /) -> torch.Tensor:
        """[rows, columns] integers."""
        rows, columns = self.shape[...].tolist()
        return _unpacked(self.words[...], self.bits)[:rows, :columns]


@dataclass(frozen=True)
class PackedZeros:
    """Zero points of `Packed`, which are packed along the rows."""

    words: Any
    bits: int

    def __getitem__(self, index: Any, /) -> torch.Tensor:
        """[rows, groups] integers."""
        return _unpacked(self.words[...].T, self.bits).T


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, words * 32 / bits] signed integers, which are stored with half their range added."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (words[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(-2) - 2 ** (bits - 1)


def _strange_formats(quantization: Mapping[str, Any]) -> list[str]:
    """The formats that cannot be read; all of them if the scheme is not that of compressed-tensors."""
    if quantization.get("quant_method") != "compressed-tensors":
        return [_name(quantization)]
    groups = _groups(quantization)
    if any((group.get("weights") or {}).get("actorder") == "group" for group in groups):
        return ["columns out of order"]
    formats = [group.get("format") or quantization.get("format") or "dense" for group in groups]
    readable = SCALED_FORMATS if _bits(quantization) not in {4, 8} else (*SCALED_FORMATS, PACKED_FORMAT)
    return [name for name in formats if name not in readable]


def _groups(quantization: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups of weights of compressed-tensors."""
    return list((quantization.get("config_groups") or {}).values())


def _bits(quantization: Mapping[str, Any]) -> int:
    """Bits of a weight; 0 if groups of weights have different ones."""
    found = {(group.get("weights") or {}).get("num_bits", 0) for group in _groups(quantization)}
    return found.pop() if len(found) == 1 else 0


def _name(quantization: Mapping[str, Any]) -> str:
    method = quantization.get("quant_method", "a scheme without a name")
    known = [quantization.get("format"), quantization.get("bits") and f"{quantization['bits']} bits"]
    if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        known.append("4 bits" if quantization.get("load_in_4bit") else "8 bits")
    details = ", ".join(part for part in known if part)
    return f"{method} ({details})" if details else method
