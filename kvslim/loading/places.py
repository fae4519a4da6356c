"""Folders and files that people give in place of a model, each with what helps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from kvslim.errors import KvslimError, NotFoundError, UsageError
from kvslim.export.manifest import MANIFEST, read_manifest
from kvslim.loading.files import INDEX, WHOLE

GGUF_START = b"GGUF"
PAGE = re.compile(r"(?:https?://)?(?:huggingface|hf)\.co/([^/?#]+/[^/?#]+)")
SAVE = "save the model with safetensors (save_pretrained)"
EXPORTED = "give the model that it was exported from"
CONVERT = "convert it to the format of transformers, or give the hub repository of that"
# What lies where safetensors should, what that is, and what helps.
OTHER_WEIGHTS = {
    "zero_to_fp32.py": ("the parts of a DeepSpeed checkpoint", "gather them: python zero_to_fp32.py . OUT"),
    "*/*.distcp": ("the parts of an FSDP checkpoint", "merge them (accelerate merge-weights), then save_pretrained"),
    "consolidated*": ("weights in the format of the model's maker", CONVERT),
    "*.nemo": ("a NeMo checkpoint", CONVERT),
    "*.npz": ("an MLX checkpoint", CONVERT),
    "tf_model.h5": ("TensorFlow weights", f"load it with from_tf=True in an older transformers, then {SAVE}"),
    "flax_model*.msgpack": ("Flax weights", f"load it with from_flax=True in an older transformers, then {SAVE}"),
    "openvino_model.xml": ("an OpenVINO export", EXPORTED),
    "*.mlpackage": ("a Core ML export", EXPORTED),
    "*.tflite": ("a LiteRT export", EXPORTED),
    "*.pte": ("an ExecuTorch export", EXPORTED),
    "*-of-*.safetensors": ("shards without their index", f"add {INDEX}, which lies beside them where they come from"),
    "*.safetensors": ("safetensors of another name", f"name the file {WHOLE}, if it holds all weights"),
    "*.onnx": ("an ONNX export", EXPORTED),
    "onnx/*.onnx": ("an ONNX export", EXPORTED),
    "*.bin": ("pickled weights, which can run code", SAVE),
    "*.pt": ("pickled weights, which can run code", SAVE),
    "*.pth": ("pickled weights, which can run code", SAVE),
}
FILES = {
    (".safetensors", ".bin", ".pt", ".pth", ".json", ".model"): "give the folder that holds it, with config.json",
    (".onnx",): EXPORTED,
    (".zip", ".tar", ".gz", ".tgz", ".zst"): "unpack it, and give the folder",
    (".nemo", ".h5", ".msgpack", ".npz", ".ckpt"): CONVERT,
}


def is_gguf(path: Path) -> bool:
    """Whether a file is a GGUF: by its name, or, like those of ollama, by its first bytes alone."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(len(GGUF_START)) == GGUF_START


def refuse_artifact(folder: Path) -> None:
    """Refuses a folder that KVSlim made.

    Raises:
        UsageError: Naming the model that it was made from.
    """
    if not (folder / MANIFEST).is_file():
        return
    try:
        fix = f"give the model it was made from: {read_manifest(folder).source.model}"
    except KvslimError:
        fix = "give the model that it was made from"
    raise UsageError("this is an artifact of KVSlim, not a model", where=str(folder), fix=fix)


def refuse_folder(folder: Path) -> None:
    """Refuses a folder that holds folders of models.

    Raises:
        NotFoundError: Naming one of those inside.
    """
    kind, inside = next(_inside(folder), (None, ""))
    if kind is not None:
        raise NotFoundError(f"this is {kind}, not a model", where=str(folder), fix=f"give {inside}")


def no_weights(folder: Path) -> NotFoundError:
    """The error about a folder without safetensors: what it holds instead."""
    for names, (kind, fix) in OTHER_WEIGHTS.items():
        if next(folder.glob(names), None):
            return NotFoundError(f"no model.safetensors, but {kind}", where=str(folder), fix=fix)
    fix = f"{SAVE}; if it is a GGUF on the hub, name its file: org/name:FILE.gguf"
    return NotFoundError("no model.safetensors", where=str(folder), fix=fix)


def no_model(model: str) -> NotFoundError:
    """The error about a name that is no model."""
    path = Path(model).expanduser()
    fix = "give `demo`, a folder with config.json, a .gguf file, a hub id, or org/name:FILE.gguf"
    if page := PAGE.match(model):
        fix = f"give the hub id: {page[1]}"
    elif path.is_file():
        fix = next((help_ for suffixes, help_ in FILES.items() if path.suffix.lower() in suffixes), fix)
    return NotFoundError(f"{model!r} is not a model folder or a .gguf file", where="MODEL", fix=fix)


def _inside(folder: Path) -> Iterator[tuple[str, str]]:
    """What a folder of folders is, and what to give in its place."""
    if snapshots := _newest(folder / "snapshots", "*"):
        yield "one model of the hub's cache", str(snapshots)
    if cached := _newest(folder, "models--*--*") or _newest(folder / "hub", "models--*--*"):
        yield "the hub's cache", f"a hub id, such as {'/'.join(cached.name.split('--')[1:])}"
    if checkpoint := _newest(folder, "checkpoint-*"):
        yield "a training run", f"one of its checkpoints, such as {checkpoint}"
    if holder := _newest(folder, "*/config.json"):
        yield "a folder with a model inside", str(holder.parent)


def _newest(folder: Path, names: str) -> Path | None:
    """What has such a name and changed last."""
    return max(folder.glob(names), key=lambda path: path.lstat().st_mtime, default=None)
