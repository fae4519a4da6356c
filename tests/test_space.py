"""Disks that are too small are seen before anything is written, whatever will lie on them."""

from __future__ import annotations

import tempfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from support.models import recipe_of

from kvslim import checks, pipeline
from kvslim.errors import OutputError
from kvslim.export.space import check_space
from kvslim.recipe import Recipe


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every disk has a hundred bytes."""
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(100))


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("needed", [(101, 0), (0, 101), (60, 41)])
def test_disk_is_asked_for_all_that_will_lie_on_it(tmp_path: Path, needed: tuple[int, int]) -> None:
    first, second = tmp_path / "out", tmp_path / "a" / "b"
    with pytest.raises(OutputError, match="not enough space"):
        check_space({first: needed[0], second: needed[1]})
    check_space({first: 60, second: 40})


@pytest.mark.usefixtures("free")
def test_disks_are_asked_each_for_its_own(tmp_path: Path) -> None:
    check_space({tmp_path / "out": 60, Path("/proc"): 60})
    with pytest.raises(OutputError) as error:
        check_space({tmp_path / "out": 60, Path("/proc/none/below"): 160})
    assert error.value.where == "/proc"


@pytest.mark.parametrize("run", [pipeline.plan, pipeline.analyze, lambda *to: pipeline.compress(*to, Path("out"))])
def test_temporary_graphs_are_asked_for_where_weights_are_quantised(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Callable[[str, Recipe], object]
) -> None:
    asked: list[int] = []

    def check(needed_bytes: dict[Path, int]) -> None:
        asked.append(needed_bytes[Path(tempfile.gettempdir())])
        raise OutputError("full", where="here", fix="free some space")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "check_space", check)
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 400)
    for weights, source in (("fp32", str(text)), ("fp32", "self"), ("int4", str(text))):
        recipe = recipe_of(weights=weights)
        parts = {
            name: getattr(recipe, name).model_copy(update={"source": source}) for name in ("calibration", "validation")
        }
        with pytest.raises(OutputError, match="full"):
            run(str(tiny_llama), recipe.model_copy(update=parts))
    assert asked[0] == 0
    assert min(asked[1:]) > 2 * (tiny_llama / "model.safetensors").stat().st_size  # it writes text through a graph
