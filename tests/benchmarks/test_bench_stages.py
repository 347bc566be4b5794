from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from raw_logs import make_lines, subprocess_environment, write_raw

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("name", "options", "contenders"),
    [
        ("preprocess", ["--rows", "3000", "--slow-rows", "500"], {"slipstream", "torchrec", "plain loop", "bare read"}),
        pytest.param(
            "preprocess",
            ["--rows", "3000", "--slow-rows", "500", "--memory", "--max-table-rows", "50"],
            {"3000", "15000"},
            marks=pytest.mark.slow,
        ),
        ("segregate", ["--rows", "5000", "--slow-rows", "500"], {"slipstream", "FAE loop", "copy"}),
        pytest.param(
            "lists",
            ["--rows", "2000", "--steps", "2", "--batch", "64", "--table-rows", "2000", "--rounds", "1"],
            {
                "preprocess, tags as list",
                "preprocess, tags as columns",
                "train, slipstream",
                "train, nn.EmbeddingBag",
                "train, first values alone",
            },
            marks=pytest.mark.slow,
        ),
        pytest.param("score", ["--rows", "5000", "--rounds", "1"], {"rounds", "torch", "onnx"}, marks=pytest.mark.slow),
        pytest.param(
            "serve",
            ["--rows", "3000", "--samples", "100", "--calls", "2"],
            {"dense", "int8", "int4", "tt", "http"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_benchmarks_run_at_toy_size(tmp_path: Path, name: str, options: list[str], contenders: set[str]):
    command = [sys.executable, str(BENCHMARKS / f"bench_{name}.py"), *options]
    answer = subprocess.run(
        [*command, "--work", str(tmp_path)], capture_output=True, text=True, env=subprocess_environment()
    )
    assert answer.returncode == 0, answer.stderr
    last = json.loads(answer.stdout.splitlines()[-1])
    assert last["benchmark"] == name and set(last["results"]) == contenders
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_log_of_ones_own_is_scored_and_preprocessed_as_often_as_it_is_repeated(tmp_path: Path):
    log = write_raw(tmp_path / "log.tsv.gz", make_lines(700))
    command = [sys.executable, str(BENCHMARKS / "bench_score.py"), "--data", str(log), "--repeat", "2", "--rounds", "1"]
    answer = subprocess.run(
        [*command, "--work", str(tmp_path)], capture_output=True, text=True, env=subprocess_environment()
    )
    assert answer.returncode == 0, answer.stderr
    (one_round,) = json.loads(answer.stdout.splitlines()[-1])["results"]["rounds"]
    assert {label: found["rows"] for label, found in one_round.items()} == dict.fromkeys(
        ["command preprocess", "command score", "preprocess", "score"], 1400
    )
    assert "start-up included" in answer.stdout and "work alone" in answer.stdout
