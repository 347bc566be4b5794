"""The benchmark of tiers runs, contender by contender."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("contender", ["hbm", "plain", "in-place 0.8", "look-ahead 0"])
def test_a_contender_runs_at_toy_size(
    contender: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    spec = importlib.util.spec_from_file_location("bench_tiers", BENCHMARKS / "bench_tiers.py")
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    toy = {"tables": 3, "rows": 500, "dim": 4, "samples": 32, "distinct": 0.5, "steps": 3, "passes": 2, "device": "cpu"}
    bench.measure(contender, argparse.Namespace(**toy))
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["ms_per_step"] > 0
    assert 0.3 < figures["distinct_rows"] / (32 * 3) < 0.7
    if contender.startswith("in-place"):
        assert 0 < figures["cold_rows"] < figures["distinct_rows"]
