"""The memory of this machine, and of this process."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
UNKNOWN_BYTES = 4 << 30  # taken for available where the system doesn't say


def memory() -> dict[str, int | None]:
    """Bytes of memory in all, the limit of the control group, and what can still be had within both; None: unknown."""
    found: dict[str, int | None] = {"total": None, "available": None, "limit": None}
    try:
        sizes = _numbers(MEMINFO.read_text().replace(":", ""))
        found |= {key: sizes[name] * 1024 for key, name in (("total", "MemTotal"), ("available", "MemAvailable"))}
    except (OSError, ValueError, KeyError):
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            found["total"] = found["available"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError, KeyError):  # no control group, or "max"
        limit = found["limit"] = int((CGROUP / "memory.max").read_text())
        used, parts = int((CGROUP / "memory.current").read_text()), _numbers((CGROUP / "memory.stat").read_text())
        used -= parts["active_file"] + parts["inactive_file"]  # files that it has read go where memory is wanted
        left = max(0, limit - used)
        found["available"] = left if found["available"] is None else min(left, found["available"])
    return found


def available_memory() -> int:
    """Bytes that this process can still take without swapping."""
    available = memory()["available"]
    return UNKNOWN_BYTES if available is None else available


def peak_memory() -> int:
    """The most bytes of memory that this process has had resident; 0 where the system doesn't say."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _numbers(table: str) -> dict[str, int]:
    """The number behind each line's name."""
    return {words[0]: int(words[1]) for words in map(str.split, table.splitlines()) if len(words) > 1}
