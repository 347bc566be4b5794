"""The benchmark of quantised bags runs."""

import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_quantized.py"


def test_the_benchmark_runs_at_toy_size() -> None:
    toy = ["--rows", "500", "--dim", "4", "--batch", "16", "--steps", "2", "--tables", "3", "--contender"]
    command = [sys.executable, str(BENCHMARK), *toy, "int8 master"]
    environment = {"PYTHONPATH": str(BENCHMARK.parents[1])}
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert '"step_seconds"' in answer.stdout.splitlines()[-1]
