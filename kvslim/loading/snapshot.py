"""A model's files on disk, and what each kind of them gives: a config, tensors, a tokenizer."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kvslim.demo import MODEL_DIR
from kvslim.loading.origin import read_card

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from kvslim.weights.rows import QuantisedRows


class Unread(Protocol):
    """A stored tensor that is read from its file when it is indexed with `...`, as transformers does."""

    def __getitem__(self, index: Any, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class Snapshot(ABC):
    """A model's files.

    Attributes:
        path: The folder, or the file that holds everything.
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

    @property
    def repository(self) -> str | None:
        """The hub's id of the repository; None for a model that is on disk."""
        if self.is_demo or Path(self.model).expanduser().exists():
            return None
        return self.model.partition(":")[0]

    def about(self) -> dict[str, Any]:
        """What the model says of itself, by the hub's names, such as its `license`."""
        return read_card(self.path)

    @property
    @abstractmethod
    def config_file(self) -> Path:
        """The file that tells the model's shape, for errors."""

    @property
    @abstractmethod
    def stored_bytes(self) -> int:
        """Bytes of the weights, if each took two."""

    @abstractmethod
    def files(self) -> list[Path]:
        """The files that the model is made of: config, weights and tokenizer."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The config of the language model in transformers' terms; no weights are read.

        Raises:
            NotFoundError: There is none.
            ModelError: It cannot be read.
            UnsupportedError: It describes what KVSlim does not know.
        """

    def check_codes(self) -> None:  # noqa: B027 (most weights are no codes)
        """Refuses weights that are codes which cannot be read; configs and headers tell.

        Raises:
            UnsupportedError: Naming the scheme or the types.
        """

    @abstractmethod
    def check(self) -> None:
        """Fails early if the weights cannot be loaded; none are read.

        Raises:
            NotFoundError: There are no weights.
            ModelError: They are incomplete.
            UnsupportedError: They are stored in a way that KVSlim cannot read.
        """

    @abstractmethod
    def tensors(self) -> Mapping[str, Unread]:
        """The weights, by the names that transformers stores them under."""

    @abstractmethod
    def generation_config(self) -> GenerationConfig | None:
        """End tokens and sampling; None if the config alone says so."""

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer with its chat template."""

    def adapted(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with what these files change in its weights."""
        return model

    @property
    def block_types(self) -> tuple[str, ...]:
        """Types of the blocks of integers that matrices are stored in, what most numbers have first."""
        return ()

    @property
    def has_blocks(self) -> bool:
        """Whether some matrix is stored in blocks of integers."""
        return bool(self.block_types)

    @property
    def bytes_per_number(self) -> float:
        """Bytes that a number of a matrix takes where the graph holds the blocks of the files; no weights are read."""
        raise NotImplementedError("a snapshot without blocks")

    def stored_rows(self) -> QuantisedRows:
        """The matrices that are stored in blocks which the graph can hold."""
        raise NotImplementedError("a snapshot without blocks")

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over the names and bytes of config, weights and tokenizer; it reads all of them, once."""
        digest = hashlib.sha256()
        for path in self.files():
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()
