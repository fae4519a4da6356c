"""Safetensors that hold no weights of a model as it computes, told from names and shapes, each with what helps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvslim.errors import ModelError, UnsupportedError, one_line
from kvslim.loading.adapter import MERGE
from kvslim.loading.files import FETCH, POINTER

CODES_FIX = (
    "put the quantization_config back; if its scheme is not read, give the checkpoint that this one was made from"
)
# What training wraps a model in, the name it puts in front of the weights, and where the model is then.
WRAPPERS = {
    "_orig_mod": ("torch.compile", "model._orig_mod"),
    "module": ("DataParallel or DeepSpeed", "model.module"),
    "_fsdp_wrapped_module": ("FSDP", "the unwrapped model, with its full state dict"),
    "_checkpoint_wrapped_module": ("activation checkpointing", "the unwrapped model"),
    "_forward_module": ("Lightning", "the unwrapped model"),
    "pretrained_model": ("TRL's value head", "model.pretrained_model"),
}
ADAPTED = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|base_layer|modules_to_save)\.|^base_model\.model\.")
SEEING = re.compile(r"^(model\.)?(language_model|vision_tower|vision_model|visual|multi_modal_projector)\.")
CODES = {
    "GPTQ or AWQ": re.compile(r"\.(qweight|qzeros|g_idx)$"),
    "bitsandbytes": re.compile(r"\.(absmax|quant_map|nested_absmax|SCB|quant_state\.\w+)$"),
    "MXFP4": re.compile(r"_(blocks|scales)$"),
    "MLX": re.compile(r"\.biases$"),
    "HQQ": re.compile(r"\.W_q$"),
    "AQLM": re.compile(r"\.codebooks$"),
    "EXL2": re.compile(r"\.q_(weight|scale|groups)$"),
    "FP8 or int8": re.compile(r"\.weight_scale(_inv)?$"),
    "compressed-tensors": re.compile(r"\.weight_packed$"),
}
WHOLE_NUMBERS = re.compile(r"^(U|I)\d+$|^BOOL$")


def open_tensors(files: Sequence[Path]) -> dict[str, Any]:
    """Slices of all tensors by name; only headers are read.

    Raises:
        ModelError: A file is not, or not all of, a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Any] = {}
    for path in files:
        try:
            file = safe_open(path, framework="pt", backend="pread")
        except SafetensorError as error:
            message = f"cannot read the weights: {one_line(error)}"
            raise unreadable(path, message, "download the file again") from error
        found |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return found


def check_stored(stored: Mapping[str, Any], is_quantised: bool, is_multimodal: bool, where: str) -> None:
    """Refuses weights that training tools or quantisers left in a form of their own.

    Args:
        stored: Slices by name.
        is_quantised: Whether config.json tells how codes are read.
        is_multimodal: Whether it is that of a model that also sees.
        where: The model's files.

    Raises:
        ModelError: The weights must be saved in another way.
        UnsupportedError: They are codes that config.json does not tell of.
    """
    error = _empty(stored) or _wrapped(stored)
    if error is None and not is_multimodal and (name := next(filter(SEEING.match, stored), None)):
        fix = "use the config.json that was saved with them, which has a text_config"
        error = f"{name!r} is of a model that also sees, and config.json of one that only reads", fix
    if error is not None:
        raise ModelError(error[0], where=where, fix=error[1])
    if not is_quantised:
        _refuse_codes(stored, where)


def _empty(stored: Mapping[str, Any]) -> tuple[str, str] | None:
    empty = [name for name, tensor in stored.items() if 0 in tensor.get_shape()]
    if not empty:
        return None
    fix = "gather them: run zero_to_fp32.py of the checkpoint, or save with stage3_gather_16bit_weights_on_model_save"
    return f"{len(empty)} tensors are empty, first {empty[0]!r}, as DeepSpeed ZeRO-3 leaves its parts", fix


def _wrapped(stored: Mapping[str, Any]) -> tuple[str, str] | None:
    if name := next(filter(ADAPTED.search, stored), None):
        return f"{name!r} is part of an adapter that is not merged", MERGE
    for wrapper, (tool, inner) in WRAPPERS.items():
        if name := next((name for name in stored if wrapper in name.split(".")[:-1]), None):
            return f"{name!r} is the name of a weight inside {tool}", f"save {inner}, with save_pretrained"
    return None


def _refuse_codes(stored: Mapping[str, Any], where: str) -> None:
    for name, tensor in stored.items():
        method = next((method for method, names in CODES.items() if names.search(name)), None)
        if method or (name.endswith("weight") and _is_whole(tensor)):
            codes = f"codes of {method}" if method else "whole numbers"
            message = f"{name!r} holds {codes}, and config.json has no quantization_config"
            raise UnsupportedError(message, where=where, fix=CODES_FIX)


def _is_whole(tensor: Any) -> bool:
    return WHOLE_NUMBERS.match(tensor.get_dtype()) is not None


def unreadable(path: Path, message: str, fix: str) -> ModelError:
    """The error about a file of weights that cannot be read; about Git LFS, where that has not fetched it."""
    with path.open("rb") as file:
        start = file.read(len(POINTER))
    if start == POINTER:
        return ModelError("this is a pointer of Git LFS in place of the weights", where=str(path), fix=FETCH)
    return ModelError(message, where=str(path), fix=fix)
