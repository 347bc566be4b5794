"""One process makes an artifact, any number read it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from slipstream.errors import ArtifactError
from slipstream.io.locks import InUseError, hold_artifact

_HOLD = """
import sys
from pathlib import Path
from slipstream.io.locks import hold_artifact
with hold_artifact(Path(sys.argv[1]), shared=bool(int(sys.argv[2]))):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(artifact: Path, *, shared: bool) -> Iterator[int]:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(artifact), str(int(shared))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdin and holder.stdout
        assert holder.stdout.readline() == "held\n"
        yield holder.pid
        holder.stdin.close()
        assert holder.wait(timeout=30) == 0


@pytest.mark.parametrize(("theirs", "mine"), [(False, False), (False, True), (True, False)])
def test_a_second_process_is_told_who_holds_the_artifact(tmp_path: Path, theirs: bool, mine: bool):
    artifact = tmp_path / "stage" / "0123"
    with another_process(artifact, shared=theirs) as pid:
        said = rf"stage/0123` is in use by process {pid} \(\S+\), since"
        with pytest.raises(InUseError, match=said) as caught, hold_artifact(artifact, shared=mine):
            pass
        assert "--runs" in str(caught.value.hint)
        with hold_artifact(tmp_path / "stage" / "4567"):
            pass
    with hold_artifact(artifact):
        assert json.loads((tmp_path / "stage" / ".0123.lock").read_text())["pid"] == os.getpid()


def test_many_may_read_an_artifact(tmp_path: Path):
    with another_process(tmp_path / "0123", shared=True), hold_artifact(tmp_path / "0123", shared=True):
        pass


def test_a_lock_is_free_again_after_an_error(tmp_path: Path):
    with pytest.raises(RuntimeError), hold_artifact(tmp_path / "0123"):
        raise RuntimeError
    with hold_artifact(tmp_path / "0123"):
        pass


def test_a_folder_that_cannot_be_written_is_an_artifact_error(tmp_path: Path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"), hold_artifact(tmp_path / "taken" / "0123"):
        pass
