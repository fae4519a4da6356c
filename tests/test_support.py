"""Where tests keep what they share."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(path for path in TESTS.rglob("*.py"))


def _imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import)]
    modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {*modules, *(alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_file_imports_no_other_test_file(path: Path) -> None:
    assert [name for name in _imported(path) if name.split(".")[-1].startswith("test_")] == []
