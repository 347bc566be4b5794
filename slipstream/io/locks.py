"""Locks of artifacts: one process makes an artifact, any number read it, and nobody takes it away under them.

    runs/<name>/<stage>/.<fingerprint>.lock   taken while the artifact is made or read; says who took it last

Two pipelines that share a run folder get in each other's way only where they would make the same artifact. The lock is
the system's: it ends with its process, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from slipstream.errors import ArtifactError
from slipstream.io.artifacts import wrap_write_errors


class InUseError(ArtifactError):
    """Another process holds the lock."""


@contextlib.contextmanager
def hold_artifact(artifact: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold an artifact for this process.

    Args:
        artifact: Its published folder, which need not be there yet.
        shared: To read it, beside others that do; otherwise to make or remove it, alone.

    Raises:
        InUseError: Another process holds it; the message says which.
    """
    path = artifact.with_name(f".{artifact.name}.lock")
    with wrap_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+", encoding="utf-8")
    with stream:
        try:
            fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUseError(
                f"`{artifact}` is in use by {_describe_holder(path)}",
                hint="wait for it to end, stop it, or work in another folder with --runs",
            ) from None
        with wrap_write_errors(path):
            stream.truncate(0)
            stream.write(json.dumps({"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}))
            stream.flush()
        yield  # closing the file gives the lock back


def _describe_holder(path: Path) -> str:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        name = psutil.Process(body["pid"]).name()
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return "another process"
    return f"process {body['pid']} ({name}), since {body['since']}"
