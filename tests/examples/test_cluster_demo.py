"""The cluster of one machine: it ends well, says where its dashboard is, and leaves nobody behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from raw_logs import subprocess_environment

DEMO = Path(__file__).parents[2] / "examples" / "cluster_demo.py"


def start(runs: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(DEMO), "tiny", "--runs", str(runs)],
        env=subprocess_environment() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def all_are_gone(processes: list[psutil.Process]) -> bool:
    return psutil.wait_procs(processes, timeout=30)[1] == []


@pytest.mark.slow
def test_workers_and_ranks_make_a_model(tmp_path: Path):
    demo = start(tmp_path)
    assert demo.stdout is not None
    shown = [demo.stdout.readline() for _ in range(2)]
    others = psutil.Process(demo.pid).children(recursive=True)
    said, _ = demo.communicate()
    assert demo.returncode == 0, said
    assert "2 workers" in shown[0] and "http://127.0.0.1:" in shown[1]
    assert list(tmp_path.glob("tiny/train/*/model.safetensors"))
    assert len(others) >= 2 and all_are_gone(others)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_stopped_in_the_middle_it_takes_all_along(tmp_path: Path, how: signal.Signals):
    demo = start(tmp_path)
    while not list(tmp_path.glob("tiny/*/.*.partial")):
        assert demo.poll() is None
        time.sleep(0.01)
    others = psutil.Process(demo.pid).children(recursive=True)
    demo.send_signal(how)
    demo.communicate(timeout=60)
    assert demo.returncode != 0
    assert len(others) >= 5, "nannies or workers, torchrun, ranks"
    assert all_are_gone(others)
