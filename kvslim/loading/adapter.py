"""A LoRA folder (Hu et al., 2022): its matrices are added to the weights of its base model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvslim.errors import ModelError, NotFoundError, UnsupportedError
from kvslim.loading.config import model_config
from kvslim.loading.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TOKENIZER, model_files
from kvslim.loading.snapshot import Snapshot, Unread
from kvslim.loading.tokenizer import folder_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

STARTS_AT_ZERO = re.compile(r"\.lora_(B|embedding_A)\b")
MERGE = "merge it where it was trained (merge_and_unload of peft) and save the result with save_pretrained"


@dataclass(frozen=True)
class AdapterSnapshot(Snapshot):
    """An adapter, and the model that it was trained on.

    Attributes:
        base: The model.
    """

    base: Snapshot = field(kw_only=True)

    @property
    def config_file(self) -> Path:
        """The base model's."""
        return self.base.config_file

    @property
    def stored_bytes(self) -> int:
        """The base model's: merging adds no weights."""
        return self.base.stored_bytes

    def about(self) -> dict[str, Any]:
        """What the base model says: most of the weights are its own, and so is their licence."""
        return {**self.base.about(), "base_model": self.base.repository}

    def files(self) -> list[Path]:
        """The adapter's files, and the base model's."""
        return model_files(self.path) + self.base.files()

    def config(self) -> dict[str, Any]:
        """The base model's config."""
        return self.base.config()

    def check_codes(self) -> None:
        """Refuses those of the base model."""
        self.base.check_codes()

    def check(self) -> None:
        """Fails early if this is no LoRA, or peft is not installed."""
        kind = read_adapter_config(self.path).get("peft_type")
        if kind != "LORA":
            raise UnsupportedError(f"adapters of type {kind!r} cannot be merged", where=str(self.path), fix=MERGE)
        if not (self.path / ADAPTER_WEIGHTS).is_file():
            raise NotFoundError(f"no {ADAPTER_WEIGHTS}", where=str(self.path), fix="save the adapter with safetensors")
        if find_spec("peft") is None:
            fix = f"pip install 'kvslim[lora]', or {MERGE}"
            raise UnsupportedError("merging a LoRA needs the package peft", where=str(self.path), fix=fix)
        self.base.check()

    def tensors(self) -> Mapping[str, Unread]:
        """The base model's weights."""
        return self.base.tensors()

    def generation_config(self) -> GenerationConfig | None:
        """The base model's."""
        return self.base.generation_config()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The adapter's own tokenizer if it has one, such as one with another chat template; else the base model's."""
        if not (self.path / TOKENIZER).is_file():
            return self.base.tokenizer()
        return folder_tokenizer(self.path, config=model_config(self.config(), str(self.config_file)))

    def adapted(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with the adapter merged into its weights, one matrix after the other.

        Raises:
            ModelError: The adapter cannot be read, or does not fit its base.
        """
        try:
            return self._merged(model)
        except ModelError:
            raise
        except Exception as error:  # peft, safetensors and torch each raise their own exception types
            text = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            # torch tells in a first line that weights do not fit, and from the second on which.
            reason = " ".join(map(str.strip, text.strip().splitlines()[:2])) or type(error).__name__
            fix = f"set base_model_name_or_path to the model that it was trained on, or {MERGE}"
            raise ModelError(f"cannot merge the adapter: {reason}", where=str(self.path), fix=fix) from error

    def _merged(self, model: PreTrainedModel) -> PreTrainedModel:
        from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
        from safetensors.torch import load_file

        config = PeftConfig.from_pretrained(str(self.path))
        config.base_model_name_or_path = None  # else peft warns that the model in memory has no name
        wrapped = get_peft_model(model, config)
        matrices = load_file(self.path / ADAPTER_WEIGHTS)
        self._check_trained(matrices)
        result = set_peft_model_state_dict(wrapped, matrices)
        if result.unexpected_keys:
            raise ValueError(f"the adapter changes {result.unexpected_keys[0]!r}, which its base model does not have")
        merged: PreTrainedModel = wrapped.merge_and_unload()
        return merged

    def _check_trained(self, matrices: Mapping[str, torch.Tensor]) -> None:
        """Refuses an adapter whose matrices are as they are before training: one of each pair is zero."""
        started = [matrix for name, matrix in matrices.items() if STARTS_AT_ZERO.search(name)]
        if started and not any(matrix.any() for matrix in started):
            message = f"nobody trained this adapter: {len(started)} of its matrices are all zero, so it changes nothing"
            raise ModelError(message, where=str(self.path), fix="save it after training, or give its base model alone")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def base_of(folder: Path) -> str:
    """The model that an adapter was trained on: a folder, as it is or from the adapter's, or a hub id and revision.

    Raises:
        ModelError: The adapter's config is broken, or names none.
    """
    config = read_adapter_config(folder)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        fix = "set base_model_name_or_path to the folder or the hub id of the model"
        raise ModelError(f"{ADAPTER_CONFIG} names no base model", where=str(folder), fix=fix)
    for path in (folder / base, Path(base).expanduser()):
        if path.is_dir():
            return str(path)
    return f"{base}@{config['revision']}" if config.get("revision") else base


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json.

    Raises:
        ModelError: It is not a JSON object.
    """
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} is not JSON: {error}", where=str(path), fix="download it again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path.name} is not an object", where=str(path), fix="download it again")
    return config
