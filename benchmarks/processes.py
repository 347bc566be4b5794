"""What benchmarks of whole stages share: contenders in processes of their own, timed and weighed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def run_apart(script: str, label: str, options: Sequence[str], *, python: str = sys.executable) -> dict[str, Any]:
    """Run one contender of a script in a process of its own: what it prints last, as JSON."""
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [python, script, "--contender", label, *options]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    if answer.returncode:
        raise SystemExit(f"{label} failed:\n{answer.stderr}")
    result: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return result


def timed(work: Callable[[], int], *, unit: str) -> dict[str, Any]:
    """Time work that returns how many `unit` it read."""
    started, cpu = time.perf_counter(), time.process_time()
    count = work()
    return {
        unit: count,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mb": peak_mb(),
    }


def peak_mb() -> float:
    """Most memory this process ever held; unlike ru_maxrss it starts from nothing at exec."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024
