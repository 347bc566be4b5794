"""What benchmarks of whole stages share: contenders in processes of their own, timed and weighed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


def run_command(command: Sequence[str]) -> tuple[str, dict[str, float]]:
    """Run a command from its start to its end: what it prints, and its seconds and those of processors."""
    before, started = os.times(), time.perf_counter()
    answer = subprocess.run(command, capture_output=True, text=True)
    seconds, after = time.perf_counter() - started, os.times()
    if answer.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{answer.stderr}")
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return answer.stdout, {"seconds": seconds, "cpu_seconds": cpu}


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


@contextmanager
def resident_peaks(*, every_seconds: float = 0.02) -> Iterator[dict[str, float]]:
    """Give the most memory that this process has of its own, and of mapped files, while the block runs; by samples."""
    peaks, is_done = {"own_mb": 0.0, "files_mb": 0.0}, threading.Event()

    def watch() -> None:
        while not is_done.wait(every_seconds):
            for key, line in (("own_mb", "RssAnon"), ("files_mb", "RssFile")):
                peaks[key] = max(peaks[key], _status_mb(line))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        is_done.set()
        watcher.join()


def peak_mb() -> float:
    """Most memory this process ever held; unlike ru_maxrss it starts from nothing at exec."""
    return _status_mb("VmHWM")


def _status_mb(name: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name)) / 1024
