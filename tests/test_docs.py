"""The docs say what the code says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.docs import PAGES, blocks
from support.numbers_of_a_model import SPEC, statistics_of
from support.paths import ROOT
from support.tiny_decoders import CONFIGS

from benchmarks.registry import load
from kvslim.checks import check_plan
from kvslim.devices.profile import load_device
from kvslim.errors import UsageError
from kvslim.loading.architecture import ARCHITECTURES
from kvslim.loading.encoders import ENCODERS
from kvslim.methods import METHODS
from kvslim.methods.fitting import fit
from kvslim.recipe import load_recipe
from kvslim.types import Plan


@pytest.mark.parametrize(
    ("tool", "page"), [("recipe_reference", "recipes"), ("tolerances", "report"), ("json_schemas", "ci")]
)
def test_reference_is_what_the_types_say(tool: str, page: str) -> None:
    command = [sys.executable, f"tools/{tool}.py"]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert table in (ROOT / "docs" / f"{page}.md").read_text()


def test_every_family_is_named() -> None:
    page = (ROOT / "docs" / "families.md").read_text()
    known, tested = page.split("<!-- table: python -m benchmarks families -->")
    assert [kind for kind in (*ARCHITECTURES, *ENCODERS) if f"`{kind}`" not in known] == []
    assert [kind for kind in ARCHITECTURES if f"`{kind}`" not in tested] == []
    assert set(ARCHITECTURES) == {config.get("model_type", name) for name, config in CONFIGS.items()}


def test_readme_is_short_and_names_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 120
    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in readme] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_were_written_by_their_commands(page: Path) -> None:
    for command, table in re.findall(r"<!-- table: (.+?) -->\n(.*?)<!-- end -->", page.read_text(), re.DOTALL):
        assert _is_there(*command.split()[1:])
        assert table.count("\n|") > 2, f"run `python tools/write_tables.py`: no table for {command!r}"


def _is_there(tool: str, module: str = "", benchmark: str = "", *_: str) -> bool:
    """Whether `tools/FILE` or `-m benchmarks NAME` can be run."""
    return benchmark in load() if (tool, module) == ("-m", "benchmarks") else (ROOT / tool).is_file()


def recipes() -> list[str]:
    """Every recipe of the docs, and one more for each alternative that a comment in it gives."""
    found = []
    for block in blocks("yaml"):
        if "methods:" not in block:
            continue
        found.append(block)
        first = re.findall(r"- (\w+)", block)[0]
        for comment in re.findall(r"# or (.*)", block):
            for method, options in re.findall(r"(?:(\w+): )?(\{.*?\})(?=[:,\s]|$)", comment):
                found.append(f"methods: [{method or first}: {options}]")
    return found


@pytest.mark.parametrize("recipe", recipes())
def test_recipe_of_the_docs_is_read(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert load_recipe(str(tmp_path / "recipe.yaml")).methods


def test_profile_of_the_docs_is_read(tmp_path: Path) -> None:
    (profile,) = [block for block in blocks("yaml") if "ram_gib" in block]
    (tmp_path / "board.yaml").write_text(profile)
    assert load_device(str(tmp_path / "board.yaml")).name == "my board"


def test_errors_of_troubleshooting_are_real() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    source = "".join(path.read_text() for path in (ROOT / "kvslim").rglob("*.py"))
    quoted = re.findall(r"\*\*`(.+?)`\*\*", page)
    assert len(quoted) >= 10
    assert [words for words in quoted if words not in source] == []


def test_method_of_the_docs_works() -> None:
    page = (ROOT / "docs" / "adding_a_method.md").read_text()
    space: dict[str, Any] = {"__name__": "kv_taper"}
    try:
        exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], space)
        method = METHODS["kv_taper"].model_validate({"first": 16, "last": 8})
        method.check(SPEC)
        plan = method.decide(SPEC, statistics_of(SPEC), Plan.identity(SPEC))
        codes = fit(SPEC, statistics_of(SPEC), plan)
    finally:
        METHODS.pop("kv_taper", None)
    check_plan(plan, SPEC)
    assert [plan.layers[at].cache.rank for at in (0, -1)] == [16, 8]
    assert [codes[at].code.key_encoder.shape[2] for at in (0, -1)] == [16, 8]
    with pytest.raises(UsageError, match="rank 12"):
        space["KvTaper"](first=12, last=8).check(SPEC)
