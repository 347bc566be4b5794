from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from raw_logs import subprocess_environment

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_busy.py"


@pytest.mark.slow
def test_benchmark_runs_at_toy_size_and_leaves_nothing(tmp_path: Path):
    command = [sys.executable, str(SCRIPT), "--samples", "4000", "--rounds", "1", "--networks", "tiny"]
    answer = subprocess.run(
        [*command, "--work", str(tmp_path)], capture_output=True, text=True, env=subprocess_environment()
    )
    assert answer.returncode == 0, answer.stderr
    results = json.loads(answer.stdout.splitlines()[-1])["results"]
    contenders = ("one thread", "slipstream", "all, sleeping", "all, spinning")
    assert set(results) == {f"tiny, {state}, {threads}" for state in ("idle", "busy") for threads in contenders}
    assert all(figures["samples_per_second"] > 0 for figures in results.values())
    assert not list(tmp_path.iterdir())
