import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from slipstream.cli import app
from slipstream.compare import ComparedVariant, Spread, make_grid, run_comparison
from slipstream.errors import ConfigError
from slipstream.progress import Silent
from slipstream.report import comparison_table

PIPELINE = """
name = "compared"
[dataset]
source = "synthetic"
num_samples = 4000
[segregate]
hot_budget = "40%"
[model]
embedding_dim = 4
bottom_mlp = [8, 4]
top_mlp = [8, 1]
[train]
batch_size = 64
num_threads = 1
"""


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    path = tmp_path / "compared.toml"
    path.write_text(PIPELINE)
    return path


def test_the_grid_is_every_mode_and_criterion_with_every_variation() -> None:
    grid = make_grid(["resident"], ["stale"], ["train.lr=0.1,0.2"])

    assert [variant.name for variant in grid] == [
        "resident train.lr=0.1",
        "resident train.lr=0.2",
        "random train.lr=0.1",
        "random train.lr=0.2",
        "stale train.lr=0.1",
        "stale train.lr=0.2",
    ]
    assert grid[5].overrides == ("train.mode=slipstream", "skip.criterion=stale", "skip.scope=hot", "train.lr=0.2")


@pytest.mark.parametrize(
    ("criteria", "expected"),
    [
        (["importance"], ["random", "importance"]),
        (["none", "stale", "negative"], ["none", "random", "stale", "negative"]),
        (["importance", "random"], ["importance", "random"]),
        (["none"], ["none"]),
        ([], []),
    ],
)
def test_random_stands_beside_every_criterion_that_drops(criteria: list[str], expected: list[str]) -> None:
    assert [variant.name for variant in make_grid(["fae"], criteria, [])] == ["fae", *expected]


@pytest.mark.parametrize("vary", ["train.lr", "train.lr="])
def test_a_malformed_variation_is_an_error(vary: str) -> None:
    with pytest.raises(ConfigError, match="--vary"):
        make_grid(["resident"], [], [vary])


def test_an_empty_grid_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing to compare"):
        make_grid([], [], [])


def test_exact_modes_differ_by_nothing_and_criteria_skip_the_same_share(pipeline: Path, tmp_path: Path) -> None:
    runs: list[tuple[str, int]] = []
    compared = run_comparison(
        pipeline,
        tmp_path / "runs",
        on_run=lambda name, seed: runs.append((name, seed)),
        grid=make_grid(["resident", "fae"], ["random", "stale", "negative", "importance"], []),
        overrides=[],
        seeds=2,
        skip_share=0.1,
        progress=Silent(),
    )
    by_name = {variant.name: variant.figures for variant in compared}

    assert list(by_name)[-1] == "none, batch 71"  # 64 / (1 - .1)
    assert by_name["none, batch 71"]["skipped_share"].mean == 0.0
    assert by_name["none, batch 71"]["auc_change"].mean != 0.0
    assert runs == [(name, seed) for seed in range(2) for name in by_name], "seed by seed, every variant in turn"
    assert all(figures["cpu_seconds"].mean > 0 for figures in by_name.values())
    assert by_name["fae"]["auc_change"].mean == 0.0
    assert by_name["fae"]["test_logloss"] == by_name["resident"]["test_logloss"]
    assert by_name["resident"]["skipped_share"].mean == 0.0
    for criterion in ("random", "stale", "negative", "importance"):
        assert by_name[criterion]["skipped_share"].mean == pytest.approx(0.1, abs=0.015)
        assert by_name[criterion]["auc_change"].mean != 0.0
    watching = by_name["stale"]["device_bytes"].mean - by_name["random"]["device_bytes"].mean
    assert watching > 0 and watching % 16 == 0  # of each hot row


def test_the_tables_of_a_comparison_fit_80_columns_and_show_spreads() -> None:
    values = {
        **{
            "auc": 0.75821,
            "auc_change": -0.00112,
            "test_logloss": 0.48196,
            "test_ne": 0.83916,
            "test_calibration": 1.006,
        },
        **{
            "skipped_share": 0.2,
            "samples_seen": 45_840_617,
            "seconds": 1234.5,
            "cpu_seconds": 2345.6,
            "samples_per_second": 1_234_567.0,
        },
        **{"device_bytes": 2.4e9, "host_bytes": 1.5e12, "moved_bytes": 1.1e12, "hit_ratio": 0.966},
    }
    figures = {name: Spread(mean=value, error=abs(value) / 100) for name, value in values.items()}
    compared = [
        ComparedVariant(name=name, overrides=(), figures=figures, seeds=24) for name in ("resident", "importance")
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison_table(compared))
    text = console.export_text()

    assert "…" not in text
    found = [line.split() for line in text.splitlines() if line.startswith("importance")]
    assert [" ".join(line[1:]) for line in found] == [
        "0.7582 ± 0.0076 -0.0011 ± 0.0000 20.0% 45,840,617",
        "0.4820 ± 0.0048 0.8392 ± 0.0084 1.006 ± 0.010",
        "1234.5 ± 12.3 2345.6 1,234,567 2.2 GiB 1.4 TiB 1.0 TiB 96.6%",
    ]


def test_compare_prints_one_json_document(pipeline: Path, tmp_path: Path) -> None:
    arguments = ["compare", str(pipeline), "--runs", str(tmp_path / "runs"), "--criteria", "random", "--seeds", "1"]
    arguments += ["--set", "train.batch_size=64"]

    result = CliRunner().invoke(app, [*arguments, "--json", "--quiet"])

    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [variant["name"] for variant in found] == ["resident", "random", "none, batch 86"]
    # 30 % of the six sevenths that are classified, whatever the user says of the batch of all
    share = found[1]["figures"]["skipped_share"]["mean"]
    assert share == pytest.approx(0.3 * 6 / 7, abs=0.01) and round(64 / (1 - share)) == pytest.approx(86, abs=1)


def test_skipping_more_than_is_classified_is_an_error(pipeline: Path, tmp_path: Path) -> None:
    arguments = ["compare", str(pipeline), "--runs", str(tmp_path / "runs"), "--criteria", "stale", "--seeds", "1"]

    result = CliRunner().invoke(app, [*arguments, "--skip-share", "0.99"])

    assert result.exit_code == 2
    assert "share of samples to skip" in result.stderr
