"""A GGUF file, as llama.cpp reads it: config, weights, tokenizer and chat template in one."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvslim.errors import KvslimError, ModelError, UnsupportedError, one_line
from kvslim.loading.config import model_config
from kvslim.loading.generation import generation_config
from kvslim.loading.gguf_blocks import bytes_in_graph, is_in_blocks, stored_rows
from kvslim.loading.gguf_config import GGUF_ARCHITECTURES, ROPE_TENSORS, Restore, gguf_config
from kvslim.loading.origin import of_gguf
from kvslim.loading.snapshot import Snapshot, Unread
from kvslim.loading.stored import unreadable

if TYPE_CHECKING:
    import torch
    from gguf import ReaderTensor
    from transformers import GenerationConfig
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from kvslim.weights.rows import QuantisedRows

TOKENIZERS = ("gpt2", "llama")  # byte-level and SentencePiece merges
ENDS = ("eos", "eot", "eom")
# What mmap, struct and numpy say of a file that lacks its end.
CUT_OFF = ("cannot mmap an empty file", "unpack_from requires a buffer", "cannot reshape array")
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


class GgufSnapshot(Snapshot):
    """A model in one GGUF file."""

    @property
    def config_file(self) -> Path:
        """The file itself."""
        return self.path

    @property
    def stored_bytes(self) -> int:
        """Two bytes for each weight."""
        return 2 * sum(int(tensor.n_elements) for tensor in self._tensors)

    def about(self) -> dict[str, Any]:
        """What the metadata says."""
        return of_gguf(self._header[0])

    def files(self) -> list[Path]:
        """The file alone."""
        return [self.path]

    def config(self) -> dict[str, Any]:
        """The config that the metadata describes; only tensors of RoPE are read."""
        return copy.deepcopy(self._config)

    @cached_property
    def _config(self) -> dict[str, Any]:
        metadata, names = self._header
        self._check_architecture()
        try:
            return gguf_config(metadata, names, self._rope_factors())
        except KvslimError:
            raise
        except Exception as error:  # transformers' config classes raise many exception types
            lack = f"it has no {error}" if isinstance(error, KeyError) else one_line(error)
            raise self._broken(f"its metadata describes no model: {lack}") from error

    def check_codes(self) -> None:
        """Refuses types of tensors that cannot be read."""
        types = {tensor.tensor_type for tensor in self._tensors}
        if strange := sorted(kind.name for kind in types if not _is_readable(kind)):
            raise UnsupportedError(
                f"tensors of type {', '.join(strange)} cannot be read",
                where=str(self.path),
                fix="give the file of another quantisation, such as Q4_K_M, Q8_0, F16 or BF16",
            )

    def check(self) -> None:
        """Fails early if the file is incomplete, or has tensors of a type that cannot be read."""
        kind = self._header[0].get("tokenizer.ggml.model")
        if kind not in TOKENIZERS:
            raise UnsupportedError(
                f"tokenizers of kind {kind!r} are not supported",
                where=f"{self.path}: tokenizer.ggml.model",
                fix="give the safetensors that the file was made from, with their tokenizer.json",
            )
        self.check_codes()

    def tensors(self) -> Mapping[str, Unread]:
        """The weights by transformers' names, each dequantised when it is read.

        Raises:
            UnsupportedError: A tensor has no place in the model that the metadata describes.
        """
        config, tensors = self.config(), self._tensors
        del self._tensors  # the file stays mapped into memory no longer than the caller needs it
        names = _names_in_model(config, str(self.path))
        if strange := [one.name for one in tensors if one.name not in names and one.name not in ROPE_TENSORS]:
            raise UnsupportedError(
                f"the model has no place for tensor {strange[0]!r}",
                where=str(self.path),
                fix="give the safetensors that the file was made from",
            )
        restore = GGUF_ARCHITECTURES[self._header[0]["general.architecture"]].restore
        stored = {one.name: one for one in tensors if one.name in names}
        return {names[name]: Dequantised(tensor, restore, config) for name, tensor in stored.items()}

    @property
    def block_types(self) -> tuple[str, ...]:
        """By ggml's names, what most numbers have first."""
        numbers = Counter[str]()
        for tensor in self._tensors:
            if is_in_blocks(tensor):
                numbers[tensor.tensor_type.name] += int(tensor.n_elements)
        return tuple(name for name, _ in numbers.most_common())

    @property
    def bytes_per_number(self) -> float:
        """The mean over all matrices."""
        matrices = [tensor for tensor in self._tensors if len(tensor.shape) == 2]
        return sum(map(bytes_in_graph, matrices)) / sum(int(tensor.n_elements) for tensor in matrices)

    def stored_rows(self) -> QuantisedRows:
        """The matrices that are stored in blocks which the graph can hold."""
        rows = stored_rows(self._tensors)
        del self._tensors
        return rows

    def generation_config(self) -> GenerationConfig:
        """End tokens, of texts and of turns, and what the file says of sampling."""
        metadata, config = self._header[0], self.config()
        found = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ENDS)
        ends = list(dict.fromkeys(token for token in found if token is not None))
        sampling = {
            to: metadata[f"general.sampling.{key}"]
            for key, to in SAMPLING.items()
            if f"general.sampling.{key}" in metadata
        }
        values = {
            "bos_token_id": config.get("bos_token_id"),
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            "pad_token_id": config.get("pad_token_id"),
            **({"do_sample": True, **sampling} if sampling else {}),
        }
        return generation_config(values, str(self.path))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the file describes, with its chat template."""
        from transformers import PreTrainedTokenizerFast
        from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

        # from_pretrained would prefer a tokenizer.json beside the file, which may be of another model.
        architecture, tokens, settings = get_gguf_tokenizer(str(self.path))
        backend, _ = convert_gguf_tokenizer(architecture, tokens)
        return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)

    @cached_property
    def _header(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The metadata, with lists of strings as their length, and the names of the tensors."""
        from transformers.integrations.gguf import read_gguf_metadata

        if _is_big_endian(self.path):
            raise UnsupportedError(
                "this GGUF file is big-endian",
                where=str(self.path),
                fix="give the little-endian file, or turn a copy into one: gguf-convert-endian COPY.gguf little",
            )
        try:
            metadata, names = read_gguf_metadata(str(self.path))
        except Exception as error:  # the reader unpacks bytes as it finds them
            raise self._broken(_reason(error)) from error
        if metadata.get("split.count", 1) > 1:
            raise UnsupportedError(
                "this is one part of a model in several files",
                where=str(self.path),
                fix="join them with llama.cpp: llama-gguf-split --merge FIRST_PART OUT.gguf",
            )
        return metadata, names

    @cached_property
    def _tensors(self) -> tuple[ReaderTensor, ...]:
        """All tensors, mapped into memory and not yet read."""
        from gguf import GGUFReader

        try:
            return tuple(GGUFReader(self.path).tensors)
        except Exception as error:  # numpy's errors of a file that ends too early, among others
            raise self._broken(_reason(error)) from error

    def _check_architecture(self) -> None:
        metadata = self._header[0]
        if (kind := metadata.get("general.type", "model")) != "model":
            fix = "give the model's own file; an adapter must be merged into it first (llama-export-lora)"
            raise UnsupportedError(f"this GGUF file holds no model but {kind!r}", where=str(self.path), fix=fix)
        name = metadata.get("general.architecture")
        if name not in GGUF_ARCHITECTURES:
            raise UnsupportedError(
                f"GGUF files of architecture {name!r} are not supported",
                where=f"{self.path}: general.architecture",
                fix=f"supported: {', '.join(GGUF_ARCHITECTURES)}; or give the safetensors that the file was made from",
            )

    def _rope_factors(self) -> dict[str, Any]:
        from gguf import dequantize

        if not set(self._header[1]) & set(ROPE_TENSORS):
            return {}
        return {one.name: dequantize(one.data, one.tensor_type) for one in self._tensors if one.name in ROPE_TENSORS}

    def _broken(self, reason: str) -> ModelError:
        fix = "download the file again, or give the safetensors that it was made from"
        return unreadable(self.path, f"the GGUF file cannot be read: {reason}", fix)


@dataclass(frozen=True)
class Dequantised:
    """A tensor of a GGUF in float32, in the form that transformers stores it in."""

    stored: ReaderTensor
    restore: Restore
    config: Mapping[str, Any]

    def __getitem__(self, index: Any, /) -> torch.Tensor:
        """The tensor, in memory of its own."""
        import numpy as np
        import torch
        from gguf import dequantize

        values = dequantize(self.stored.data, self.stored.tensor_type)
        restored = self.restore(self.stored.name, values, self.config)
        # Float32 needs no conversion, so these may still be pages of the file.
        return torch.from_numpy(np.array(restored, np.float32, order="C"))


def _names_in_model(config: dict[str, Any], where: str) -> dict[str, str]:
    """transformers' name of each tensor that the model could have in a GGUF."""
    import torch
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(config, where), trust_remote_code=False)
    name = next(name for name, row in GGUF_ARCHITECTURES.items() if row.family == config["model_type"])
    architecture = next(key for key, value in MODEL_ARCH_NAMES.items() if value == name)
    known = get_tensor_name_map(architecture, model.config.num_hidden_layers)
    found = {known.get_name(own, try_suffixes=(".weight", ".bias")): own for own in model.state_dict()}
    return {theirs: own for theirs, own in found.items() if theirs is not None}


def _is_readable(kind: Any) -> bool:
    """Whether the gguf package can dequantise a type of tensors."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, dequantize

    plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    block = np.zeros(1, plain) if plain else np.zeros(GGML_QUANT_SIZES[kind][1], np.uint8)
    try:
        dequantize(block, kind)
    except NotImplementedError:
        return False
    return True


def _is_big_endian(path: Path) -> bool:
    """Whether the version, a small number behind the four letters, has its bytes in the order of such machines."""
    with path.open("rb") as file:
        version = file.read(8)[4:]
    return version[:2] == b"\0\0" and version[2:] > b"\0\0"


def _reason(error: Exception) -> str:
    found = one_line(error) or type(error).__name__
    return "it ends too early" if found.startswith(CUT_OFF) else found
