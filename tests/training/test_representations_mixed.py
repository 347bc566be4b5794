"""Tables whose rows differ in what is stored of them: the same as others where they do not, and as small as asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from trained import artifact_of, losses_of, predictions_of, train
from typer.testing import CliRunner

from slipstream.cli import app
from slipstream.errors import ConfigError
from slipstream.io.counts import read_counts
from slipstream.pipeline import RunResult
from slipstream.training.model_file import load_model

WIDTH = 8
WIDE: dict[str, Any] = {"train__mode": "fae", "model__embedding_dim": WIDTH, "model__bottom_mlp": [8, WIDTH]}
EVERY_KIND = {
    "representation": "mixed",
    "mixed_budget": "4%",
    "mixed_formats": ["8", "4", "4/4"],
    "period": 7,
    "overrides": {"cat_0": {"representation": "dense"}, "cat_3": {"representation": "tt", "tt_ranks": [2]}},
}


@pytest.fixture(scope="module")
def mixed(tiny_runs: Path) -> RunResult:
    return train(tiny_runs, tables=EVERY_KIND, **WIDE)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scale_per", ["table", "row"])
def test_a_budget_for_all_rows_gives_what_tables_on_as_many_bits_give(tiny_runs: Path, bits: int, scale_per: str):
    budget = WIDTH * bits // 8 + (4 if scale_per == "row" else 0)
    num_rows = sum(train(tiny_runs, tables={}, **WIDE).counts("segregate")["tables"].values())
    tables = {"scale_per": scale_per, "period": 7}
    plain = train(tiny_runs, tables=tables | {"representation": f"int{bits}"}, **WIDE)
    own = {"representation": "mixed", "mixed_formats": [f"{bits}", "4/4"], "mixed_budget": num_rows * budget}
    found = train(tiny_runs, tables=tables | own, **WIDE)
    assert losses_of(found) == losses_of(plain)
    for split in ("val", "test"):
        assert np.array_equal(predictions_of(found, split), predictions_of(plain, split))
    ours, theirs = (load_file(artifact_of(result).path / "model.safetensors") for result in (found, plain))
    assert all(
        torch.equal(value, ours[name.replace(".pa", ".range_0.pa").replace(".sc", ".range_0.sc")])
        for name, value in theirs.items()
        if name.startswith("tables.")
    )


def test_the_file_holds_what_the_budget_allows_and_the_description_says(mixed: RunResult):
    folder = artifact_of(mixed).path
    tensors, described = load_file(folder / "model.safetensors"), json.loads((folder / "model.json").read_text())
    sizes = mixed.counts("segregate")["tables"]
    assert described["ranges"].keys() == sizes.keys() - {"cat_0", "cat_3"}
    total = 0
    for name, ranges in described["ranges"].items():
        assert sum(part["rows"] for part in ranges) <= sizes[name] == described["tables"][name]
        for at, part in enumerate(ranges):
            packed = tensors[f"tables.{name}.range_{at}.packed"]
            assert packed.shape == (part["rows"], (part["values"] or WIDTH) * part["bits"] // 8)
            total += packed.nbytes
    formats = {(part["bits"], part["values"]) for ranges in described["ranges"].values() for part in ranges}
    assert formats == {(8, None), (4, None), (4, 2)}
    fp32_bytes = 4 * WIDTH * sum(sizes[name] for name in described["ranges"])
    assert 0.0395 * fp32_bytes < total <= 0.04 * fp32_bytes
    figures = mixed.counts("train")["mixed"]
    num_ranges = sum(map(len, described["ranges"].values()))
    assert (figures["bytes"], figures["fp32_bytes"]) == (total + 4 * num_ranges, fp32_bytes)
    assert figures["shared"] + sum(figures["rows"].values()) == sum(sizes[name] for name in described["ranges"])


def test_a_tail_is_looked_up_as_row_0_and_rows_keep_their_last_values(mixed: RunResult):
    _, tables = load_model(artifact_of(mixed).path)
    described = json.loads((artifact_of(mixed).path / "model.json").read_text())
    held_of = {name: sum(part["rows"] for part in ranges) for name, ranges in described["ranges"].items()}
    name = max(held_of, key=lambda name: described["tables"][name] - held_of[name])
    column, held, ranges = described["column_tables"].index(name), held_of[name], described["ranges"][name]
    assert held < described["tables"][name]
    rows = tables.look_up_column(column, torch.arange(described["tables"][name]))
    assert torch.equal(rows[held:], rows[:1].expand(len(rows) - held, -1))
    cut = rows[held - ranges[-1]["rows"] : held]
    assert ranges[-1]["values"] == 2 and not cut[:, :-2].any() and cut[:, -2:].any()
    assert ranges[0]["values"] is None and rows[0, :-2].any(), "the most used ones keep all"


def test_the_most_used_rows_of_all_tables_have_the_most(mixed: RunResult):
    described = json.loads((artifact_of(mixed).path / "model.json").read_text())
    counts, start = read_counts(mixed.stages["profile"].artifact), 0
    least_stored, most_shared = [], []
    for name, num_rows in described["tables"].items():
        if ranges := described["ranges"].get(name):
            held = sum(part["rows"] for part in ranges)
            least_stored.append(counts[start + held - 1] if held > 1 else np.inf)
            most_shared.append(counts[start + held] if held < num_rows else 0)
        start += num_rows
    assert 0 < max(most_shared) <= min(least_stored)


def test_the_run_says_what_rows_are_stored_in(mixed: RunResult):
    done = CliRunner().invoke(app, ["show", str(artifact_of(mixed).path), "--json"])
    figures = json.loads(done.stdout)["counts"]["mixed"]
    assert list(figures["rows"]) == ["8 x 8", "8 x 4", "2 x 4"]


def test_a_budget_that_not_even_the_first_rows_fit_is_refused(tiny_runs: Path):
    with pytest.raises(ConfigError, match=r"`tables.mixed_budget` is too small for 26 tables of .* at least 208 bytes"):
        train(tiny_runs, tables={"representation": "mixed", "mixed_budget": 207}, **WIDE)


def test_ranks_refuse_it_by_name():
    from slipstream.distributed.options import refuse_unshared

    with pytest.raises(ConfigError, match="`tables` held as mixed does not train on 2 ranks"):
        refuse_unshared(faithful=False, representations={"mixed"}, kernels="auto", num_ranks=2)


def test_samples_that_the_device_would_pick_are_refused_by_name(tiny_runs: Path):
    own = {"train__mode": "baseline", "train__cold_access": "in_place", "train__shuffle_on": "device"}
    with pytest.raises(ConfigError, match="the host says of each batch how the rows of mixed tables are stored"):
        train(tiny_runs, tables=EVERY_KIND, **(WIDE | own))
