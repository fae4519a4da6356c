"""A folder as `save_pretrained` writes it: config.json, safetensors and tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvslim.errors import ModelError, NotFoundError
from kvslim.loading.config import model_config
from kvslim.loading.files import CONFIG, has_weights, model_files, weight_files
from kvslim.loading.generation import read_generation_config
from kvslim.loading.multimodal import is_multimodal, language_config, language_tensors
from kvslim.loading.places import no_weights
from kvslim.loading.quantised import check_scheme, dequantised
from kvslim.loading.snapshot import Snapshot, Unread
from kvslim.loading.stored import check_stored, open_tensors
from kvslim.loading.tokenizer import folder_tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


class FolderSnapshot(Snapshot):
    """A model in a folder."""

    @property
    def config_file(self) -> Path:
        """config.json."""
        return self.path / CONFIG

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight files, doubled if they are quantised: most of those store eight bits for a number."""
        stored = sum(path.stat().st_size for path in weight_files(self.path))
        return 2 * stored if self._quantization() else stored

    def files(self) -> list[Path]:
        """Configs, weights and tokenizer; other formats of the weights do not count."""
        return model_files(self.path)

    def config(self) -> dict[str, Any]:
        """config.json, or the part of it that is about the language model."""
        raw = self._read()
        raw.pop("quantization_config", None)
        return language_config(raw, str(self.config_file)) if is_multimodal(raw) else raw

    def check_codes(self) -> None:
        """Refuses quantisation schemes that are not known."""
        check_scheme(self._quantization(), f"{self.config_file}: quantization_config")

    def check(self) -> None:
        """Fails early without safetensors, if they hold codes that cannot be read, or a value of a config cannot be.

        Pickled weights are never loaded: they can run code.
        """
        if not has_weights(self.path):
            raise no_weights(self.path)
        self.check_codes()
        self.generation_config()
        check_stored(self._stored(), bool(self._quantization()), is_multimodal(self._read()), str(self.path))

    def tensors(self) -> Mapping[str, Unread]:
        """All stored tensors by name; each is read from its file when it is needed.

        transformers would map the files into memory, and the pages it has read would stay until the last tensor is
        converted.
        """
        found = dequantised(self._stored(), self._quantization())
        return language_tensors(found) if is_multimodal(self._read()) else found

    def generation_config(self) -> GenerationConfig | None:
        """generation_config.json (end and padding tokens); without it the model uses its config."""
        return read_generation_config(self.path)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the folder."""
        return folder_tokenizer(self.path, config=model_config(self._read(), str(self.config_file)))

    def _stored(self) -> dict[str, Any]:
        return open_tensors(weight_files(self.path))

    def _quantization(self) -> dict[str, Any]:
        """What config.json says of how the weights are quantised; nothing if they are not."""
        raw = self._read()
        text = raw.get("text_config")
        own = text.get("quantization_config") if isinstance(text, dict) else None
        found = raw.get("quantization_config") or raw.get("compression_config") or own
        return found if isinstance(found, dict) else {"quant_method": str(found)} if found else {}

    def _read(self) -> dict[str, Any]:
        path = self.config_file
        if not path.is_file():
            raise NotFoundError(
                "no config.json",
                where=str(self.path),
                fix="give a Hugging Face model folder or a .gguf file (on the hub: org/name:FILE.gguf)",
            )
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ModelError(
                f"config.json is not JSON: {error}", where=str(path), fix="download the model again"
            ) from error
        if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
            fix = "give a Hugging Face model's config"
            raise ModelError("config.json names no model_type", where=str(path), fix=fix)
        return config
