"""Fixtures that several test files share: tiny random models, and the folder beside the checkout."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.paths import SHARED
from support.tiny_decoders import save_decoder

if TYPE_CHECKING:
    from kvslim.calibrate.statistics import CalibrationStatistics
    from kvslim.prepared.decoder import PreparedDecoder


def pytest_configure() -> None:
    """Commands that tests start can be interrupted, even where a shell runs the tests in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("golden") is None)


COUNTED = {"bad inputs": "test_bad_input_is", "damaged files": "test_damage.py", "crashes": "test_crash.py"}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Counts the tests of what goes wrong, of those that ran."""
    for name, part in COUNTED.items():
        counts = {
            outcome: sum(part in report.nodeid for report in terminalreporter.stats.get(outcome, []))
            for outcome in ("passed", "failed")
        }
        if sum(counts.values()):
            terminalreporter.write_line(f"{name}: {counts['passed']} passed, {counts['failed']} failed")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Statistics go where the tests' other files go, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVSLIM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the checkout, with a trained model and prose."""
    if not SHARED.is_dir():
        if os.environ.get("KVSLIM_REQUIRE_SHARED") == "1":
            pytest.fail("../shared is missing, and KVSLIM_REQUIRE_SHARED=1 asks for it")
        pytest.skip("needs ../shared beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random model of a family: 2 layers, hidden 64, head_dim 16."""
    made: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in made:
            made[family] = save_decoder(family, tmp_path_factory.mktemp("models") / family)
        return made[family]

    return folder_of


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="session", params=("llama", "qwen2", "qwen3", "gpt2"))
def tiny_family(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Path:
    """Each family in turn."""
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def prepared(tiny_llama: Path) -> PreparedDecoder:
    """The tiny Llama opened; test files that look at other models have a fixture of their own by this name."""
    from support.models import open_prepared, recipe_of

    return open_prepared(tiny_llama, recipe_of())


@pytest.fixture(scope="module")
def statistics(prepared: PreparedDecoder) -> CalibrationStatistics:
    """Of the opened model."""
    return prepared.statistics


@pytest.fixture(scope="session")
def demo_artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The demo model's artifact of a shipped recipe, made once; latency is measured as briefly as can be."""
    made: dict[str, Path] = {}

    def folder_of(recipe: str) -> Path:
        from kvslim.pipeline import compress
        from kvslim.recipe import load_recipe

        if recipe not in made:
            made[recipe] = tmp_path_factory.mktemp("demo") / recipe
            brief = (
                "validation.samples=8",
                "validation.recall_items=100",
                "validation.repeats=3",
                "validation.prompts=[16]",
                "validation.contexts=[16]",
                "weights=fp32",
            )
            compress("demo", load_recipe(recipe, brief), made[recipe])
        return made[recipe]

    return folder_of
