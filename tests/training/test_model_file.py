"""Models on disk predict what training predicted, and are as small as promised."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from trained import HELD, artifact_of, predictions_from_disk, predictions_of, train

from slipstream.errors import ArtifactError
from slipstream.training.model_file import load_model


@pytest.mark.parametrize("held", HELD)
def test_a_model_predicts_from_disk_what_its_training_predicted(tiny_runs: Path, held: str):
    result = train(tiny_runs, train__mode="fae", tables=HELD[held])
    for split in ("val", "test"):
        np.testing.assert_array_equal(
            predictions_from_disk(artifact_of(result).path, result, split), predictions_of(result, split)
        )


@pytest.mark.parametrize(("representation", "most"), [("int4", 0.14), ("int8", 0.27)])
def test_a_packed_model_is_small(tiny_runs: Path, representation: str, most: float):
    # rows of 32 values, and the smallest layers around them: tables are nearly all of the model
    model = {"model__embedding_dim": 32, "model__bottom_mlp": [32], "model__top_mlp": [1], "train__mode": "resident"}
    sizes = [
        (artifact_of(train(tiny_runs, tables=tables, **model)).path / "model.safetensors").stat().st_size
        for tables in ({}, {"representation": representation})
    ]
    assert sizes[1] <= most * sizes[0]


def test_packed_tables_hold_integers_and_one_scale(tiny_runs: Path):
    result = train(tiny_runs, train__mode="fae", tables=HELD["int4"])
    tensors = load_file(artifact_of(result).path / "model.safetensors")
    for name, num_rows in result.counts("segregate")["tables"].items():
        packed, scale = tensors[f"tables.{name}.packed"], tensors[f"tables.{name}.scale"]
        assert packed.dtype == torch.uint8 and packed.shape == (num_rows, 2)
        assert scale.shape == () and scale > 0
        values = torch.stack([packed & 15, packed >> 4], dim=-1)
        # the scale is exact at the end: the largest weight is on the last level
        assert int(torch.where(values > 7, 16 - values.int(), values.int()).max()) == 7


def test_a_folder_without_a_whole_model_is_refused(tiny_runs: Path, tmp_path: Path):
    with pytest.raises(ArtifactError, match="expected a trained model"):
        load_model(tmp_path)
    source = artifact_of(train(tiny_runs, train__mode="fae")).path
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    description = json.loads((source / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(description | {"top_mlp": [9, 1]}))
    with pytest.raises(ArtifactError, match="expected a whole model"):
        load_model(tmp_path)
    tables = {name: rows + 1 for name, rows in description["tables"].items()}
    (tmp_path / "model.json").write_text(json.dumps(description | {"tables": tables}))
    with pytest.raises(ArtifactError, match=r"expected table cat_0 of shape \(\d+, \d+\), fp32, found"):
        load_model(tmp_path)
    del description["representations"]
    (tmp_path / "model.json").write_text(json.dumps(description))
    with pytest.raises(ArtifactError, match="older form"):
        load_model(tmp_path)
