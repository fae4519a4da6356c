"""Finds the folder of the model that the user named and reads its config.json, before any weights are read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvslim.contract import ModelSpec
from kvslim.demo import MODEL_DIR
from kvslim.errors import ModelError, NotFoundError, UnsupportedError
from kvslim.loading.architecture import architecture_of
from kvslim.loading.encoders import ENCODERS, encoder_spec

STATIC_ROPE = {"default", "linear", "llama3", "longrope", "yarn"}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Snapshot:
    """A model's files on disk.

    Attributes:
        path: The folder.
        model: What the user typed, without the revision.
        revision: The hub revision, if any.
    """

    path: Path
    model: str
    revision: str | None = None

    @property
    def is_demo(self) -> bool:
        """Whether this is the model that comes with KVSlim."""
        return self.path == MODEL_DIR

    def sha256(self) -> str:
        """SHA-256 over the names and bytes of config, weights and tokenizer."""
        digest = hashlib.sha256()
        for path in sorted(self.path.glob("*.json")) + sorted(self.path.glob("*.safetensors")):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def resolve(model: str) -> Snapshot:
    """The local files of `demo`, a folder, a hub id or `id@revision`; only a hub id touches the network.

    Raises:
        NotFoundError: No such folder, no such model on the hub, or the hub cannot be reached.
    """
    if model == "demo":
        return Snapshot(MODEL_DIR, model)
    path = Path(model).expanduser()
    if path.is_dir():
        return Snapshot(path.resolve(), model)
    looks_local = path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1
    if looks_local or path.exists():
        raise NotFoundError(
            f"{model!r} is not a model folder", where="MODEL", fix="give `demo`, a folder with config.json, or a hub id"
        )
    return _download(*_split_revision(model))


def _split_revision(model: str) -> tuple[str, str | None]:
    name, _, revision = model.partition("@")
    return name, revision or None


def _download(model: str, revision: str | None) -> Snapshot:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = snapshot_download(
            model, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.model", "merges.txt"]
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotFoundError(
            f"cannot get {model!r} from the hub: {reason}",
            where="MODEL",
            fix="check the id and the network, or give a local folder",
        ) from error
    return Snapshot(Path(path), model, revision)


def read_config(snapshot: Snapshot) -> dict[str, Any]:
    """The model's config.json.

    Raises:
        NotFoundError: The folder has none.
        ModelError: It is not JSON or names no model type.
    """
    path = snapshot.path / "config.json"
    if not path.is_file():
        raise NotFoundError("no config.json", where=str(snapshot.path), fix="give a Hugging Face model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"config.json is not JSON: {error}", where=str(path), fix="download the model again"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError("config.json names no model_type", where=str(path), fix="give a Hugging Face model's config")
    return config


def read_spec(snapshot: Snapshot, context: int | None = None) -> ModelSpec:
    """The model's shape, from config.json alone.

    LongRoPE (Ding et al., 2024) rotates all positions faster in texts up to the original context than in longer ones.
    A cache can serve only one of the two, and `context` decides which.

    Args:
        snapshot: The model's files.
        context: The target context in tokens; None for the model's own.

    Raises:
        NotFoundError: The folder has no config.json.
        ModelError: The config is broken or contradicts itself.
        UnsupportedError: The family or its RoPE scaling is not supported.
    """
    raw, where = read_config(snapshot), str(snapshot.path / "config.json")
    if raw["model_type"] in ENCODERS:
        return encoder_spec(raw, where)
    _refuse_experts(raw, where)
    architecture_of(raw["model_type"])
    from optimum.utils import NormalizedTextConfig
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(**raw)
        spec = _spec(config, NormalizedTextConfig(config), context or 0)
    except Exception as error:  # transformers' config classes raise many exception types
        reason = " ".join(str(error).split())
        raise ModelError(f"config.json is broken: {reason}", where=where, fix="download the model again") from error
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
    sizes = (names.hidden_size, names.num_layers, head_dim, kv_heads, config.vocab_size, _max_context(config, context))
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
        max_context=_max_context(config, context),
        windows=_windows(config, names.num_layers),
    )


def _max_context(config: Any, context: int) -> int:
    rope = _ropes(config)[0]
    original = rope.get("original_max_position_embeddings", 0)
    if rope.get("rope_type") == "longrope" and context <= original:
        return int(original)
    return int(config.max_position_embeddings)


def _windows(config: Any, layers: int) -> tuple[int | None, ...]:
    """The window of each layer; None if the window holds the whole context."""
    window = getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings or not getattr(config, "use_sliding_window", True):
        return (None,) * layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The RoPE parameters of a config: one set, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def _refuse_experts(raw: dict[str, Any], where: str) -> None:
    if any(raw.get(key) for key in EXPERTS):
        raise UnsupportedError(
            f"{raw['model_type']!r} is a mixture of experts, which KVSlim does not support",
            where=where,
            fix="use a dense model",
        )


def _refuse_unsupported(config: Any, where: str) -> None:
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedError(
            "bidirectional attention is not supported in this family", where=where, fix="use a causal model"
        )
    for rope in _ropes(config):
        kind = rope.get("rope_type", "default")
        if kind not in STATIC_ROPE:
            raise UnsupportedError(
                f"RoPE scaling {kind!r} changes its frequencies with the length of the text",
                where=where,
                fix=f"supported: {', '.join(sorted(STATIC_ROPE))}",
            )


def check_weights(snapshot: Snapshot) -> None:
    """Fails early if the folder has no safetensors weights. Pickled weights are never loaded: they can run code.

    Raises:
        NotFoundError: No weights.
        ModelError: Their index is broken, or names a file that is not there.
    """
    if not any((snapshot.path / name).is_file() for name in WEIGHT_FILES):
        raise NotFoundError(
            "no model.safetensors", where=str(snapshot.path), fix="save the model with safetensors (save_pretrained)"
        )
    weight_files(snapshot)


def weight_files(snapshot: Snapshot) -> list[Path]:
    """The files that hold the model's weights: one, or the shards that an index names.

    Raises:
        ModelError: The index is broken, points outside the folder, or names a file that is not there.
    """
    whole, index = (snapshot.path / name for name in WEIGHT_FILES)
    if whole.is_file():
        return [whole]
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ModelError("the index names no shards", where=str(index), fix="download the model again") from error
    known = {path.name for path in snapshot.path.glob("*.safetensors")}
    if strange := [name for name in shards if name not in known]:
        message = f"the index names {strange[0]!r}, which is not a .safetensors file in the folder"
        raise ModelError(message, where=str(index), fix="download the model again")
    return [snapshot.path / name for name in shards]
