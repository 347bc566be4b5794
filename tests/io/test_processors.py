from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from raw_logs import subprocess_environment

from slipstream.io import processors


def groups(tmp_path: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
    (tmp_path / "own").write_text(own, encoding="ascii")
    return tmp_path / "cgroup", tmp_path / "own"


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2.0),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/a\n", {"other/cpu.max": "50000 100000\n"}, None),
        ("1:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "300000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 3.0),
        ("1:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, None),
        ("0::/\n", {"cpu.max": "nonsense\n"}, None),
        ("", {}, None),
    ],
)
def test_a_quota_is_the_smallest_of_all_groups_around(
    tmp_path: Path, own: str, files: dict[str, str], quota: float | None
):
    assert processors.cpu_quota(*groups(tmp_path, own, files)) == quota


@pytest.mark.parametrize(
    ("allowed", "quota", "cores"),
    [(8, None, 8), (8, "150000 100000", 2), (2, "400000 100000", 2), (4, "1000 100000", 1)],
)
def test_cores_are_those_allowed_or_fewer_by_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int, quota: str | None, cores: int
):
    cgroups, own = groups(tmp_path, "0::/\n", {"cpu.max": quota} if quota else {})
    monkeypatch.setattr(processors, "_CGROUPS", cgroups)
    monkeypatch.setattr(processors, "_OWN_CGROUP", own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(allowed)), raising=False)
    assert processors.usable_cores() == cores


@pytest.mark.parametrize(
    ("given", "policy"),
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({"GOMP_SPINCOUNT": "100"}, None)],
)
def test_threads_sleep_while_they_wait_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], policy: str | None
):
    monkeypatch.delitem(sys.modules, "torch")
    processors.wait_without_spinning(given)
    assert given.get("OMP_WAIT_POLICY") == policy


@pytest.mark.parametrize("module", ["cli", "api"])
def test_how_threads_wait_is_said_before_torch_is_loaded(module: str):
    code = {
        "cli": """
import os
from slipstream.cli import front
front.app = lambda: print(os.environ["OMP_WAIT_POLICY"])
front.main()
""",
        "api": """
import os, slipstream
try:
    slipstream.load("/nowhere")
except slipstream.errors.SlipstreamError:
    print(os.environ["OMP_WAIT_POLICY"])
""",
    }[module]
    environment = {
        name: value
        for name, value in subprocess_environment().items()
        if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    }
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert answer.stdout.strip() == "PASSIVE", answer.stderr
