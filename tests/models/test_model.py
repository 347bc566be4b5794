"""What holds for every model, whatever its network: it needs to be known to its registry alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from strategies import tiny_config
from torch import Tensor, nn
from trained import run_on_copies

from slipstream.errors import ConfigError
from slipstream.models.model import Model
from slipstream.models.registry import MODELS, read_model
from slipstream.options import require, to_dict
from slipstream.pipeline import RunResult, run_pipeline
from slipstream.stages import export_model
from slipstream.training import checkpoint
from slipstream.training.model_file import load_model
from slipstream.training.predict import click_probabilities


@dataclass(frozen=True, kw_only=True, slots=True)
class Wide(Model):
    """The model of a test: one weight per row, and rows wider than that need."""

    name: str = "wide"
    """This model."""
    padding: int = 1
    """Values of a row that nothing reads."""

    def check(self) -> None:
        require(self.padding >= 0, "model.padding", "at least 0", self.padding)

    @property
    def row_width(self) -> int:
        return self.embedding_dim + self.padding

    def build(self, *, num_dense: int, num_columns: int) -> nn.Module:
        return WideNetwork(num_dense, num_columns, self.embedding_dim)


class WideNetwork(nn.Module):
    def __init__(self, num_dense: int, num_columns: int, width: int) -> None:
        super().__init__()
        self.width, self.dense = width, nn.Linear(num_dense, 1)

    def forward(self, dense: Tensor, rows: Tensor) -> Tensor:
        return self.dense(dense).squeeze(1) + rows[:, :, : self.width].sum(dim=(1, 2))


SECTIONS: dict[str, dict[str, Any]] = {
    "deepfm": {"embedding_dim": 3, "deep_mlp": [8]},
    "dcnv2": {"embedding_dim": 4, "cross_rank": 2, "structure": "parallel", "deep_mlp": [8]},
    "wide": {"embedding_dim": 3, "padding": 1},
}
"""Small ones, with rows of four values; DLRM and TBSM are trained by the tests of training and of taobao."""


@pytest.fixture(autouse=True)
def wide() -> Iterator[None]:
    with MODELS.registered("wide", Wide):
        yield


def train(runs: Path, name: str, **overrides: Any) -> RunResult:
    overrides = {"train__mode": "fae", "train__log_every": 10} | overrides
    return run_on_copies(tiny_config(model={"name": name, **SECTIONS[name]}, **overrides), runs)


def folder_of(result: RunResult) -> Path:
    return result.stages["train"].artifact.path


def assert_same_model(first: RunResult, second: RunResult) -> None:
    ours, theirs = (load_file(folder_of(result) / "model.safetensors") for result in (first, second))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert first.counts("train")["test"] == second.counts("train")["test"]


def predictions_from_disk(result: RunResult) -> np.ndarray:
    network, tables = load_model(folder_of(result))
    frame = pl.concat(map(pl.read_parquet, result.stages["preprocess"].artifact.files("test/", ".parquet")))
    dense, rows = (frame.select(pl.selectors.starts_with(kind)).to_numpy().copy() for kind in ("int_", "cat_"))
    with torch.inference_mode():
        looked_up = tables.look_up(torch.from_numpy(rows).long())
        return click_probabilities(network, torch.from_numpy(dense).float(), looked_up).numpy()


@pytest.mark.parametrize("name", SECTIONS)
def test_every_mode_gives_the_same_model_to_the_bit(tiny_runs: Path, name: str):
    resident = train(tiny_runs, name, train__mode="resident")
    for mode in ("fae", "baseline", "cached"):
        assert_same_model(resident, train(tiny_runs, name, train__mode=mode, train__cache_ratio=0.5))
    description = json.loads((folder_of(resident) / "model.json").read_text())
    assert description["name"] == name
    rows = load_file(folder_of(resident) / "model.safetensors")["tables.cat_1"]
    assert rows.shape == (description["tables"]["cat_1"], 4)


@pytest.mark.parametrize("tables", [{}, {"representation": "int8"}, {"representation": "int4", "quantize_linears": 8}])
@pytest.mark.parametrize("name", SECTIONS)
def test_a_model_predicts_from_disk_what_its_training_predicted(tiny_runs: Path, name: str, tables: dict[str, Any]):
    result = train(tiny_runs, name, tables=tables)
    predicted = np.load(folder_of(result) / "predictions_test.npy", allow_pickle=False)
    assert len(np.unique(predicted)) > 50
    np.testing.assert_array_equal(predictions_from_disk(result), predicted)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_model_trains_on_cores_and_skips_samples(tiny_runs: Path, name: str):
    tables = {"rules": [{"min_rows": 60, "representation": "tt", "tt_ranks": [2, 2]}]}
    result = train(tiny_runs, name, tables=tables, train__mode="slipstream", segregate__hot_budget="50%")
    predicted = np.load(folder_of(result) / "predictions_test.npy", allow_pickle=False)
    np.testing.assert_allclose(predictions_from_disk(result), predicted, rtol=1e-5, atol=1e-6)
    assert result.counts("train")["samples_dropped"] > 0


class Killed(BaseException):
    """Stands in for kill -9."""


@pytest.mark.parametrize("name", SECTIONS)
def test_an_interrupted_training_ends_with_the_same_model(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    settings = {"train__checkpoint_steps": 9, "train__chunk_batches": 2}
    whole = train(tmp_path / "whole", name, **settings)
    original = checkpoint.Checkpointer._save

    def save_then_die(self: checkpoint.Checkpointer, trainer: Any) -> None:
        original(self, trainer)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpointer, "_save", save_then_die)
        with pytest.raises(Killed):
            train(tmp_path / "cut", name, **settings)
    assert_same_model(whole, train(tmp_path / "cut", name, **settings))


@pytest.mark.parametrize("name", MODELS.names())
def test_a_prediction_does_not_depend_on_the_samples_beside_it(name: str):
    torch.manual_seed(0)
    model = MODELS.get(name)()
    network = model.build(num_dense=4, num_columns=9).eval()
    dense, rows = torch.rand(150, 4), torch.randn(150, 9, model.row_width)
    order = torch.randperm(150)[:101]
    with torch.inference_mode():
        assert torch.equal(
            click_probabilities(network, dense, rows)[order], click_probabilities(network, dense[order], rows[order])
        )


@pytest.mark.parametrize("name", SECTIONS)
def test_a_model_learns(tiny_runs: Path, name: str):
    counts = train(tiny_runs, name, train__epochs=2).counts("train")
    assert counts["test"]["auc"] > 0.6


# --- options -------------------------------------------------------------------------------------------------


def test_a_model_from_elsewhere_has_its_keys_and_checks():
    assert tiny_config(model={"name": "wide"}).model == Wide()
    with pytest.raises(ConfigError, match=r"`model\.padding` must be at least 0"):
        tiny_config(model={"name": "wide", "padding": -1})
    with pytest.raises(ConfigError, match=r"unknown key `model\.paddin`") as caught:
        tiny_config(model={"name": "wide", "paddin": 1})
    assert caught.value.hint == "did you mean `model.padding`?"


def test_a_model_that_states_no_name_has_the_one_it_is_registered_by():
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Nameless(Wide):
        name: str = "dlrm"

    with MODELS.registered("nameless", Nameless):
        model = tiny_config(model={"name": "nameless"}).model
        assert model.name == "nameless" and read_model(to_dict(model)) == model


@pytest.mark.parametrize("name", MODELS.names())
def test_a_model_comes_back_from_its_description(name: str):
    sources = MODELS.get(name).sources
    dataset = {"source": sources[0], "raw": [__file__]} if sources else {"source": "synthetic"}
    model = tiny_config(model={"name": name}, dataset=dataset).model
    assert model.name == name and type(model) is MODELS.get(name)
    assert read_model(json.loads(json.dumps(to_dict(model))) | {"num_dense": 13}) == model


def test_an_export_to_int4_asks_for_rows_of_even_width(tiny_runs: Path, tmp_path: Path):
    even, odd = (
        run_pipeline(tiny_config(model={"name": "wide", "embedding_dim": 3, "padding": padding}), tiny_runs)
        for padding in (1, 2)
    )
    export_model.run(even.stages["train"].artifact.path, representation="int4", out=tmp_path / "even")
    assert load_model(tmp_path / "even")[1].look_up(torch.zeros(1, 26, dtype=torch.int64)).shape == (1, 26, 4)
    with pytest.raises(ConfigError, match="the model's rows have 5"):
        export_model.run(odd.stages["train"].artifact.path, representation="int4", out=tmp_path / "odd")


@pytest.mark.parametrize("name", ["deepfm", "dcnv2"])
def test_rows_start_within_the_bound_of_their_model(tiny_runs: Path, name: str):
    result = train(tiny_runs, name, train__lr=1e-30)
    tensors = load_file(folder_of(result) / "model.safetensors")
    for table, num_rows in result.counts("segregate")["tables"].items():
        bound = MODELS.get(name)().initial_bound(num_rows)
        assert bound / 2 < tensors[f"tables.{table}"].abs().max() <= bound * (1 + 1e-6)
    assert tensors["tables.cat_1"].unique().numel() == tensors["tables.cat_1"].numel()


def test_rows_of_odd_width_are_no_int4_tables():
    with pytest.raises(ConfigError, match="found 4, which makes rows of 5 in `deepfm`"):
        tiny_config(model={"name": "deepfm", "embedding_dim": 4}, tables={"representation": "int4"})


def test_the_hot_budget_counts_every_value_of_a_row(tiny_runs: Path):
    hot = {}
    for name in ("deepfm", "dcnv2"):
        model = {"name": name, "embedding_dim": 4, "deep_mlp": [8]}
        config = tiny_config(model=model, segregate__hot_budget="16KiB", train__mode="fae")
        hot[name] = run_pipeline(config, tiny_runs, stages=["segregate"]).counts("segregate")["hot_rows"]
    assert hot == {"deepfm": 16_384 // (5 * 4 + 4), "dcnv2": 16_384 // (4 * 4 + 4)}
