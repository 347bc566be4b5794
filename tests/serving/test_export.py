"""Models in the formats of other programs, and the modules of plain operations they are made from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from raw_logs import invoke

from slipstream.errors import ArtifactError, ConfigError
from slipstream.serving import export
from slipstream.serving.examples import Examples, read_examples
from slipstream.serving.export import FORMATS, write_portable
from slipstream.serving.model import ServedModel

KINDS = {
    "dense": {},
    "int8": {
        "tables.representation": "int8",
        "preprocess.dense_transform": "standard",
        "preprocess.missing_flags": "true",
    },
    "int4": {"tables.representation": "int4", "tables.quantize_linears": 4},
    "tt": {"tables.representation": "tt", "tables.tt_ranks": "[2, 3]", "train.mode": "fae"},
    "mixed": {"tables.representation": "mixed", "tables.mixed_budget": "9%"},
    "every": {
        "tables.representation": "int4",
        "tables.quantize_linears": 4,
        "tables.quantize_biases": "true",
        "tables.overrides.cat_0.representation": "dense",
        "tables.overrides.cat_1.representation": "int8",
        "tables.overrides.cat_2.representation": "mixed",
        "tables.mixed_budget": "20%",
        "tables.mixed_formats": "['8', '4']",
        "tables.overrides.cat_3.representation": "tt",
        "tables.overrides.cat_3.tt_ranks": "[2, 3]",
        "train.mode": "fae",
    },
}
"""Settings of trained models; `every` has a table of each kind."""
NUM_TABLES = 5


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory):
    """A model of few tables by the kind of these: how long it takes to write one grows with their number."""
    folder, rng = tmp_path_factory.mktemp("trained"), np.random.default_rng(0)
    names = [f"id_{at}" for at in range(NUM_TABLES)]
    lines = [
        [
            at % 3 % 2,
            rng.integers(100),
            rng.choice(["", "7"]),
            *(rng.integers(9 * (table + 1)) for table in range(NUM_TABLES)),
        ]
        for at in range(700)
    ]
    text = "\n".join(",".join(map(str, line)) for line in [["clicked", "price", "age", *names], *lines])
    (folder / "shop.csv").write_text(text + "\n")
    pipeline = folder / "run.toml"
    pipeline.write_text(
        f'name = "run"\n[dataset]\nsource = "table"\nraw = ["{folder / "shop.csv"}"]\n'
        f'[dataset.columns]\nlabel = "clicked"\ndense = ["price", "age"]\nsparse = {json.dumps(names)}\n'
        "[model]\nembedding_dim = 4\nbottom_mlp = [4]\ntop_mlp = [1]\n[train]\nbatch_size = 64\n"
    )

    @cache
    def train(kind: str) -> Path:
        overrides = [f"{key}={value}" for key, value in KINDS[kind].items()]
        assert invoke("run", pipeline, folder / kind, *overrides).exit_code == 0
        (artifact,) = (folder / kind / "run" / "train").glob("[0-9a-f]*")
        return artifact

    return lambda kind: ServedModel(train(kind))


@pytest.fixture(scope="module")
def onnx_file(model_of, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a table of each kind, written for ONNX Runtime."""
    return written(model_of, "onnx", tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def torch_file(model_of, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, written for PyTorch."""
    return written(model_of, "torch", tmp_path_factory.mktemp("torch"))


def written(model_of, name: str, folder: Path) -> Path:
    summary = write_portable(model_of("every"), folder / "model", name=name)
    assert summary["largest_difference"] <= 1e-6
    return folder / "model"


@pytest.mark.parametrize("kind", KINDS)
def test_plain_operations_predict_what_the_model_predicts(model_of, kind: str):
    model = model_of(kind)
    examples = read_examples(model.folder)
    with torch.inference_mode():
        found = model.portable()(torch.from_numpy(examples.dense), torch.from_numpy(examples.rows).long()).numpy()
    np.testing.assert_allclose(found, model.predict(examples.dense, examples.rows), rtol=0, atol=1e-6)


def assert_predicts_the_same_for_any_batch(model: ServedModel, predict: Callable[..., np.ndarray]) -> None:
    examples = read_examples(model.folder)
    for count in (1, 3, 50):
        dense, rows = examples.dense[:count], examples.rows[:count].astype(np.int64)
        np.testing.assert_allclose(predict(dense, rows), model.predict(dense, rows), rtol=0, atol=1e-6)


def test_what_is_written_for_onnx_predicts_the_same_for_any_batch(model_of, onnx_file: Path):
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    assert_predicts_the_same_for_any_batch(
        model_of("every"), lambda dense, rows: session.run(None, {"dense": dense, "rows": rows})[0]
    )


def test_what_is_written_for_torch_predicts_the_same_for_any_batch(model_of, torch_file: Path):
    with torch_file.open("rb") as stream:
        program = torch.export.load(stream).module()
    assert_predicts_the_same_for_any_batch(
        model_of("every"), lambda dense, rows: program(torch.from_numpy(dense), torch.from_numpy(rows)).numpy()
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"every"}))
@pytest.mark.parametrize("name", ["onnx", "torch"])
def test_models_with_tables_of_one_kind_are_written_too(model_of, kind: str, name: str, tmp_path: Path):
    assert write_portable(model_of(kind), tmp_path / "model", name=name)["largest_difference"] <= 1e-6


def test_tables_are_gathered_and_stay_packed(onnx_file: Path):
    graph = onnx.load(onnx_file).graph
    operators = [node.op_type for node in graph.node]
    assert "Loop" not in operators
    assert sum(name.startswith("Gather") for name in operators) >= NUM_TABLES
    # four values in four bytes, and in two; the mixed table has a range of each
    for stored, num_tables, width in (("INT8", 2, 4), ("UINT8", NUM_TABLES - 3, 2)):
        packed = [tensor for tensor in graph.initializer if tensor.data_type == getattr(onnx.TensorProto, stored)]
        assert len(packed) == num_tables and all(tensor.dims[1] == width for tensor in packed)


def test_a_large_model_keeps_its_weights_in_a_file_beside_it(model_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export, "_LARGEST_FILE", 0)
    write_portable(model_of("dense"), tmp_path / "model.onnx", name="onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])


def test_a_file_that_predicts_something_else_is_not_written(model_of, tmp_path: Path):
    def write_wrongly(model: ServedModel, path: Path, examples: Examples) -> np.ndarray:
        path.write_text("wrong")
        portable = model.portable()
        portable.tables["cat_3"].weight += 0.5
        return portable(torch.from_numpy(examples.dense), torch.from_numpy(examples.rows).long()).numpy()

    with (
        FORMATS.registered("wrong", write_wrongly),
        pytest.raises(ArtifactError, match="the wrong model predicts otherwise than the model itself"),
    ):
        write_portable(model_of("dense"), tmp_path / "model", name="wrong")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "pickle"}, "expected a format: onnx, torch; found `pickle`"),
        ({"taken": True}, "there is a file"),
    ],
)
def test_what_cannot_be_written_is_refused(model_of, tmp_path: Path, options: dict[str, Any], message: str):
    out = tmp_path / "model"
    if options.get("taken"):
        out.write_text("mine")
    with pytest.raises((ConfigError, ValueError), match=re.escape(message)):
        write_portable(model_of("dense"), out, name=options.get("name", "onnx"))


def test_a_model_without_examples_says_so(model_of, tmp_path: Path):
    model = model_of("dense")
    model.folder = tmp_path
    with pytest.raises(ArtifactError, match="expected a model with example samples"):
        write_portable(model, tmp_path / "model.onnx", name="onnx")
