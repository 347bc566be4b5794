"""Training on several ranks: the model of one process, whatever the number of them and whatever goes wrong."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from raw_logs import subprocess_environment
from safetensors.torch import load_file
from several_ranks import (
    compute_otherwise_on_rank_1,
    fail_on_rank_1,
    free_port,
    largest_difference,
    loiter_on_rank_1,
    shuffle_otherwise_on_rank_1,
    train_together,
    vanish_on_every_rank,
    vanish_on_rank_1,
    world_of,
)
from strategies import tiny_tree, write_toml

from slipstream.config import build_pipeline
from slipstream.io.artifacts import Artifact, open_artifact
from slipstream.pipeline import run_pipeline

SLOW = pytest.mark.slow
WAYS: list[Any] = [
    {"train__mode": "slipstream", "skip__criterion": "stale", "train__optimizer": "adagrad"},
    {"train__mode": "cached", "train__cache_ratio": 0.3, "train__cache_policy": "lfu", "train__optimizer": "adam"},
    pytest.param({"train__mode": "fae", "tables": {"representation": "int8", "period": 7}}, marks=SLOW),
    pytest.param({"train__mode": "cached", "tables": {"representation": "int4", "scale_per": "row"}}, marks=SLOW),
    pytest.param({"train__mode": "cached", "train__cache_ratio": 0.3}, marks=SLOW),
    pytest.param({"train__mode": "resident", "train__optimizer": "sgd"}, marks=SLOW),
    pytest.param({"train__mode": "fae", "train__average": 0.3, "train__optimizer": "adagrad"}, marks=SLOW),
    pytest.param({"train__mode": "baseline", "train__optimizer": "adagrad"}, marks=SLOW),
    pytest.param({"train__mode": "fae", "train__optimizer": "adam"}, marks=SLOW),
    pytest.param({"skip__criterion": "stale", "skip__movement": "net", "train__optimizer": "sgd"}, marks=SLOW),
    pytest.param({"skip__criterion": "random", "train__order": "mixed"}, marks=SLOW),
    pytest.param({"skip__criterion": "negative", "skip__scope": "all", "train__optimizer": "adam"}, marks=SLOW),
    pytest.param({"skip__criterion": "importance", "skip__scope": "all", "train__optimizer": "adagrad"}, marks=SLOW),
    pytest.param({"skip__criterion": "importance", "skip__scorer": "model"}, marks=SLOW),
    pytest.param({"train__mode": "fae", "model": {"name": "deepfm", "embedding_dim": 4}}, marks=SLOW),
    pytest.param({"train__mode": "fae", "model": {"name": "dcnv2", "embedding_dim": 4}}, marks=SLOW),
    pytest.param({"train__mode": "fae", "tables": {"quantize_linears": 8}}, marks=SLOW),
]


def tree_of(*, epochs: int = 1, **options: Any) -> dict[str, Any]:
    common = {"train__epochs": epochs, "train__log_every": 10, "skip__refresh_steps": 9}
    return tiny_tree(**common | options, distributed__timeout_seconds=60.0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with all that comes before training."""
    folder = tmp_path_factory.mktemp("prepared")
    run_pipeline(build_pipeline(tree_of()), folder, stages=["preprocess", "profile", "segregate"])
    return folder


@pytest.fixture
def runs(prepared: Path, tmp_path: Path) -> Path:
    """A copy of it, for one test."""
    return Path(shutil.copytree(prepared, tmp_path / "runs"))


def trained(runs: Path) -> Artifact:
    """The one trained model of a runs folder; the next may be trained in its place."""
    (folder,) = (path for path in (runs / "tiny_test" / "train").iterdir() if not path.name.startswith("."))
    artifact = open_artifact(folder)
    folder.rename(runs / f"{folder.name}-{time.monotonic_ns()}")
    return Artifact(path=max(runs.glob(f"{folder.name}-*")), manifest=artifact.manifest)


def train(runs: Path, tree: dict[str, Any], num_ranks: int, **options: Any) -> Artifact:
    assert train_together(tree, runs, num_ranks, **options) == [""] * num_ranks
    return trained(runs)


def assert_equal_up_to_rounding(first: Artifact, second: Artifact) -> None:
    """In double precision, over hundreds of steps."""
    ours, theirs = (load_file(one.path / "model.safetensors") for one in (first, second))
    assert largest_difference(ours, theirs) < 1e-11
    for figure in ("steps", "samples_seen", "samples_dropped", "bytes_per_tier"):
        assert first.counts[figure] == second.counts[figure], figure


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_any_number_of_ranks_ends_with_the_model_of_one_process(way: dict[str, Any], runs: Path):
    is_slow = way not in WAYS[:2]
    tree = tree_of(epochs=4 if is_slow else 1, **way)
    alone = train(runs, tree, 1)
    for num_ranks in (2, 3) if is_slow else (2 if way is WAYS[1] else 3,):
        together = train(runs, tree, num_ranks)
        assert_equal_up_to_rounding(alone, together)
        assert together.counts["ranks"] == num_ranks
        assert together.counts["hit_ratio"] == alone.counts["hit_ratio"]
        assert together.counts["sent_bytes_per_step"]["row gradients"] > 0
    assert "ranks" not in alone.counts


def test_ranks_without_a_sample_of_a_batch_do_their_part(tmp_path: Path):
    tree = tree_of(train__batch_size=2, train__optimizer="sgd", skip__criterion="negative", dataset__num_samples=150)
    assert_equal_up_to_rounding(train(tmp_path, tree, 1), train(tmp_path, tree, 3))


# --- what goes wrong -----------------------------------------------------------------------------------------


def test_an_error_on_one_rank_ends_all_with_its_words(runs: Path):
    ends = train_together(tree_of(), runs, 2, sabotage=fail_on_rank_1)
    assert ends[1] == "DataError: line 7 of the log bites"
    assert ends[0] == "TrainingError: rank 1 ended: line 7 of the log bites"


def test_other_samples_on_one_rank_are_found_before_they_train(runs: Path):
    ends = train_together(tree_of(), runs, 2, sabotage=shuffle_otherwise_on_rank_1)
    assert ends == ["TrainingError: rank 1 of 2 has other samples to train on next than rank 0"] * 2


@pytest.mark.slow
def test_a_rank_that_computes_something_else_is_found_before_anything_is_written(runs: Path):
    for _ in range(2):  # the second time there is nothing to go on from
        ends = train_together(tree_of(), runs, 2, sabotage=compute_otherwise_on_rank_1)
        assert ends == ["TrainingError: rank 1 of 2 has other parameters after step 33 than rank 0"] * 2


@pytest.mark.slow
def test_a_rank_that_is_gone_ends_the_others_at_once(runs: Path):
    ends = train_together(tree_of(), runs, 2, sabotage=vanish_on_rank_1)
    assert ends[1] == "killed"
    assert ends[0].startswith("TrainingError: rank 0 lost another rank while it waited for ")


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_waited_for_as_long_as_was_said(runs: Path):
    tree = tree_of() | {"distributed": {"timeout_seconds": 4.0}}
    ends = train_together(tree, runs, 2, sabotage=loiter_on_rank_1, patience=20)
    assert ends[1] == "killed"
    assert "rank 0 waited 4 s for dense gradients, and another rank did not come" in ends[0]


def test_what_several_ranks_cannot_do_is_refused_by_name(runs: Path):
    tree = tree_of(tables={"representation": "tt", "tt_ranks": [2]})
    assert train_together(tree, runs, 2) == ["ConfigError: `tables` held as tt does not train on 2 ranks"] * 2


# --- going on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("later", [1, pytest.param(2, marks=SLOW), pytest.param(3, marks=SLOW)])
def test_what_two_ranks_saved_any_number_goes_on_from(later: int, runs: Path):
    tree = tree_of(skip__criterion="stale", train__checkpoint_steps=7, train__optimizer="adagrad")
    whole = train(runs, tree, 1)
    assert train_together(tree, runs, 2, sabotage=vanish_on_every_rank) == ["killed"] * 2
    assert list(runs.glob("tiny_test/train/.*.partial/work/checkpoint-*.json"))
    assert_equal_up_to_rounding(whole, train(runs, tree, later))


@pytest.mark.slow
def test_compressed_gradients_go_on_to_the_bit(runs: Path):
    sent = {"compress_dense": "int8", "compress_rows": "int4", "timeout_seconds": 60.0}
    tree = tree_of(train__checkpoint_steps=7, skip__criterion="stale") | {"distributed": sent}
    whole = train(runs, tree, 2, float64=False)
    assert train_together(tree, runs, 2, float64=False, sabotage=vanish_on_every_rank) == ["killed"] * 2
    again = train(runs, tree, 2, float64=False)
    assert (whole.path / "model.safetensors").read_bytes() == (again.path / "model.safetensors").read_bytes()
    plain = train(runs, tree | {"distributed": {}}, 2, float64=False)
    for what in ("dense gradients", "row gradients"):
        assert whole.counts["sent_bytes_per_step"][what] < 0.7 * plain.counts["sent_bytes_per_step"][what]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_one_of_two_ranks_is_killed_at_twenty_moments_and_nothing_is_lost(runs: Path, tmp_path: Path):
    tree = tree_of(epochs=6, skip__criterion="stale", train__checkpoint_steps=5, train__log_every=1)
    tree["distributed"] = {"timeout_seconds": 20.0}  # killed before it joined, a rank is missed by nothing else
    whole = train(runs, tree, 2, float64=False)
    pipeline = write_toml(tmp_path / "tiny_test.toml", tree)
    command = [sys.executable, "-m", "slipstream", "train", str(pipeline), "--runs", str(runs)]
    rng = random.Random(0)
    for _ in range(20):
        port = free_port()
        ranks = [
            subprocess.Popen(command, env=subprocess_environment() | world_of(rank, 2, port), stderr=subprocess.DEVNULL)
            for rank in range(2)
        ]
        time.sleep(rng.uniform(4, 9))
        ranks[rng.randrange(2)].send_signal(signal.SIGKILL)
        for rank in ranks:
            rank.wait(120)
    again = train(runs, tree, 2, float64=False)
    assert (whole.path / "model.safetensors").read_bytes() == (again.path / "model.safetensors").read_bytes()
