"""Is there room? Asked before the work, so that a run that cannot end does not begin."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import psutil

from slipstream.errors import CapacityError

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")


def require_disk(folder: Path, needed_bytes: int, *, purpose: str, hint: str) -> None:
    """Refuse unless a folder's disk has this much free.

    Args:
        folder: Where; it need not be there yet.
        needed_bytes: How much.
        purpose: What needs it.
        hint: What to do.

    Raises:
        CapacityError: It has not; the message says what was asked and what there is.
    """
    free = shutil.disk_usage(_nearest(folder)).free
    if needed_bytes > free:
        raise CapacityError(
            f"{purpose} needs about {show_bytes(needed_bytes)} of disk at `{folder}`, and {show_bytes(free)} are free",
            hint=hint,
        )


def is_in_memory(folder: Path) -> bool:
    """Whether what is written to a folder takes memory, not disk."""
    mounts = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    there = folder.resolve()
    kinds = (mounts[path] for path in (there, *there.parents) if path in mounts)
    return next(kinds, "") in ("tmpfs", "ramfs")


def on_same_disk(path: Path, other: Path) -> bool:
    """Whether a file at one path could have a second name at the other."""
    return _nearest(path).stat().st_dev == _nearest(other).stat().st_dev


def _nearest(path: Path) -> Path:
    """Give the path, or the first folder above it that is there."""
    return next(there for there in (path.absolute(), *path.absolute().parents) if there.exists())


def require_memory(needed_bytes: int, *, purpose: str, hint: str) -> None:
    """Refuse unless this much memory is available.

    Raises:
        CapacityError: It is not; the message says what was asked and what there is.
    """
    available = available_memory()
    if needed_bytes > available:
        raise CapacityError(
            f"{purpose} needs about {show_bytes(needed_bytes)} of memory, and {show_bytes(available)} are available",
            hint=hint,
        )


def available_memory() -> int:
    """Bytes this process may still take: what the machine has, or less where a container sets a limit."""
    available = int(psutil.virtual_memory().available)
    try:
        limit, used = int(_CGROUP_LIMIT.read_text()), int(_CGROUP_USED.read_text())
    except (OSError, ValueError):
        return available
    return min(available, max(limit - used, 0))


def written_bytes(folder: Path) -> int:
    """Bytes of the files below a folder: what an interrupted stage need not write again."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def peak_memory() -> int:
    """Most bytes that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show_bytes(size: int) -> str:
    """Write a size for people: `1.5 GiB`."""
    amount = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:,.0f} {unit}" if unit == "bytes" else f"{amount:,.1f} {unit}"
        amount /= 1024
    return f"{amount:,.1f} TiB"
