from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from strategies import tiny_config, tiny_tree, write_toml
from typer.testing import CliRunner

from slipstream.cli import app
from slipstream.config import build_pipeline
from slipstream.errors import ArtifactError, ConfigError
from slipstream.io.artifacts import Artifact, hash_file
from slipstream.ops.dense import restore_counts, transform_dense
from slipstream.pipeline import export_samples, run_pipeline
from slipstream.progress import Silent
from slipstream.stages import export

SPLITS = ("train", "val", "test")
DENSE, SPARSE = [f"int_{index}" for index in range(13)], [f"cat_{index}" for index in range(26)]


def preprocess(runs: Path, transform: str = "dlrm") -> Artifact:
    config = tiny_config(preprocess__dense_transform=transform, preprocess__missing_flags=transform == "standard")
    return run_pipeline(config, runs, stages=["preprocess"]).stages["preprocess"].artifact


def write(processed: Artifact, out_dir: Path, export_format: str) -> dict[str, Any]:
    return export.run(processed, export_format=export_format, out_dir=out_dir, progress=Silent())


def samples_of(processed: Artifact, split: str) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(path) for path in processed.files(f"{split}/", ".parquet")])


def raw_counts(tiny_runs: Path, processed: Artifact) -> np.ndarray:
    """Dense values as the raw lines have them, missing ones 0, all splits in the order of the lines."""
    (text,) = (tiny_runs / "tiny_test/generate").glob("*/clicks.tsv")
    lines = [line.split("\t") for line in text.read_text().splitlines()]
    return np.array([[int(field or 0) for field in line[1:14]] for line in lines])


@pytest.mark.parametrize("transform", ["dlrm", "standard", "torchrec", "nvidia", "none"])
def test_dlrm_gets_the_counts_it_takes_logarithms_of(tiny_runs: Path, tmp_path: Path, transform: str):
    processed = preprocess(tiny_runs, transform)
    summary = write(processed, tmp_path, "dlrm-npz")
    with np.load(tmp_path / "samples_processed.npz", allow_pickle=False) as data:
        arrays = {name: data[name] for name in data.files}
    assert set(arrays) == {"X_int", "X_cat", "y", "counts"}
    assert {name: str(array.dtype) for name, array in arrays.items()} == dict.fromkeys(arrays, "int32")
    order = pl.concat([samples_of(processed, name) for name in ("train", "test", "val")])
    assert (arrays["X_cat"] == order.select(SPARSE).to_numpy()).all()
    assert (arrays["y"] == order["label"].to_numpy()).all()
    assert arrays["counts"].tolist() == list(processed.counts["rows_per_table"].values())
    assert (arrays["X_cat"] < arrays["counts"]).all()
    counts = np.maximum(raw_counts(tiny_runs, processed), 0)  # chronological: train, then test, then val
    small = counts < (10**5 if transform == "standard" else 10**6)
    assert (arrays["X_int"][small] == counts[small]).all() or transform == "none"
    np.testing.assert_allclose(arrays["X_int"], counts, rtol=1e-6)
    assert summary["dense_transform"] == transform


def test_dlrm_splits_as_we_do(tiny_runs: Path, tmp_path: Path):
    processed = preprocess(tiny_runs)
    write(processed, tmp_path, "dlrm-npz")
    with np.load(tmp_path / "samples_day_count.npz", allow_pickle=False) as data:
        total_per_file = data["total_per_file"]
    with np.load(tmp_path / "samples_processed.npz", allow_pickle=False) as data:
        y, num_dense = data["y"], data["X_int"].shape[1]
    for name in ("samples_day_count", "samples_processed"):
        with zipfile.ZipFile(tmp_path / f"{name}.npz") as archive:
            times = {member.date_time for member in archive.infolist()}
        assert times == {(1980, 1, 1, 0, 0, 0)}, "the same bytes whenever they are written"
    assert len(total_per_file) == 7 and total_per_file.sum() == len(y) and num_dense == 13
    # what DLRM's CriteoDataset does with these files
    offset_per_file = np.array([0, *total_per_file])
    for day in range(7):
        offset_per_file[day + 1] += offset_per_file[day]
    indices = np.array_split(np.arange(len(y)), offset_per_file[1:-1])
    test, val = np.array_split(indices[-1], 2)
    for name, members in (("train", np.concatenate(indices[:-1])), ("test", test), ("val", val)):
        assert (y[members] == samples_of(processed, name)["label"].to_numpy()).all()


def test_torchrec_arrays_have_its_names_shapes_and_types(tiny_runs: Path, tmp_path: Path):
    processed = preprocess(tiny_runs, "torchrec")
    write(processed, tmp_path, "torchrec-npy")
    for split in SPLITS:
        frame = samples_of(processed, split)
        dense, sparse, labels = (
            np.load(tmp_path / f"{split}_{name}.npy", mmap_mode="r") for name in ("dense", "sparse", "labels")
        )
        assert (dense.dtype, sparse.dtype, labels.dtype) == (np.float32, np.int32, np.int32)
        assert labels.shape == (frame.height, 1)
        assert (dense == frame.select(DENSE).to_numpy()).all()
        assert (sparse == frame.select(SPARSE).to_numpy()).all()
        assert (labels[:, 0] == frame["label"].to_numpy()).all()


def test_torchrec_itself_reads_them(tiny_runs: Path, tmp_path: Path):
    criteo = pytest.importorskip("torchrec.datasets.criteo", reason="torchrec is not installed", exc_type=ImportError)
    processed = preprocess(tiny_runs, "torchrec")
    write(processed, tmp_path, "torchrec-npy")
    for split in SPLITS:
        pipe = criteo.InMemoryBinaryCriteoIterDataPipe(
            stage="train",  # the whole file; the stages val and test each take half of one
            dense_paths=[str(tmp_path / f"{split}_dense.npy")],
            sparse_paths=[str(tmp_path / f"{split}_sparse.npy")],
            labels_paths=[str(tmp_path / f"{split}_labels.npy")],
            batch_size=100,
            rank=0,
            world_size=1,
        )
        frame, batches = samples_of(processed, split), list(pipe)
        assert sum(len(batch.labels) for batch in batches) == frame.height
        dense = np.concatenate([batch.dense_features.numpy() for batch in batches])
        assert (dense == frame.select(DENSE).to_numpy()).all()
        assert batches[0].sparse_features.keys() == criteo.DEFAULT_CAT_NAMES
        first = batches[0].sparse_features.to_dict()
        for index, key in enumerate(criteo.DEFAULT_CAT_NAMES):
            assert first[key].values().tolist() == frame[f"cat_{index}"][:100].to_list()
        labels = np.concatenate([batch.labels.numpy() for batch in batches])
        assert (labels == frame["label"].to_numpy()).all()


@pytest.mark.parametrize("row_group_samples", [0, 250])
def test_parquet_is_one_file_a_split_with_every_column(tiny_runs: Path, tmp_path: Path, row_group_samples: int):
    processed = preprocess(tiny_runs)
    export.run(
        processed,
        export_format="parquet",
        out_dir=tmp_path,
        progress=Silent(),
        row_group_samples=row_group_samples,
    )
    for split in SPLITS:
        assert pl.read_parquet(tmp_path / f"{split}.parquet").equals(samples_of(processed, split))
    metadata = pq.read_metadata(tmp_path / "train.parquet")
    largest = max(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
    assert largest == (row_group_samples or 900)


@pytest.mark.parametrize("export_format", export.FORMATS)
def test_the_same_samples_give_the_same_bytes_and_a_list_of_them(tiny_runs: Path, tmp_path: Path, export_format: str):
    processed = preprocess(tiny_runs)
    summaries = [write(processed, tmp_path / name, export_format) for name in ("a", "b")]
    assert summaries[0] == summaries[1]
    told = json.loads((tmp_path / "a" / "export.json").read_text())
    assert told == summaries[0] and told["format"] == export_format
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {*told["files"], "export.json"}
    for name, facts in told["files"].items():
        assert facts == {
            "bytes": (tmp_path / "a" / name).stat().st_size,
            "xxh3": hash_file(tmp_path / "a" / name),
        }
    assert told["samples"] == processed.counts["samples"]


def test_an_export_that_fails_leaves_no_list(tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    processed = preprocess(tiny_runs)
    write(processed, tmp_path, "dlrm-npz")

    def fail(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(export, "write_array", fail)
    with pytest.raises(Exception, match="no space left"):
        write(processed, tmp_path, "dlrm-npz")
    assert not (tmp_path / "export.json").exists()
    assert not list(tmp_path.glob(".*")), "no half-written file stays"


def test_an_altered_part_is_noticed(tmp_path: Path):
    processed = preprocess(tmp_path / "runs")
    part = processed.files("train/", ".parquet")[0]
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="was altered"):
        write(processed, tmp_path / "out", "parquet")


def test_an_unknown_format_is_refused_before_any_work(tmp_path: Path):
    with pytest.raises(ConfigError, match="expected a format among") as caught:
        export_samples(tiny_config(), tmp_path, export_format="dlrm", out_dir=tmp_path / "out")
    assert caught.value.hint == "did you mean `dlrm-npz`?"
    assert not list(tmp_path.iterdir())


def test_fractions_are_not_rounded_for_a_format_of_counts(tmp_path: Path):
    raw = tmp_path / "prices.csv"
    raw.write_text("clicked,price,shop\n" + "".join(f"{at % 2},{at + 0.5},{at % 9}\n" for at in range(400)))
    tree = tiny_tree(dataset__source="table", dataset__raw=[str(raw)])
    tree["dataset"]["columns"] = {"label": "clicked", "dense": ["price"], "sparse": ["shop"]}
    processed = run_pipeline(build_pipeline(tree), tmp_path, stages=["preprocess"]).stages["preprocess"].artifact
    with pytest.raises(ConfigError, match="`int_0` has fractions"):
        write(processed, tmp_path / "out", "dlrm-npz")
    write(processed, tmp_path / "out", "torchrec-npy")


def test_an_export_can_be_imported_again(tiny_runs: Path, tmp_path: Path):
    write(preprocess(tiny_runs), tmp_path, "dlrm-npz")
    config = tiny_config(name="again", dataset={"source": "dlrm_npz", "raw": [str(tmp_path / "samples_processed.npz")]})
    again = run_pipeline(config, tmp_path / "runs", stages=["preprocess"]).counts("preprocess")
    assert again["lines"] == 2400 and again["rejected"] == 0


def test_the_command_line_exports(tiny_runs: Path, tmp_path: Path):
    path = write_toml(tmp_path / "tiny.toml", tiny_tree())
    arguments = ["export", "samples", str(path), "--runs", str(tiny_runs), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--format", "torchrec-npy", "--json"])
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["files"]) == 9
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "2,400 samples in 3 files" in result.stdout
    result = CliRunner().invoke(app, [*arguments, "--format", "csv"])
    assert result.exit_code == 2 and "expected a format among" in result.output


@pytest.mark.parametrize("name", ["dlrm", "nvidia", "torchrec", "none"])
def test_restoring_undoes_the_transform_up_to_a_million(name: str):
    counts = np.arange(0, 1_000_000, 7)
    stored = transform_dense(counts, name=name, minimum=-3)
    assert (restore_counts(stored, name=name, minimum=-3) == counts).all()
    with pytest.raises(ValueError, match="expected one of dlrm"):
        restore_counts(stored, name="sqrt", minimum=0)


def test_counts_beyond_a_million_come_back_to_a_millionth():
    counts = np.random.default_rng(0).integers(10**6, 2**31 - 1, 10_000)
    stored = transform_dense(counts, name="dlrm", minimum=0)
    restored = restore_counts(stored, name="dlrm", minimum=0)
    np.testing.assert_allclose(restored, counts, rtol=1.2e-6)
    again = np.log1p(restored.astype(np.float64)).astype(np.float32)
    assert (again == stored).all(), "DLRM computes the same logarithm"
