from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from strategies import tiny_config
from trained import HELD, artifact_of, predictions_from_disk, predictions_of, run_on_copies

from slipstream.config import build_pipeline
from slipstream.errors import ConfigError
from slipstream.pipeline import RunResult, plan_pipeline, run_pipeline
from slipstream.stage import row_bytes_of
from slipstream.training import faithful
from slipstream.training.skipping.staleness import bisect_threshold, find_threshold

TREE: dict[str, Any] = {
    "name": "faithful",
    "dataset": {"source": "synthetic", "num_samples": 6000},
    "segregate": {"hot_budget": "50%"},
    "model": {"embedding_dim": 4, "bottom_mlp": [8, 4], "top_mlp": [8, 1]},
    "train": {"batch_size": 64, "faithful": True, "num_threads": 1},
}


def run(folder: Path, **changes: dict[str, object]) -> RunResult:
    tree = {
        name: {**value, **changes.get(name, {})} if isinstance(value, dict) else value for name, value in TREE.items()
    }
    tree |= {name: value for name, value in changes.items() if name not in TREE}
    return run_on_copies(build_pipeline(tree), folder)


def test_fae_in_the_published_order_sees_every_sample_once_and_syncs_whole_tables(tmp_path: Path) -> None:
    result = run(tmp_path, train={"mode": "fae"})
    trained, segregated = result.counts("train"), result.counts("segregate")
    assert trained["hot_steps"] == -(-segregated["samples"]["hot"] // 64)

    assert trained["samples_seen"] == segregated["samples"]["hot"] + segregated["samples"]["cold"]
    assert trained["samples_dropped"] == 0
    assert trained["sync_bytes"] == 2 * segregated["hot_rows"] * (4 * 4 + 4)


def test_the_published_order_equals_training_on_one_table_cold_first_then_hot(tmp_path: Path) -> None:
    """With everything hot or everything in one phase, two copies and one owner must agree."""
    settings = {"segregate": {"hot_budget": "100%"}, "profile": {"curve": [0.5]}}
    published = run(tmp_path / "a", train={"mode": "fae", "optimizer": "sgd"}, **settings)
    trained = published.counts("train")

    assert published.counts("segregate")["samples"]["cold"] == 0
    assert trained["hot_steps"] == trained["steps"]
    tables = load_file(published.stages["train"].artifact.path / "model.safetensors")
    initial = run(tmp_path / "b", train={"mode": "fae", "optimizer": "sgd", "lr": 1e-30}, **settings)
    untrained = load_file(initial.stages["train"].artifact.path / "model.safetensors")
    assert not np.array_equal(tables["tables.cat_0"], untrained["tables.cat_0"])


def test_the_published_order_goes_by_net_movement_whatever_the_file_says(tmp_path: Path) -> None:
    train = TREE["train"] | {"mode": "slipstream"}
    configs = [build_pipeline(TREE | {"train": train, "skip": {"movement": kind}}) for kind in ("net", "per-label")]

    assert [config.skip_rule.movement for config in configs] == ["net", "net"]
    assert [row_bytes_of(config) for config in configs] == [16 + 4 + 16 + 1] * 2
    (net, per_label) = (plan_pipeline(config, tmp_path)[-1].key.fingerprint for config in configs)
    assert net == per_label


def test_slipstream_in_the_published_order_drops_near_the_target_once(tmp_path: Path) -> None:
    result = run(tmp_path, train={"mode": "slipstream"}, skip={"target_drop": 0.3, "warmup_steps": 4, "alpha": 0.5})
    trained = result.counts("train")

    total = sum(result.counts("segregate")["samples"][group] for group in ("hot", "cold"))
    assert trained["samples_seen"] + trained["samples_dropped"] == total
    if trained["threshold"]:
        assert trained["drop_achieved"] == pytest.approx(0.3, abs=0.09)
    else:
        assert trained["samples_dropped"] == 0


def test_faithful_goes_with_the_published_modes_only() -> None:
    with pytest.raises(ConfigError, match=r"train\.faithful"):
        build_pipeline(TREE | {"train": {"faithful": True, "mode": "resident"}})


@pytest.mark.parametrize("target", [0.1, 0.3, 0.6])
def test_bisection_agrees_with_the_quantile(target: float) -> None:
    statistic = np.random.default_rng(0).gamma(2.0, 0.01, 50_000).astype(np.float32)

    searched = bisect_threshold(statistic, target_drop=target, tolerance=0.001)
    exact = find_threshold(statistic, target_drop=target)

    assert np.mean(statistic < searched) == pytest.approx(target, abs=0.001)
    assert np.mean(statistic < exact) == pytest.approx(target, abs=1e-4)
    assert searched == pytest.approx(exact, rel=0.02)


def test_bisection_that_misses_the_band_drops_nothing() -> None:
    ties = np.full(100, 0.05, np.float32)

    assert bisect_threshold(ties, target_drop=0.5, tolerance=0.08) == 0.0


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        *(("train", *pair) for pair in [("lr_warmup", 0.1), ("lr_decay", "linear"), ("order", "mixed")]),
        *(
            ("train", *pair)
            for pair in [("chunk_batches", 4), ("staging_rows", 99), ("average", 0.2), ("validate_steps", 5)]
        ),
        *(("train", *pair) for pair in [("checkpoint_steps", 5), ("checkpoint_minutes", 1.0)]),
        *(("skip", *pair) for pair in [("threshold", 0.01), ("threshold", 0.0), ("window_steps", 9)]),
        *(("skip", *pair) for pair in [("refresh_steps", 9), ("scope", "all"), ("scorer", "model")]),
        *(("skip", *pair) for pair in [("floor", 0.2), ("keep_steps", True), ("reweight", False)]),
    ],
)
def test_what_the_published_order_would_ignore_is_refused_by_name(section: str, key: str, value: object) -> None:
    tree = TREE | {"skip": {}}
    tree[section] = tree[section] | {key: value}
    with pytest.raises(ConfigError, match=rf"`train\.faithful` would ignore `{section}\.{key}` = {value!r}: "):
        build_pipeline(tree)
    assert build_pipeline(tree | {"train": tree["train"] | {"faithful": False}})


def test_all_that_would_be_ignored_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"`train.lr_decay` = 'linear', `skip.window_steps` = 3"):
        build_pipeline(TREE | {"train": TREE["train"] | {"lr_decay": "linear"}, "skip": {"window_steps": 3}})


def test_without_dropping_and_without_checkpoints_nothing_is_ignored() -> None:
    train = TREE["train"] | {"mode": "fae", "checkpoint_minutes": 0.0}
    assert build_pipeline(TREE | {"train": train, "skip": {"criterion": "random", "window_steps": 3}})


@pytest.mark.parametrize("criterion", ["random", "negative", "importance"])
def test_a_criterion_that_the_published_order_does_not_know_is_refused(criterion: str) -> None:
    with pytest.raises(ConfigError, match=f"goes with criterion none or stale, found `skip.criterion` = '{criterion}'"):
        build_pipeline(TREE | {"skip": {"criterion": criterion}})


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_published_numbers_are_keys(tmp_path: Path, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With p the window has round(p * hot batches) + 1 steps; what follows is classified, by what is drawn."""
    drawn: list[int] = []

    def search(statistic: np.ndarray, *, target_drop: float, tolerance: float) -> float:
        drawn.append(len(statistic))
        assert (target_drop, tolerance) == (0.3, 0.02)
        return 0.0

    monkeypatch.setattr(faithful, "bisect_threshold", search)
    skip = {"probe_share": p, "tolerance": 0.02, "sample_ratio": 0.1, "warmup_steps": 3}
    result = run(tmp_path, train={"mode": "slipstream"}, skip=skip)
    num_hot = result.counts("segregate")["samples"]["hot"]
    num_batches = -(-num_hot // 64)
    window = round(p * num_batches) + 1
    assert drawn == [int(0.1 * num_hot)]
    assert result.counts("train")["samples_classified"] == num_hot - 64 * (3 + window)


def test_the_published_order_rounds_tables_on_few_bits_too(tiny_runs: Path) -> None:
    options = {"train__mode": "fae", "train__faithful": True, "train__chunk_batches": 16, "tables": HELD["int4"]}
    result = run_pipeline(tiny_config(**options), tiny_runs)
    from_disk = predictions_from_disk(artifact_of(result).path, result, "test")
    assert np.array_equal(predictions_of(result, "test"), from_disk)
