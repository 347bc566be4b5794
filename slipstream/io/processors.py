"""How many processors this process may use, and how idle threads wait for work."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Cores that this process may keep busy: those it may run on, or fewer where a container has a quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(_CGROUPS, _OWN_CGROUP)
    # a quota of 1.5 cores keeps two threads busy three quarters of the time
    return max(1, allowed if quota is None else min(allowed, math.ceil(quota)))


def cpu_quota(cgroups: Path, own: Path) -> float | None:
    """Read what the kernel allows a control group, in cores.

    Args:
        cgroups: Where control groups are mounted, usually `/sys/fs/cgroup`.
        own: File that names the group of this process, usually `/proc/self/cgroup`.

    Returns:
        The smallest quota of the group and of those around it; None where nothing is limited or known. Version 2
        (`cpu.max`: quota and period in microseconds, or `max`) and version 1 (`cpu.cfs_quota_us`, -1 for none).
    """
    quotas = []
    for folder in _groups_around(cgroups, own):
        try:
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        except (OSError, ValueError):
            try:
                quota = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
                period = (folder / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
            except (OSError, ValueError):
                continue
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _groups_around(cgroups: Path, own: Path) -> list[Path]:
    """Folders of this process's groups, and of all above them up to the root."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    folders = [cgroups, cgroups / "cpu"]
    for line in lines:
        # hierarchy:controllers:path; version 2 has one line, without controllers
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / controllers if controllers else cgroups
        group = Path(name.lstrip("/"))
        folders += [root / parent for parent in (group, *group.parents)]
    return folders


def wait_without_spinning(environment: MutableMapping[str, str]) -> None:
    """Let OpenMP's threads sleep while they wait for each other, unless the environment says how they shall wait.

    By default they spin; on cores that something else wants too, the one that all wait for then does not run. OpenMP
    looks at this once, when torch is loaded: later it changes nothing.

    Args:
        environment: Changed in place.
    """
    says_how = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    if "torch" not in sys.modules and not any(name in environment for name in says_how):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
