"""Free memory of this machine.

In: nothing. Out: bytes. Invariant: nothing is allocated to find out.
"""

from __future__ import annotations

import os
from pathlib import Path

_UNKNOWN = 8 * 2**30


def available_memory() -> int:
    """Return the free bytes: what the kernel could give without swapping, or what a container's limit leaves."""
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
    """Return what control groups leave; more than any machine has where there are none."""
    group = Path("/sys/fs/cgroup")
    try:
        most, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
        return max(int(most) - int(used), 0)
    except (OSError, ValueError):  # no control groups, or "max"
        return 1 << 62
