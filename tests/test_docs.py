"""The docs say what the code says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from numbers_of_a_model import SPEC, statistics_of
from tiny_decoders import CONFIGS

from kvslim.checks import check_plan
from kvslim.cli import app
from kvslim.devices.profile import shipped_devices
from kvslim.errors import KvslimError, UsageError
from kvslim.load.architecture import ARCHITECTURES
from kvslim.load.encoders import ENCODERS
from kvslim.methods import METHODS
from kvslim.methods.fitting import fit
from kvslim.types import LayerPlan, Plan

ROOT = Path(__file__).parent.parent
WORK = (
    *(f"kvslim.pipeline.{name}" for name in ("compress", "plan", "analyze", "validate", "bench")),
    "kvslim.cli.comparing.read_artifacts",
    "kvslim.cli.doctor.measured",
    "kvslim.cli.generating.generate",
    "kvslim.cli.inspect.inspect",
    "kvslim.export.manifest.verify",
    "kvslim.validate.tasks.evaluate",
)
ARGUMENTS = {"MODEL": "demo", "$MODEL": "demo", "ARTIFACT": "artifacts", "$RECIPE": "recipe.yaml"}
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


def commands() -> list[str]:
    """Every `kvslim` command in a code block, without its comment."""
    blocks = (block for page in PAGES for block in re.findall(r"```\w*\n(.*?)```", page.read_text(), re.DOTALL))
    lines = (part for block in blocks for line in block.replace("\\\n", " ").splitlines() for part in line.split(";"))
    found = (re.sub(r"\s+[#>].*", "", line).strip() for line in lines)
    return sorted({command for command in found if re.match(r"kvslim [a-z]", command)})


class ReachedError(KvslimError):
    """The command line was taken, and what it asks for was called."""

    exit_code = 77


@pytest.mark.parametrize("command", commands())
def test_command_of_the_docs_is_taken(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options, recipes and budgets are read as they would be; what takes long is replaced."""

    def reached(*_: object, **__: object) -> None:
        raise ReachedError("reached", where="here", fix="none")

    for name in WORK:
        monkeypatch.setattr(name, reached)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "recipe.yaml").write_text("methods: [kv_quant]\n")
    (tmp_path / "this.yaml").write_text(shipped_devices()["laptop-8gb"].read_text())
    (tmp_path / "plan.json").write_text(Plan(layers=(LayerPlan(layer=0),)).model_dump_json())
    arguments = [ARGUMENTS.get(part, part) for part in shlex.split(command)[1:]]
    assert app.run(arguments) in {0, ReachedError.exit_code}, capsys.readouterr().err
    capsys.readouterr()


def test_errors_of_troubleshooting_are_real() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    source = "".join(path.read_text() for path in (ROOT / "kvslim").rglob("*.py"))
    quoted = [words for words in re.findall(r"\*\*`(.+?)`\*\*", page) if words != "1e-3"]
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
    assert [plan.layers[at].rank for at in (0, -1)] == [16, 8]
    assert [codes[at].key_encoder.shape[2] for at in (0, -1)] == [16, 8]
    with pytest.raises(UsageError, match="rank 12"):
        space["KvTaper"](first=12, last=8).check(SPEC)
