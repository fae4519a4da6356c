"""A batch that is padded as docs/clients.md says, in plain onnxruntime, for every kind of artifact."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.padding import alone, printed

from clients.conftest import ArtifactOf
from clients.kinds import KINDS


@pytest.mark.clients
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_kind_give_what_they_give_alone(
    artifact: ArtifactOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    folder = artifact("llama", kind)
    assert printed(folder, tmp_path / "batch.py", monkeypatch, capsys) == alone(folder)
