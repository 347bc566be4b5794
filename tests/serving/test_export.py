"""Models in the formats of other programs, and the modules of plain operations they are made from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from raw_logs import invoke, make_lines, write_pipeline, write_raw

from slipstream.errors import ArtifactError, ConfigError
from slipstream.serving import export
from slipstream.serving.examples import read_examples
from slipstream.serving.export import write_portable
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
}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("trained")
    pipeline = write_pipeline(folder / "run.toml", write_raw(folder / "log.tsv", make_lines(700)))

    def train(kind: str) -> ServedModel:
        overrides = [f"{key}={value}" for key, value in KINDS[kind].items()]
        assert invoke("run", pipeline, folder / kind, *overrides, "train.batch_size=64").exit_code == 0
        (artifact,) = (folder / kind / "run" / "train").glob("[0-9a-f]*")
        return ServedModel(artifact)

    return train


@pytest.mark.parametrize("kind", KINDS)
def test_plain_operations_predict_what_the_model_predicts(model_of, kind: str):
    model = model_of(kind)
    examples = read_examples(model.folder)
    with torch.inference_mode():
        found = model.portable()(torch.from_numpy(examples.dense), torch.from_numpy(examples.rows).long()).numpy()
    np.testing.assert_allclose(found, model.predict(examples.dense, examples.rows), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["onnx", "torch"])
def test_what_is_written_predicts_the_same_for_any_batch(model_of, kind: str, name: str, tmp_path: Path):
    model = model_of(kind)
    summary = write_portable(model, tmp_path / "model", name=name)
    assert summary["largest_difference"] <= 1e-6
    examples = read_examples(model.folder)
    for count in (1, 3, 50):
        dense, rows = examples.dense[:count], examples.rows[:count].astype(np.int64)
        if name == "onnx":
            session = onnxruntime.InferenceSession(str(tmp_path / "model"), providers=["CPUExecutionProvider"])
            (found,) = session.run(None, {"dense": dense, "rows": rows})
        else:
            with (tmp_path / "model").open("rb") as stream:
                found = torch.export.load(stream).module()(torch.from_numpy(dense), torch.from_numpy(rows)).numpy()
        np.testing.assert_allclose(found, model.predict(dense, rows), rtol=0, atol=1e-6)


# four values of a row take two bytes at 4 bits
@pytest.mark.parametrize(("kind", "stored", "width"), [("int8", "INT8", 4), ("int4", "UINT8", 2)])
def test_tables_are_gathered_and_stay_packed(model_of, tmp_path: Path, kind: str, stored: str, width: int):
    write_portable(model_of(kind), tmp_path / "model.onnx", name="onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    operators = [node.op_type for node in graph.node]
    assert "Loop" not in operators
    assert sum(name.startswith("Gather") for name in operators) >= 26
    packed = [tensor for tensor in graph.initializer if tensor.data_type == getattr(onnx.TensorProto, stored)]
    assert len(packed) == 26 and all(tensor.dims[1] == width for tensor in packed)


def test_a_large_model_keeps_its_weights_in_a_file_beside_it(model_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export, "_LARGEST_FILE", 0)
    write_portable(model_of("dense"), tmp_path / "model.onnx", name="onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])


def test_a_file_that_predicts_something_else_is_not_written(model_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = model_of("dense")
    portable = model.portable()
    with torch.no_grad():
        portable.tables["cat_3"].weight += 0.5
    monkeypatch.setattr(model, "portable", lambda: portable)
    with pytest.raises(ArtifactError, match="predicts otherwise than the model itself"):
        write_portable(model, tmp_path / "model.onnx", name="onnx")
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
