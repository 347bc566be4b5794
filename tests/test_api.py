"""The package from Python: what `import slipstream` gives, and what it does not load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from raw_logs import make_lines, subprocess_environment, write_pipeline, write_raw
from torch import nn

import slipstream
from slipstream import embedding
from slipstream.api import Result
from slipstream.errors import ArtifactError, ConfigError, DataError

LINES = make_lines(700)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("api")
    pipeline = write_pipeline(folder / "run.toml", write_raw(folder / "log.tsv", LINES))
    options = {"train.batch_size": 64, "train.log_every": 4, "train.lr_decay": "linear", "profile.curve": [0.1, 0.5]}
    return slipstream.run(pipeline, options, runs=folder / "runs")


@pytest.mark.parametrize("statement", ["import slipstream", "import slipstream.embedding", "import slipstream.cli"])
def test_an_import_loads_nothing_heavy(statement: str):
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=subprocess_environment()
    )
    assert not {"torch", "polars", "pyarrow"} & set(done.stdout.split())


def test_the_public_names_are_there_and_others_are_not():
    assert {"run", "load"} <= set(dir(slipstream))
    for name in embedding.__all__:
        assert getattr(embedding, name).__name__ == name
    with pytest.raises(AttributeError, match="TableBag"):
        _ = embedding.TableBag
    with pytest.raises(AttributeError, match="walk"):
        _ = slipstream.walk


def test_a_run_gives_its_figures_frames_and_folders(result: Result):
    assert set(result.figures) == set(result.paths) == {"preprocess", "profile", "segregate", "train"}
    assert result.run.config.train.batch_size == 64 and result.run.config.train.lr_decay == "linear"
    assert set(result.curve()["row_share"]) == {0.1, 0.5}
    losses = result.losses()
    assert losses["step"].to_list() == [
        *range(4, result.figures["train"]["steps"], 4),
        result.figures["train"]["steps"],
    ]
    for split in ("test", "val"):
        predicted = result.predictions(split)
        assert predicted.height == result.figures["preprocess"]["samples"][split]
        assert predicted["label"].sum() == result.figures["preprocess"]["positives"][split]
    with pytest.raises(ValueError, match="expected split test or val"):
        result.predictions("train")


def test_overrides_may_be_those_of_the_command_line(result: Result, tmp_path: Path):
    config = result.run.config
    again = slipstream.run(
        write_pipeline(tmp_path / "run.toml", config.dataset.raw[0]),
        ["train.batch_size=64", "preprocess.num_buckets=7"],
        runs=tmp_path,
        stages=["preprocess"],
    )
    assert again.figures["preprocess"]["rows_per_table"]["cat_20"] <= 8
    with pytest.raises(ArtifactError, match="stage `train` was not part of this run"):
        _ = again.model
    with pytest.raises(ConfigError, match=r"unknown key `train\.batch_sise`"):
        slipstream.run("tiny", {"train.batch_sise": 3})


@pytest.mark.parametrize("name", ["clicks.tsv", "tägliche klicks.tsv", "😀.tsv", 'a "b"\\c.tsv', "\x7f\t.tsv"])
def test_a_path_of_any_name_arrives_unchanged(tmp_path: Path, name: str):
    for raw in (tmp_path / name, str(tmp_path / name)):
        planned = slipstream.run("tiny", {"dataset.raw": raw}, runs=tmp_path, stages=[])
        assert planned.run.config.dataset.raw == (str(tmp_path / name),)


def test_an_override_may_be_a_whole_section(tmp_path: Path):
    tables = {"representation": "int4", "overrides": {"cat_2": {"representation": "tt", "tt_ranks": [4, 4]}}}
    overrides = {"tables": tables, "train.lr": np.float64(0.5)}
    config = slipstream.run("tiny", overrides, runs=tmp_path, stages=[]).run.config
    assert config.tables.representation == "int4" and config.tables.overrides["cat_2"].tt_ranks == (4, 4)
    assert config.train.lr == 0.5


def test_overrides_that_are_none_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"for `train\.mode`, found None"):
        slipstream.run("tiny", {"train.mode": None}, runs=tmp_path)
    with pytest.raises(ConfigError, match=r"a mapping or a list, found the text 'train\.mode=resident'"):
        slipstream.run("tiny", "train.mode=resident", runs=tmp_path)


def test_a_loaded_model_is_a_module_that_predicts_what_training_predicted(result: Result):
    model = slipstream.load(result.model)
    assert isinstance(model, nn.Module) and model.description["encoding"]["source"] == "criteo"
    count = result.figures["preprocess"]["samples"]["test"]
    first = result.figures["preprocess"]["samples"]["train"]
    dense, rows = model.encode([line.decode() for line in LINES[first : first + count]])
    assert np.array_equal(model.predict(dense, rows), result.predictions("test")["probability"].to_numpy())
    logits = model(torch.from_numpy(dense), torch.from_numpy(rows))
    np.testing.assert_allclose(torch.sigmoid(logits).numpy(), model.predict(dense, rows), atol=1e-6)


def test_lines_may_come_as_columns_too(result: Result, tmp_path: Path):
    model = slipstream.load(result.model)
    fields = [line.decode().split("\t") for line in LINES[:40]]
    names = ["label", *(f"int_{at}" for at in range(13)), *(f"cat_{at}" for at in range(26))]
    frame = pl.DataFrame({name: [row[at] or None for row in fields] for at, name in enumerate(names)})
    from_lines, from_frame = model.encode(b"\n".join(LINES[:40])), model.encode(frame)
    assert all(np.array_equal(a, b) for a, b in zip(from_lines, from_frame, strict=True))
    scored = model.score(write_raw(tmp_path / "log.tsv", LINES[:40]), keep=["cat_2"])
    assert scored["line"].to_list() == list(range(1, 41))
    unlabelled = model.score(frame.drop("label"), keep=["cat_2", "label"])
    assert unlabelled["probability"].equals(scored["probability"]) and unlabelled["cat_2"].equals(scored["cat_2"])
    assert unlabelled["label"].null_count() == 40


def test_several_loaded_models_give_the_mean_of_their_probabilities(result: Result, tmp_path: Path):
    raw = write_raw(tmp_path / "log.tsv", LINES[:40])
    one = slipstream.load(result.model).score(raw)
    assert slipstream.load(result.model, result.model).score(raw).equals(one)


def test_a_line_that_is_no_sample_cannot_be_encoded(result: Result):
    with pytest.raises(DataError, match="line 2 is no sample: expected 40 fields, found 1"):
        slipstream.load(result.model).encode([LINES[0].decode(), "nonsense"])


def test_embeddings_are_looked_up_by_raw_id(result: Result):
    model = slipstream.load(result.model)
    vocabulary = pl.read_parquet(result.model / "vocab" / "cat_3.parquet")
    from safetensors.torch import load_file

    table = load_file(result.model / "model.safetensors")["tables.cat_3"]
    asked = [vocabulary["raw_id"][2], "ffffffff", vocabulary["raw_id"][1]]
    assert torch.equal(model.embedding("cat_3", asked), table[[2, 0, 1]])
    with pytest.raises(ValueError, match="expected a table with a vocabulary"):
        model.embedding("cat_99", ["1"])
