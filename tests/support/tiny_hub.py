"""A hub on disk: what is asked of it is filtered as the real client does, and noted."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

COMMIT = "0123abcd"


@dataclass
class TinyHub:
    """Repositories as folders, and what was downloaded of each.

    Attributes:
        root: The folder that holds the repositories, by id.
        cache: Where downloads go.
        fetched: Names of downloaded files, by repository.
        revisions: What was asked for, in order.
    """

    root: Path
    cache: Path
    fetched: dict[str, set[str]] = field(default_factory=dict)
    revisions: list[tuple[str, str | None]] = field(default_factory=list)

    def snapshot_download(
        self,
        repo_id: str,
        *,
        revision: str | None,
        allow_patterns: Sequence[str],
        ignore_patterns: Sequence[str],
    ) -> str:
        """Stands in for `huggingface_hub.snapshot_download`."""
        from huggingface_hub.utils import filter_repo_objects

        self.revisions.append((repo_id, revision))
        source, target = self.root / repo_id, self.cache / repo_id.replace("/", "--") / COMMIT
        names = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
        target.mkdir(parents=True, exist_ok=True)
        for name in filter_repo_objects(
            names, allow_patterns=list(allow_patterns), ignore_patterns=list(ignore_patterns)
        ):
            self.fetched.setdefault(repo_id, set()).add(name)
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
        return str(target)


def install(root: Path, monkeypatch: pytest.MonkeyPatch) -> TinyHub:
    """Puts a hub with no repositories in place of the real one."""
    hub = TinyHub(root / "hub", root / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    return hub
