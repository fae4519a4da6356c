"""The rules that keep the pipeline free of special cases, checked on the source itself."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from support.models import recipe_of
from support.paths import ROOT

from kvslim import pipeline
from kvslim.contract import ModelSpec
from kvslim.loading.source import read_spec, resolve
from kvslim.methods import METHODS, Method
from kvslim.planning.decide import planned
from kvslim.prepared.base import prepare
from kvslim.progress import Silent
from kvslim.types import Plan

if TYPE_CHECKING:
    from kvslim.prepared.trials import Trials

PIPELINE = Path(pipeline.__file__)
SOURCES = sorted(PIPELINE.parent.rglob("*.py"))
CLASSES = {kind.__name__: Path(*kind.__module__.split(".")) for kind in METHODS.values()}


def names_in(tree: ast.AST) -> Iterator[str]:
    """Every identifier, and every part of an imported module's path."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg) or (isinstance(node, ast.keyword) and node.arg is not None):
            yield node.arg
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "").split(".")
            yield from (alias.name for alias in node.names)


def asked_for(tree: ast.AST) -> Iterator[str]:
    """The classes that `isinstance` and `issubclass` are called with."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"isinstance", "issubclass"}:
            yield from names_in(node.args[1])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PIPELINE.parent)))
def test_no_module_asks_for_the_class_of_a_method_of_another(path: Path) -> None:
    own = {name for name, module in CLASSES.items() if path.with_suffix("").match(str(module))}
    assert not (set(asked_for(ast.parse(path.read_text()))) & set(CLASSES)) - own


def test_pipeline_is_short_and_knows_no_kind_of_model_and_no_method() -> None:
    text = PIPELINE.read_text()
    assert len(text.splitlines()) < 200
    names = set(names_in(ast.parse(text)))
    assert not {name for name in names if "encoder" in name.lower() or "decoder" in name.lower()}
    assert not names & {*METHODS, *CLASSES, *(module.name for module in CLASSES.values())}


def test_wheel_has_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES}
    assert sorted(listed) == sorted({*found, "kvslim.recipes"})


def test_no_two_modules_are_called_graph() -> None:
    assert [path.parent.name for path in SOURCES if path.name == "graph.py"] == ["export"]


@pytest.fixture
def halved() -> Iterator[type[Method]]:
    """A method that halves the rank of the layer that loses least by it; known to the registry for one test."""

    class Halved(Method):
        name: ClassVar[str] = "halved"
        summary: ClassVar[str] = "half the rank in the layer that loses least by it"
        order: ClassVar[int] = 9
        layer: int | None = None

        def resolve(self, trials: Trials) -> Method:
            losses = {layer: trials.divergence(Halved(layer=layer)) for layer in range(trials.spec.layers)}
            return Halved(layer=min(losses, key=losses.__getitem__))

        def decide(self, spec: ModelSpec, statistics: Any, plan: Plan) -> Plan:
            layers = (
                layer.with_cache(rank=spec.head_dim // 2) if layer.layer == self.layer else layer
                for layer in plan.layers
            )
            return plan.model_copy(update={"layers": tuple(layers)})

        def apply(self, spec: ModelSpec, statistics: Any, plan: Plan, edits: Any) -> Any:
            return edits

    yield Halved
    del METHODS["halved"]


def test_method_resolves_itself_by_trials_of_the_model(halved: type[Method], tiny_model: Callable[[str], Path]) -> None:
    recipe = recipe_of([halved()]).model_copy(update={"compensate": False})
    snapshot = resolve(str(tiny_model("llama")))
    prepared = prepare(snapshot, read_spec(snapshot), recipe, Silent())
    trials = prepared.trials()
    losses = [trials.divergence(halved.model_validate({"layer": layer})) for layer in range(2)]
    least = losses.index(min(losses))
    summary = planned(prepared)
    assert [getattr(layer.cache, "rank", None) for layer in summary.plan.layers] == [
        8 if layer == least else None for layer in range(2)
    ]
    assert pipeline.plan(str(tiny_model("llama")), recipe) == summary
    assert 0 < summary.kl == losses[least] < max(losses)
