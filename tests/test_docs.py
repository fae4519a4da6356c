"""The docs say what the code says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_decoders import CONFIGS

from kvslim.cli import app
from kvslim.load.architecture import ARCHITECTURES
from kvslim.load.encoders import ENCODERS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(
    ("tool", "page"), [("recipe_reference", "recipes"), ("tolerances", "report"), ("json_schemas", "ci")]
)
def test_reference_is_what_the_types_say(tool: str, page: str) -> None:
    command = [sys.executable, f"tools/{tool}.py"]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert table in (ROOT / "docs" / f"{page}.md").read_text()


def test_every_family_is_named() -> None:
    readme, page = (ROOT / "README.md").read_text(), (ROOT / "docs" / "families.md").read_text()
    assert [kind for kind in (*ARCHITECTURES, *ENCODERS) if f"`{kind}`" not in readme] == []
    assert [kind for kind in ARCHITECTURES if f"`{kind}`" not in page] == []
    assert set(ARCHITECTURES) == {config.get("model_type", name) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_were_written_by_their_commands(page: Path) -> None:
    for command, table in re.findall(r"<!-- table: (.+?) -->\n(.*?)<!-- end -->", page.read_text(), re.DOTALL):
        assert (ROOT / command.split()[1]).is_file()
        assert table.count("\n|") > 2, f"run `python tools/write_tables.py`: no table for {command!r}"


def test_commands_of_the_readme_parse(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text()
    verbs = set(re.findall(r"kvslim ([a-z]+)", "\n".join(re.findall(r"```\n(.*?)```", text, re.DOTALL))))
    assert len(verbs) >= 8
    for verb in sorted(verbs):
        assert app.run([verb, "--help"]) == 0
    capsys.readouterr()
