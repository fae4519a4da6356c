"""The pages of the documentation, and the code in them."""

from __future__ import annotations

import re

from support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(kind: str) -> list[str]:
    """Code blocks of a kind, on all pages."""
    return [block for page in PAGES for block in re.findall(rf"```{kind}\n(.*?)```", page.read_text(), re.DOTALL)]
