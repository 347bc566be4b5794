"""What holds for every skip criterion, whatever it goes by: it needs to be known to its registry alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from strategies import make_samples, tiny_config
from trained import run_on_copies

from slipstream.compare import make_grid
from slipstream.errors import ConfigError
from slipstream.pipeline import RunResult
from slipstream.stage import row_bytes_of
from slipstream.training import checkpoint
from slipstream.training.skipping.criterion import Candidates, Choice, Criterion, SkipRule
from slipstream.training.skipping.registry import CRITERIA, make_criterion

ROOT = Path(__file__).parents[3]


class EverySecond(Criterion):
    """The criterion of a test: drops every second sample that it is asked about, and goes on counting where it was."""

    def __init__(self, rule: SkipRule) -> None:
        super().__init__(rule)
        self._seen = 0

    def choose(self, candidates: Candidates, *, rng: np.random.Generator) -> Choice:
        places = np.arange(self._seen, self._seen + len(candidates))
        self._seen += len(candidates)
        return Choice(keep=places % 2 == 0)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return {"seen": self._seen}, {}

    def restore(self, plain: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        self._seen = plain["seen"]


class Killed(BaseException):
    """Stands in for kill -9."""


def train(runs: Path, **overrides: Any) -> RunResult:
    chosen = {"skip__criterion": "every_second", "skip__scope": "all", "train__mode": "slipstream"}
    return run_on_copies(tiny_config(**chosen, **overrides), runs)


def test_a_criterion_that_is_registered_trains_and_drops_what_it_says(tiny_runs: Path):
    with CRITERIA.registered("every_second", EverySecond, summary="Every second sample"):
        trained = train(tiny_runs).counts("train")
        assert [variant.name for variant in make_grid([], ["all"], [])][-1] == "every_second"
    assert trained["samples_dropped"] == trained["samples_classified"] // 2 > 100
    with pytest.raises(ConfigError, match=r"`skip\.criterion` must be one of .*, found 'every_second'"):
        tiny_config(skip__criterion="every_second")


def test_a_criterion_that_is_registered_goes_on_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = {"train__checkpoint_steps": 31, "train__chunk_batches": 2, "train__epochs": 2}
    with CRITERIA.registered("every_second", EverySecond):
        whole = train(tmp_path / "whole", **settings)
        original = checkpoint.Checkpointer._save

        def save_then_die(self: checkpoint.Checkpointer, trainer: Any) -> None:
            original(self, trainer)
            assert trainer.skipper.classified > 0
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.Checkpointer, "_save", save_then_die)
            with pytest.raises(Killed):
                train(tmp_path / "cut", **settings)
        resumed = train(tmp_path / "cut", **settings)
    ours, theirs = (load_file(one.stages["train"].artifact.path / "model.safetensors") for one in (whole, resumed))
    assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []
    assert whole.counts("train")["samples_dropped"] == resumed.counts("train")["samples_dropped"]


def test_the_names_and_their_summaries_are_those_of_the_modules():
    assert set(CRITERIA.names()) == {"none", "stale", "random", "negative", "importance"}
    assert all(len(CRITERIA.summary(name)) > 10 for name in CRITERIA.names())


def test_every_criterion_is_known_and_planned_without_heavy_packages():
    code = """
import sys
from slipstream.training.skipping.criterion import SkipRule
from slipstream.training.skipping.registry import CRITERIA, make_criterion
for name in CRITERIA.names():
    make_criterion(SkipRule(criterion=name, target_drop=.1)).tracker_bytes(embedding_dim=4)
    assert not {"torch", "polars", "pyarrow"} & set(sys.modules), name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", CRITERIA.names())
def test_a_criterion_classifies_no_more_than_it_can(name: str):
    rule = tiny_config(train__mode="slipstream", skip__criterion=name, skip__scope="all").skip_rule
    assert rule.scope == CRITERIA.get(name).scopes[-1]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"criterion": "random"}, 0), ({"movement": "net"}, 4 * 4 + 1), ({"movement": "per-label"}, 16)],
)
def test_a_hot_row_costs_what_its_criterion_keeps_beside_it(settings: dict[str, str], expected: int):
    plain = tiny_config(train__mode="fae")
    chosen = tiny_config(train__mode="slipstream", skip=settings)
    assert row_bytes_of(chosen) - row_bytes_of(plain) == expected


def test_a_comparison_takes_every_criterion_that_drops_with_its_widest_scope():
    scopes = {variant.name: variant.overrides[-1] for variant in make_grid([], ["all"], [])}
    wide = dict.fromkeys(("importance", "negative", "random"), "skip.scope=all")
    assert scopes == wide | {"stale": "skip.scope=hot"}
    with pytest.raises(ConfigError, match=r"expected criteria among .*, found `rondom`"):
        make_grid([], ["rondom"], [])


@pytest.mark.parametrize("name", sorted(set(CRITERIA.names()) - {"stale"}))
def test_only_what_watches_rows_has_a_tracker(name: str):
    criterion = make_criterion(SkipRule(criterion=name, target_drop=0.3))
    assert not criterion.watches_rows
    calls: list[Callable[[Any], Any]] = [criterion.make_tracker, criterion.watch]
    for call in calls:
        with pytest.raises(NotImplementedError, match="watches no rows"):
            call(np.zeros((2, 2)))


def test_candidates_count_what_is_due_over_all_rounds():
    groups = [make_samples(np.zeros((size, 2), int)) for size in (3, 4)]
    candidates = Candidates(groups=groups, classified=10, dropped=1, score=lambda samples: samples.y)
    assert len(candidates) == 7 and len(candidates.labels()) == 7
    assert candidates.num_drop(0.5) == round(8.5) - 5 and candidates.num_due(0.5) == round(8.5) - 1
    assert candidates.predict().tolist() == candidates.labels().tolist()
    assert candidates.watched_slots().shape == (7, 2)
