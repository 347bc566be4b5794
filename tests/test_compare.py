import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slipstream.cli import app
from slipstream.compare import make_grid, run_comparison
from slipstream.errors import ConfigError
from slipstream.progress import Silent

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
        "stale train.lr=0.1",
        "stale train.lr=0.2",
    ]
    assert grid[3].overrides == ("train.mode=slipstream", "skip.criterion=stale", "skip.scope=hot", "train.lr=0.2")


@pytest.mark.parametrize("vary", ["train.lr", "train.lr="])
def test_a_malformed_variation_is_an_error(vary: str) -> None:
    with pytest.raises(ConfigError, match="--vary"):
        make_grid(["resident"], [], [vary])


def test_an_empty_grid_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing to compare"):
        make_grid([], [], [])


def test_exact_modes_differ_by_nothing_and_criteria_skip_the_same_share(pipeline: Path, tmp_path: Path) -> None:
    compared = run_comparison(
        pipeline,
        tmp_path / "runs",
        grid=make_grid(["resident", "fae"], ["random", "stale", "negative", "importance"], []),
        overrides=[],
        seeds=2,
        skip_share=0.1,
        progress=Silent(),
    )
    by_name = {variant.name: variant.figures for variant in compared}

    assert by_name["fae"]["auc_change"].mean == 0.0
    assert by_name["fae"]["test_logloss"] == by_name["resident"]["test_logloss"]
    assert by_name["resident"]["skipped_share"].mean == 0.0
    for criterion in ("random", "stale", "negative", "importance"):
        assert by_name[criterion]["skipped_share"].mean == pytest.approx(0.1, abs=0.015)
        assert by_name[criterion]["auc_change"].mean != 0.0
    watching = by_name["stale"]["device_bytes"].mean - by_name["random"]["device_bytes"].mean
    assert watching > 0 and watching % 16 == 0  # of each hot row


def test_compare_prints_one_json_document(pipeline: Path, tmp_path: Path) -> None:
    arguments = ["compare", str(pipeline), "--runs", str(tmp_path / "runs"), "--criteria", "random", "--seeds", "1"]

    result = CliRunner().invoke(app, [*arguments, "--json", "--quiet"])

    assert result.exit_code == 0, result.output
    assert [variant["name"] for variant in json.loads(result.stdout)] == ["resident", "random"]


def test_skipping_more_than_is_classified_is_an_error(pipeline: Path, tmp_path: Path) -> None:
    arguments = ["compare", str(pipeline), "--runs", str(tmp_path / "runs"), "--criteria", "stale", "--seeds", "1"]

    result = CliRunner().invoke(app, [*arguments, "--skip-share", "0.99"])

    assert result.exit_code == 2
    assert "share of samples to skip" in result.stderr
