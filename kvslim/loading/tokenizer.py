"""The one place that reads a tokenizer from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvslim.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def folder_tokenizer(folder: Path, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. Code that came with a model is not run, and nobody is asked whether it should be.

    Args:
        folder: Folder with the tokenizer's files.
        options: Further arguments of `AutoTokenizer.from_pretrained`.

    Raises:
        UnsupportedError: The tokenizer is code that came with the model.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):  # transformers has no exception type for this
            raise
        raise UnsupportedError(
            "the tokenizer is Python code that came with the model, and KVSlim runs none",
            where=str(folder / "tokenizer_config.json"),
            fix="if tokenizer.json does all of its work, remove auto_map here and in config.json",
        ) from error
