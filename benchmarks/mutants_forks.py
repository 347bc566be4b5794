"""Tests in forks of a process that has torch loaded, each in its own copy of the project."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from mutants_places import ROOT, project_files

MEMORY = 10 << 30
"""Bytes of address space that a changed program may take; above it, an allocation fails."""
TOO_SLOW = -1
SAID = "said.txt"
CRASHED = 70
"""Exit code of a fork whose work raised: no test has judged anything."""
IMPORTED_BEFORE = "ignore:Module already imported so cannot be rewritten"

T = TypeVar("T")


@dataclass(frozen=True)
class Work(Generic[T]):
    """What one fork does."""

    of: T
    do: Callable[[Path], int]
    """Runs in the fork, in a copy of the project; gives the fork's exit code."""
    at_most: float
    """Seconds after which the fork is ended, with all it started."""


@dataclass(frozen=True)
class Done(Generic[T]):
    """What became of it."""

    of: T
    code: int
    """The exit code, or TOO_SLOW."""
    seconds: float
    copy: Path


def load_what_is_slow_to_load() -> None:
    """Import what every test needs, so that a fork need not; nothing of slipstream, which each fork loads changed."""
    os.environ.update(_environment(ROOT))
    import altair  # noqa: F401
    import hypothesis  # noqa: F401
    import polars  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import pytest  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch
    import triton  # noqa: F401

    torch.set_num_threads(1)  # a pool of threads does not survive a fork


def _environment(root: Path) -> dict[str, str]:
    """Make the environment for the project in that folder, also for processes that tests start."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}


def make_copies(work: Path, jobs: int) -> list[Path]:
    """Copy what git lists, and compile it and its tests once; forks read that bytecode and write none."""
    copies = [work / f"copy{job}" for job in range(jobs)]
    digest = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in project_files())).hexdigest()
    made = work / f"copied-{digest[:12]}"
    if not made.exists():
        shutil.rmtree(copies[0], ignore_errors=True)
        _copy_files(copies[0])
        print("reading the tests", flush=True)
        works = [Work("tests", lambda copy: run_pytest(copy, ["tests"], "--collect-only"), 900.0)]
        for done in in_forks(works, copies[:1]):
            if done.code:
                sys.exit(f"the tests cannot be collected: {(done.copy / SAID).read_text()[-2000:]}")
        made.touch()
    sys.dont_write_bytecode = True
    _copy_files(copies[0])  # an interrupted run leaves a change behind
    for copy in copies[1:]:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(copies[0], copy, symlinks=True)
    return copies


def _copy_files(copy: Path) -> None:
    """With their times, which bytecode goes by."""
    for name in project_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)


def in_forks(works: Iterable[Work[T]], copies: list[Path]) -> Iterator[Done[T]]:
    """Do every work in a fork of its own, as many at once as there are copies; no copy is used again before `next`.

    This process has one thread: a fork of several could wait forever for a lock that nobody holds any more.
    """
    free, running, waiting = list(copies), dict[int, tuple[Work[T], Path, float]](), iter(works)
    while True:
        while free and (work := next(waiting, None)) is not None:
            copy = free.pop()
            running[_start(work, copy)] = (work, copy, time.monotonic())
        if not running:
            return
        for pid, (work, copy, began) in list(running.items()):
            seconds = time.monotonic() - began
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended or seconds > work.at_most:
                _end_group(pid)
                if not ended:
                    os.waitpid(pid, 0)
                del running[pid]
                yield Done(work.of, os.waitstatus_to_exitcode(status) if ended else TOO_SLOW, seconds, copy)
                shutil.rmtree(copy / ".tmp", ignore_errors=True)
                free.append(copy)
        time.sleep(0.02)


def _end_group(pid: int) -> None:
    """End what a fork has started and left running, too."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _start(work: Work[T], copy: Path) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = CRASHED
    try:
        os.setsid()
        said = os.open(copy / SAID, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        os.environ.update(_environment(copy))
        code = work.do(copy)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_pytest(copy: Path, tests: Iterable[str], *options: str, plugins: Iterable[object] = ()) -> int:
    """Run tests of this copy in this process."""
    import importlib.util

    import pytest

    found = importlib.util.find_spec("slipstream")
    assert found is not None and found.origin == str(copy / "slipstream/__init__.py"), found
    own = ["-q", "-p", "no:cacheprovider", f"--basetemp={copy / '.tmp'}", "-W", IMPORTED_BEFORE]
    return int(pytest.main([*own, *options, *tests], plugins=list(plugins)))
