"""What the engine takes for available memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfturn import machine

MEMINFO = "MemTotal:       1000 kB\nMemFree:         10 kB\nMemAvailable:    700 kB\nHugePages_Total:       0\n"
STAT = "anon 100\nfile 900\nactive_file 200000\ninactive_file 100000\n"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 1000 kB, 700 of them free, without control groups."""
    (tmp_path / "meminfo").write_text(MEMINFO)
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    return tmp_path


def limit(system: Path, limit: str, used: int) -> None:
    (system / "memory.max").write_text(f"{limit}\n")
    (system / "memory.current").write_text(f"{used}\n")
    (system / "memory.stat").write_text(STAT)


def test_without_a_control_group(system: Path) -> None:
    assert machine.memory() == {"total": 1_024_000, "available": 716_800, "limit": None}


def test_a_container_has_what_its_limit_leaves(system: Path) -> None:
    """Pages of files that it has read count as used, and are given up first."""
    limit(system, "800000", 600_000)
    assert machine.memory() == {"total": 1_024_000, "available": 500_000, "limit": 800_000}
    limit(system, "800000", 1_200_000)
    assert machine.available_memory() == 0
    limit(system, "9000000", 600_000)
    assert machine.available_memory() == 716_800
    limit(system, "max", 600_000)
    assert machine.memory()["limit"] is None and machine.available_memory() == 716_800


def test_a_system_that_tells_nothing(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (system / "meminfo").unlink()
    monkeypatch.delattr(machine.os, "sysconf", raising=False)
    assert machine.memory()["available"] is None and machine.available_memory() == machine.UNKNOWN_BYTES
