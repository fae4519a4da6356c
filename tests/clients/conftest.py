"""The artifacts and their reference: what our own runtime says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from clients.kinds import KINDS, OTHER_LAYOUT, make_artifact

ArtifactOf = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def artifact(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> ArtifactOf:
    """The artifact of a model (`demo`, or a family of which a tiny random one is made) and a kind, made once."""
    made: dict[tuple[str, str], Path] = {}

    def folder_of(model: str, kind: str) -> Path:
        if (model, kind) not in made:
            folder = tmp_path_factory.mktemp(model) / "artifact"
            source = model if model == "demo" else str(tiny_model(model))
            made[model, kind] = make_artifact(source, {**KINDS, **OTHER_LAYOUT}[kind], folder)
        return made[model, kind]

    return folder_of
