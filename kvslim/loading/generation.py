"""generation_config.json: end tokens and sampling, checked by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvslim.errors import ModelError, one_line
from kvslim.loading.config import FIX, TOKENS, number_fault, wrong_value

if TYPE_CHECKING:
    from transformers import GenerationConfig

FILE = "generation_config.json"
SWITCH = "do_sample"


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The generation config of a folder; None without one.

    Raises:
        ModelError: It is not JSON, or a value cannot be.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{FILE} is not JSON: {error}", where=str(path), fix=FIX) from error
    if not isinstance(found, dict):
        raise ModelError(f"{FILE} is not an object", where=str(path), fix=FIX)
    return generation_config(found, str(path))


def generation_config(values: Mapping[str, Any], where: str) -> GenerationConfig:
    """Values as transformers' class; a negative token id says that there is no such token.

    Args:
        values: The values by transformers' names.
        where: Their file, for errors.

    Raises:
        ModelError: Naming the value that cannot be.
    """
    from transformers import GenerationConfig

    tokens = {key: _tokens(key, values.get(key), where) for key in TOKENS}
    for key, value in values.items():
        if fault := number_fault(key, value) or _switch_fault(key, value):
            raise wrong_value(key, value, fault, where)
    try:
        return GenerationConfig(**{**values, **tokens})
    except Exception as error:  # transformers raises several types
        raise ModelError(f"{FILE} is broken: {one_line(error)}", where=where, fix=FIX) from error


def _switch_fault(key: str, value: Any) -> str | None:
    return "this is neither true nor false" if key == SWITCH and not isinstance(value, bool | None) else None


def _tokens(key: str, value: Any, where: str) -> Any:
    """A token id, or a list of end tokens, without negative ones."""
    listed = value if isinstance(value, list) and key == "eos_token_id" else [value]
    if value is not None and not all(isinstance(token, int) and not isinstance(token, bool) for token in listed):
        raise wrong_value(key, value, "a token id is a whole number", where)
    kept = [token for token in listed if token is not None and token >= 0]
    return (kept or None) if isinstance(value, list) else next(iter(kept), None)
