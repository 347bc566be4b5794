"""One process makes an artifact, any number read it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from slipstream.errors import ArtifactError
from slipstream.io import locks
from slipstream.io.locks import InUseError, hold, hold_artifact, require_held

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


# --- other hosts -----------------------------------------------------------------------------------------------


@pytest.fixture
def stand_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Be on a host of that name from now on; the file system carries no locks from one to the other."""
    monkeypatch.setattr(locks.fcntl, "flock", lambda stream, how: None)
    return lambda name: monkeypatch.setattr(locks, "_host", lambda: name)


@pytest.mark.parametrize(("theirs", "mine"), [(False, False), (False, True), (True, False)])
def test_a_process_of_another_host_is_told_too(
    tmp_path: Path, stand_on: Callable[[str], None], theirs: bool, mine: bool
):
    stand_on("node-0")
    with hold_artifact(tmp_path / "0123", shared=theirs) as claim:
        stand_on("node-1")
        said = rf"0123` is in use by process {os.getpid()} on host `node-0`, since .*, seen \d+ s ago"
        with pytest.raises(InUseError, match=said), hold_artifact(tmp_path / "0123", shared=mine):
            pass
        with hold_artifact(tmp_path / "4567"):
            require_held(claim)
    with hold_artifact(tmp_path / "0123"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".0123.lock", ".4567.lock"}


def test_many_hosts_may_read_an_artifact(tmp_path: Path, stand_on: Callable[[str], None]):
    stand_on("node-0")
    with hold_artifact(tmp_path / "0123", shared=True):
        stand_on("node-1")
        with hold_artifact(tmp_path / "0123", shared=True):
            pass


def test_who_shows_no_life_for_a_minute_is_given_up_and_finds_out(tmp_path: Path, stand_on: Callable[[str], None]):
    stand_on("node-0")
    with hold_artifact(tmp_path / "0123") as claim:
        stand_on("node-1")
        os.utime(claim, (time.time() - 50,) * 2)
        with pytest.raises(InUseError), hold_artifact(tmp_path / "0123"):
            pass
        os.utime(claim, (time.time() - 70,) * 2)
        with hold_artifact(tmp_path / "0123") as other:
            require_held(other)
            with pytest.raises(InUseError, match="stood still for more than 60 s"):
                require_held(claim)


def test_who_holds_it_shows_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(locks, "_BEAT_SECONDS", 0.01)
    with hold_artifact(tmp_path / "0123") as claim:
        os.utime(claim, (0, 0))
        while claim.stat().st_mtime == 0:
            time.sleep(0.01)


def test_claims_of_killed_processes_of_this_host_do_not_count(tmp_path: Path):
    with pytest.raises(AssertionError), another_process(tmp_path / "0123", shared=True) as pid:
        os.kill(pid, signal.SIGKILL)
    assert len(list(tmp_path.glob(".0123.*.lock"))) == 1
    with hold_artifact(tmp_path / "0123"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".0123.lock"]


def test_a_folder_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(locks, "_LOOK_SECONDS", 0.01)
    order = []

    def work() -> None:
        with hold(tmp_path):
            order.append("second")

    with hold(tmp_path) as claim:
        waiting = threading.Thread(target=work)
        waiting.start()
        time.sleep(0.05)
        order.append("first")
        require_held(claim)
    waiting.join()
    assert order == ["first", "second"]
