"""Finds the files of the model that the user named and reads its shape, before any weights are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kvslim.contract import ModelSpec
from kvslim.demo import MODEL_DIR
from kvslim.errors import NotFoundError, UnsupportedError, UsageError
from kvslim.loading.adapter import AdapterSnapshot, base_of, is_adapter
from kvslim.loading.architecture import architecture_of
from kvslim.loading.config import broken_config, model_config, wrong_value
from kvslim.loading.encoders import ENCODERS, encoder_spec
from kvslim.loading.files import CONFIG, fetch_configs, fetch_file, fetch_model, has_weights
from kvslim.loading.folder import FolderSnapshot
from kvslim.loading.gguf import GgufSnapshot
from kvslim.loading.kinds import refuse_kind
from kvslim.loading.places import is_gguf, no_model, refuse_artifact, refuse_folder
from kvslim.loading.snapshot import Snapshot
from kvslim.types import Source

HUB_ID = re.compile(r"[^/.~][^/]*/[^/]+$")
STATIC_ROPE = {"default", "linear", "llama3", "longrope", "yarn"}
LENGTH_ROPE = {"dynamic", "ntk"}
VISION = "mmproj"
LATER_PART = re.compile(r".*-(?!00001)\d{5}-of-\d{5}\.gguf$")


def resolve(model: str, *, weights: bool = True) -> Snapshot:
    """The local files of what the user named; only a hub id touches the network.

    Args:
        model: `demo`, a folder, a .gguf file, a hub id or `id:FILE.gguf`, both also with `@revision`.
        weights: Whether more than the shape is wanted; without them, of a hub id only configs are downloaded.

    Raises:
        NotFoundError: No such folder, no such model on the hub, or the hub cannot be reached.
        UsageError: The folder holds several GGUF files, or is an artifact.
        ModelError, UnsupportedError: A LoRA adapter does not say what it was trained on, or that is an adapter too; or
            `read_spec` or `check_codes` refuses a model on the hub, and its weights are not downloaded.
    """
    if model == "demo":
        return FolderSnapshot(MODEL_DIR, model)
    path, name, revision = Path(model).expanduser(), *model.partition("@")[::2]
    repository, _, file = name.partition(":")
    is_id = bool(HUB_ID.match(repository)) and not repository.endswith(".gguf")
    typed = f"./{model}" if is_id else model  # where the path is gone, it shall not be looked for on the hub
    if model and path.is_dir():
        return _opened(path.resolve(), typed, weights=weights)
    if is_gguf(path):
        return GgufSnapshot(path.parent.resolve() / path.name, typed)
    if not is_id or path.exists():
        raise no_model(model)
    if file:
        return GgufSnapshot(fetch_file(repository, file, revision or None), name, revision or None)
    return _from_hub(repository, revision or None, weights)


def _from_hub(repository: str, revision: str | None, weights: bool) -> Snapshot:
    """A model on the hub. Its configs come first: what is not supported costs no gigabytes."""
    folder = fetch_configs(repository, revision)
    if (folder / CONFIG).is_file():
        shape: Snapshot = FolderSnapshot(folder, repository, revision)
    else:
        shape = _opened(folder, repository, revision, weights=False)
    if not weights:
        return shape
    read_spec(shape)
    shape.check_codes()
    return _opened(fetch_model(repository, folder.name), repository, revision)


def _opened(folder: Path, model: str, revision: str | None = None, *, weights: bool = True) -> Snapshot:
    """The model in a folder: an adapter, a GGUF file without safetensors beside it, or else a model."""
    if has_weights(folder):
        return FolderSnapshot(folder, model, revision)
    refuse_artifact(folder)
    if is_adapter(folder):
        return AdapterSnapshot(folder, model, revision, base=_base_model(folder, weights))
    models = [path for path in sorted(folder.glob("*.gguf")) if not path.name.startswith(VISION)]
    files = [path for path in models if not LATER_PART.match(path.name)] or models
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        fix = f"name one of them, such as {model.rstrip('/')}/{files[0].name}"
        raise UsageError(f"the folder holds several GGUF files: {names}", where=str(folder), fix=fix)
    if files:
        return GgufSnapshot(files[0], model, revision)
    if not (folder / CONFIG).exists():
        refuse_folder(folder)
    return FolderSnapshot(folder, model, revision)


def _base_model(folder: Path, weights: bool) -> Snapshot:
    """The model that the adapter in a folder was trained on."""
    name = base_of(folder)
    if Path(name).is_dir() and not has_weights(Path(name)) and is_adapter(Path(name)):
        raise UnsupportedError(
            "the base of this adapter is an adapter", where=str(folder), fix="merge that one into its base first"
        )
    try:
        return resolve(name, weights=weights)
    except NotFoundError as error:
        raise NotFoundError(
            f"the base model of this adapter is not there: {error.message}",
            where=str(folder),
            fix="set base_model_name_or_path in adapter_config.json to its folder, or merge the adapter elsewhere",
        ) from error


def read_spec(snapshot: Snapshot, context: int | None = None) -> ModelSpec:
    """The model's shape, from its config alone.

    LongRoPE (Ding et al., 2024) rotates all positions faster in texts up to the original context than in longer ones.
    A cache can serve only one of the two, and `context` decides which.

    Args:
        snapshot: The model's files.
        context: The target context in tokens; None for the model's own.

    Raises:
        NotFoundError: There is no config.
        ModelError: The config is broken or contradicts itself.
        UnsupportedError: The family or its RoPE scaling is not supported.
    """
    raw, where = snapshot.config(), str(snapshot.config_file)
    if raw["model_type"] in ENCODERS:
        return encoder_spec(raw, where)
    refuse_kind(raw, where)
    architecture_of(raw["model_type"])
    from optimum.utils import NormalizedTextConfig

    config = model_config(raw, where)
    _check_window(config, where)
    try:
        spec = _spec(config, NormalizedTextConfig(config), context or 0)
    except Exception as error:  # values of another type or size than arithmetic can take
        raise broken_config(error, raw, where) from error
    _refuse_unsupported(config, where)
    if spec.q_heads % spec.kv_heads or spec.head_dim % 8:
        raise UnsupportedError(
            f"{spec.q_heads} query heads, {spec.kv_heads} kv heads of {spec.head_dim} do not fit onnxruntime's kernel",
            where=where,
            fix="it needs query heads that are a multiple of kv heads, and a head_dim that is a multiple of 8",
        )
    return spec


def _spec(config: Any, names: Any, context: int) -> ModelSpec:
    q_heads = int(names.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or names.hidden_size // q_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or q_heads
    max_context = _max_context(config, context)
    sizes = (names.hidden_size, names.num_layers, head_dim, kv_heads, config.vocab_size, max_context)
    if min(sizes) < 1:
        raise ValueError("sizes must be positive")
    return ModelSpec(
        model_type=config.model_type,
        layers=names.num_layers,
        hidden_size=names.hidden_size,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        max_context=max_context,
        windows=_windows(config, names.num_layers, max_context),
    )


def _max_context(config: Any, context: int) -> int:
    """The positions of a model; where scaled RoPE was added and their number left as it was, those that it reaches."""
    rope = _ropes(config)[0]
    positions, original = config.max_position_embeddings, rope.get("original_max_position_embeddings", 0)
    if rope.get("rope_type") == "longrope":
        return int(original if context <= original else positions)
    return int(positions if positions > original else max(positions, original * (rope.get("factor") or 1)))


def _windows(config: Any, layers: int, max_context: int) -> tuple[int | None, ...]:
    """The window of each layer; None if the window holds the whole context."""
    window = _window(config)
    if window is None or window >= max_context:
        return (None,) * layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _window(config: Any) -> int | None:
    """The window of layers that have one."""
    window: int | None = getattr(config, "sliding_window", None)
    return window if getattr(config, "use_sliding_window", True) else None


def _check_window(config: Any, where: str) -> None:
    window = _window(config)
    if window is not None and window < 1:
        raise wrong_value("sliding_window", window, "a layer must see one token at least; null is no window", where)
    if window is None and "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise wrong_value("sliding_window", window, "layer_types names layers that have one", where)


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The RoPE parameters of a config: one set, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def _refuse_unsupported(config: Any, where: str) -> None:
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedError(
            "bidirectional attention is not supported in this family", where=where, fix="use a causal model"
        )
    for rope in _ropes(config):
        kind = rope.get("rope_type", "default")
        if str(kind) not in STATIC_ROPE:
            scaled = str(kind) in LENGTH_ROPE
            fault = "changes its frequencies with the length of the text" if scaled else "is not known"
            fix = f"supported: {', '.join(sorted(STATIC_ROPE))}"
            if kind == "dynamic":
                fix += "; with default in its place, texts up to max_position_embeddings are rotated as with dynamic"
            raise UnsupportedError(f"RoPE scaling {kind!r} {fault}", where=where, fix=fix)


def origin(artifact: Path, source: Source, against: str | None) -> Snapshot:
    """The model that an artifact was made from, if it is still the same.

    Args:
        artifact: Its folder.
        source: What its manifest says of the model.
        against: Where the model is now; None for what was typed when the artifact was made.

    Raises:
        NotFoundError: It is not there.
        UsageError: Its files have changed.
    """
    typed = f"{source.model}@{source.revision}" if source.revision else source.model
    where, fix = ("--against" if against else str(artifact)), "give --against MODEL, the model it was made from"
    try:
        snapshot = resolve(against or typed)
    except NotFoundError as error:
        if against:
            raise
        raise NotFoundError(f"the model it came from is not there: {error.message}", where=where, fix=fix) from error
    if snapshot.sha256 != source.sha256:
        raise UsageError(
            f"the artifact was not made from {against or typed!r} as it is now: the files have another SHA-256",
            where=where,
            fix=f"{fix}; if that was trained or saved again, compress it again",
        )
    return snapshot
