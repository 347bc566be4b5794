"""Locks: one process makes an artifact, any number read it, and nobody takes it away under them, on any host.

    runs/<name>/<stage>/.<fingerprint>.lock            taken while the artifact is made or read; who took it last
    runs/<name>/<stage>/.<fingerprint>.<holder>.lock   one for each holder while it holds: the claim

Two pipelines that share a run folder get in each other's way only where they would make the same artifact. Within a
host the lock is the system's: it ends with its process, however that ends. Not every shared file system carries it to
other hosts, so a holder also lays down a claim that says who it is, and touches it every few seconds; a claim of
another host that was not touched for a minute is that of a dead process. Times are those of the file system alone, so
clocks need not agree.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from slipstream.errors import ArtifactError
from slipstream.io.artifacts import wrap_write_errors

_BEAT_SECONDS = 10.0
"""Between two touches of a claim."""
_STALE_SECONDS = 60.0
"""After so long without a touch a claim is that of a dead process."""
_LOOK_SECONDS = 0.2
"""Between two tries of who waits."""


class InUseError(ArtifactError):
    """Another process holds the lock."""


@contextlib.contextmanager
def hold_artifact(artifact: Path, *, shared: bool = False) -> Iterator[Path]:
    """Hold an artifact for this process.

    Args:
        artifact: Its published folder, which need not be there yet.
        shared: To read it, beside others that do; otherwise to make or remove it, alone.

    Yields:
        The claim: a file that is there as long as it is held.

    Raises:
        InUseError: Another process holds it; the message says which.
    """
    with _hold(artifact.with_name(f".{artifact.name}.lock"), str(artifact), shared=shared) as claim:
        yield claim


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[Path]:
    """Work in a folder alone: wait until no other process does.

    Yields:
        The claim: a file that is there as long as it is held.
    """
    with contextlib.ExitStack() as stack:
        while True:
            try:
                claim = stack.enter_context(_hold(folder / ".lock", str(folder), shared=False))
                break
            except InUseError:
                time.sleep(_LOOK_SECONDS)
        yield claim


def require_held(claim: Path) -> None:
    """Make sure that a claim is still there.

    Raises:
        InUseError: It is not: this process stood still for so long that another took over.
    """
    if not claim.exists():
        raise InUseError(
            f"this process stood still for more than {_STALE_SECONDS:.0f} s, and another took over `{claim.parent}`",
            hint="run again when that one has ended",
        )


@contextlib.contextmanager
def _hold(lock: Path, what: str, *, shared: bool) -> Iterator[Path]:
    with wrap_write_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        stream = lock.open("a+", encoding="utf-8")
    with stream:  # closing the file gives the system's lock back
        try:
            fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(what, _describe_holder(lock)) from None
        with wrap_write_errors(lock):
            _say_who(stream)
            claim = _lay_claim(lock, shared=shared)
        try:
            _check_other_hosts(lock, claim, what, shared=shared)
            with _beating(claim):
                yield claim
        finally:
            claim.unlink(missing_ok=True)


def _say_who(stream: IO[str]) -> None:
    stream.truncate(0)
    stream.write(json.dumps({"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}))
    stream.flush()


def _in_use(what: str, holder: str) -> InUseError:
    return InUseError(
        f"`{what}` is in use by {holder}", hint="wait for it to end, stop it, or work in another folder with --runs"
    )


def _describe_holder(path: Path) -> str:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        name = psutil.Process(body["pid"]).name()
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return "another process"
    return f"process {body['pid']} ({name}), since {body['since']}"


# --- claims: who holds it on other hosts -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Claim:
    """What a claim says."""

    host: str
    pid: int
    since: str
    shared: bool
    touched: float
    """When, in seconds, by the file system's clock."""


def _lay_claim(lock: Path, *, shared: bool) -> Path:
    # the name of `.abc.lock` is `abc`; that of `.lock` is empty
    claim = lock.with_name(f"{lock.name.removesuffix('.lock')}.{uuid.uuid4().hex}.lock")
    body = {"host": _host(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "shared": shared}
    claim.write_text(json.dumps(body), encoding="utf-8")
    return claim


def _check_other_hosts(lock: Path, own: Path, what: str, *, shared: bool) -> None:
    """Refuse while a process of another host holds it; forget those that are dead.

    Two that lay their claims at once see each other, and both refuse. Those of this host are told apart by its own
    lock, so when this process is alone with that, their claims are leftovers.
    """
    mine = _read(own)
    assert mine is not None, "just written"
    for path in lock.parent.glob(f"{lock.name.removesuffix('.lock')}.*.lock"):
        theirs = None if path == own else _read(path)
        if theirs is None:
            continue
        is_here, is_stale = theirs.host == mine.host, mine.touched - theirs.touched > _STALE_SECONDS
        if not is_here and not is_stale and not (shared and theirs.shared):
            seen = f"seen {max(0, mine.touched - theirs.touched):.0f} s ago"
            raise _in_use(what, f"process {theirs.pid} on host `{theirs.host}`, since {theirs.since}, {seen}")
        if not shared and (is_here or is_stale):
            path.unlink(missing_ok=True)


def _read(path: Path) -> _Claim | None:
    """Give what a claim says; None where it is gone, or damaged."""
    try:
        with path.open(encoding="utf-8") as stream:  # opening asks the server, not a cache, when it was touched
            body = json.load(stream)
            touched = os.fstat(stream.fileno()).st_mtime
        return _Claim(body["host"], body["pid"], body["since"], body["shared"], touched)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _host() -> str:
    """Name of what shares the system's locks with this process: a host, until it is started again."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
    except OSError:
        boot = ""
    return "-".join(filter(None, (socket.gethostname(), boot)))


@contextlib.contextmanager
def _beating(claim: Path) -> Iterator[None]:
    """Touch a claim now and then, until the block ends or somebody took it for dead."""
    is_over = threading.Event()

    def beat() -> None:
        while not is_over.wait(_BEAT_SECONDS):
            try:
                os.utime(claim)
            except FileNotFoundError:
                return
            except OSError:
                continue  # the file system may answer the next time

    thread = threading.Thread(target=beat, name="claim", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
