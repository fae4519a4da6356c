"""YAML files, read in one way for recipes, sweeps and devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kvslim.errors import UsageError, one_line

YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)  # of text that is no YAML, or no UTF-8


def read_yaml(path: Path) -> Any:
    """What a file holds, as plain data.

    Raises:
        UsageError: It is not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except YAML_ERRORS as error:
        raise UsageError(one_line(error), where=str(path), fix="correct the YAML syntax") from error
