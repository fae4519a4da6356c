"""The one place that reads a tokenizer from a folder."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvslim.errors import ModelError, UnsupportedError, first_line
from kvslim.loading.config import wrong_value
from kvslim.loading.files import FETCH, POINTER, TOKENIZER, VOCABULARIES

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

FILES = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PIECES = "tokenizer.model"
SAVE = "save the tokenizer again with save_pretrained"


def folder_tokenizer(folder: Path, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. Code that came with a model is not run, and nobody is asked whether it should be.

    Args:
        folder: Folder with the tokenizer's files.
        options: Further arguments of `AutoTokenizer.from_pretrained`.

    Raises:
        ModelError: A file is broken, or there is none.
        UnsupportedError: The tokenizer is code that came with the model.
    """
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises several exception types for a missing or broken tokenizer
        if "trust_remote_code" not in str(error):
            raise _broken(folder, error) from error
        raise UnsupportedError(
            "the tokenizer is Python code that came with the model, and KVSlim runs none",
            where=str(folder / "tokenizer_config.json"),
            fix="if tokenizer.json does all of its work, remove auto_map here and in config.json",
        ) from error
    if not isinstance(found.model_max_length, int | float):  # which every call would compare with a length
        raise wrong_value("model_max_length", found.model_max_length, "this is not a number", str(folder / FILES[1]))
    return found


def _broken(folder: Path, error: Exception) -> ModelError:
    """The error about the file at fault, where that can be told."""
    for path in (folder / name for name in FILES):
        if path.is_file() and (found := _fault(path)):
            return ModelError(f"{path.name} {found[0]}", where=str(path), fix=found[1])
    if not (folder / TOKENIZER).is_file():
        return _none(folder, error)
    fix = f"correct its values, or {SAVE}"
    return ModelError(f"cannot load the tokenizer: {first_line(error)}", where=str(folder / FILES[1]), fix=fix)


def _none(folder: Path, error: Exception) -> ModelError:
    """The error about a folder without tokenizer.json, from which transformers could make none either."""
    reason, fix = first_line(error), f"add {TOKENIZER} (save_pretrained of the tokenizer)"
    if not any(next(folder.glob(name), None) for name in VOCABULARIES):
        reason = "there is no vocabulary"
    elif (folder / PIECES).is_file() and find_spec("sentencepiece") is None:
        reason, fix = f"the package sentencepiece, which reads {PIECES}, is not installed", f"pip install it, or {fix}"
    return ModelError(f"no {TOKENIZER}, and none can be made: {reason}", where=str(folder), fix=fix)


def _fault(path: Path) -> tuple[str, str] | None:
    """What is wrong with one of the files, and what helps."""
    import tokenizers

    data, again = path.read_bytes(), f"download it again, or {SAVE}"
    if data.startswith(POINTER):
        return "is a pointer of Git LFS", FETCH
    try:
        is_object = isinstance(json.loads(data), dict)
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {error}", again
    if not is_object:
        return "is not an object", again
    try:
        if path.name == TOKENIZER:
            tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers has no exception type of its own
        reason = f"cannot be read by tokenizers {tokenizers.__version__}: {first_line(error)}"
        return reason, f"if a newer version wrote it, install that; or {again}"
    return None
