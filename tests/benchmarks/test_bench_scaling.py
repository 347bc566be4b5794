"""What the forecast counts, and what is fitted."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "bench_scaling.py"
    spec = importlib.util.spec_from_file_location("bench_scaling", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("rows", "lookups"), [(3, 50), (1000, 200), (1000, 5000)])
def test_distinct_rows_are_those_that_drawn_lookups_find(bench: ModuleType, rows: int, lookups: int):
    shares = np.arange(1, rows + 1) ** -1.05
    rng = np.random.default_rng(0)
    found = [len(np.unique(rng.choice(rows, lookups, p=shares / shares.sum()))) for _ in range(40)]
    assert bench.count_distinct(rows, lookups) == pytest.approx(np.mean(found), rel=0.02)


def test_bandwidth_and_latency_are_found_again(bench: ModuleType):
    timed = [(size, size / 2e9 + 50e-6) for size in bench.SIZES]
    assert bench.fit_wire(timed) == pytest.approx((2e9, 50e-6))
