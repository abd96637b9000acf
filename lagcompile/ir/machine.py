"""What this machine has left.

In: nothing. Out: bytes. Invariant: nothing is allocated to find out.
"""

from __future__ import annotations

import os
from pathlib import Path

_UNKNOWN = 8 * 2**30


def available_memory() -> int:
    """Free bytes: what the kernel could hand out without swapping, or less where a container is limited to less."""
    return min(_of_machine(), _of_container())


def _of_machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (OSError, ValueError):
        return _UNKNOWN


def _of_container() -> int:
    """What control groups leave; where there are none, more than any machine has."""
    group = Path("/sys/fs/cgroup")
    try:
        most, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
        return max(int(most) - int(used), 0)
    except (OSError, ValueError):  # no control groups, or "max"
        return 1 << 62
