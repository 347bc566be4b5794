"""What computes here: versions, processor, threads. Recorded with every artifact, for whoever makes it again."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from slipstream import __version__
from slipstream.io.processors import usable_cores

PACKAGES = ("torch", "numpy", "polars", "pyarrow", "safetensors")
"""Whose results or bytes may change with their version."""
_CPUINFO = Path("/proc/cpuinfo")


def describe_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Say what computes here.

    Args:
        environment: Where `OMP_NUM_THREADS` may be set.

    Returns:
        Versions of slipstream, Python and `PACKAGES`; `machine`, `system`, `processor`, `cores` and `threads`.
    """
    return {
        "slipstream": __version__,
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "machine": platform.machine(),
        "system": platform.platform(terse=True),
        "processor": _processor(),
        "cores": str(usable_cores()),
        "threads": environment.get("OMP_NUM_THREADS", "by default"),
    }


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """Model of the processor; empty where the system does not say."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
