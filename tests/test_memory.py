"""The memory that a process may take: what the machine has left, or less where a control group limits it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from kvslim import memory
from kvslim.memory import usable_memory

AVAILABLE, UNLIMITED = 10_000, 2**63 - 4096


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for control groups, on a machine with 10,000 bytes left."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=AVAILABLE))
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "OWN", tmp_path / "own")
    return tmp_path / "groups"


def unified(group: Path, limit: str, used: int, files: int = 0) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {files // 2}\nactive_file {files - files // 2}\n")


def first(group: Path, limit: int, used: int, files: int = 0) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (group / "memory.usage_in_bytes").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {files}\ntotal_active_file 0\n")


def test_machine_decides_where_no_group_limits(groups: Path) -> None:
    assert usable_memory() == AVAILABLE  # not even a list of groups, as on other systems than Linux
    memory.OWN.write_text("0::/user/job\n")
    assert usable_memory() == AVAILABLE
    unified(groups / "user" / "job", "max", 7_000)
    assert usable_memory() == AVAILABLE


def test_tightest_group_decides_and_pages_of_files_are_free(groups: Path) -> None:
    memory.OWN.write_text("0::/user/job\n")
    unified(groups / "user" / "job", "8000", 3_000, files=1_001)
    assert usable_memory() == 6_001
    unified(groups / "user", "5000", 4_000)  # with others inside
    assert usable_memory() == 1_000
    unified(groups / "user", "5000", 6_000)
    assert usable_memory() == 0


def test_container_sees_its_own_group_as_the_root(groups: Path) -> None:
    memory.OWN.write_text("0::/docker/host-name-of-it\n")
    unified(groups, "4000", 1_000)
    assert usable_memory() == 3_000


def test_groups_of_version_1_limit_too(groups: Path) -> None:
    memory.OWN.write_text("5:cpu:/job\n4:memory:/job\n0::/\n")
    first(groups / "memory" / "job", 6_000, 2_000, files=500)
    first(groups / "memory", UNLIMITED, 9_000)
    assert usable_memory() == 4_500


def test_this_machine_has_some_memory() -> None:
    assert 2**20 < usable_memory() < 2**50
