"""One flipped byte in any file that a stage reads stops it, even where size and time look as they did."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from strategies import tiny_config

from slipstream.errors import ArtifactError
from slipstream.pipeline import RunResult, export_model, export_samples, run_pipeline
from slipstream.stages import evaluate

STAGES = ["generate", "preprocess", "profile", "segregate", "train"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run_pipeline(tiny_config(), folder)
    return folder


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "runs"))


def flip_a_byte(file: Path) -> None:
    """Change a byte in the middle of a file, and nothing that `stat` shows."""
    before, content = file.stat(), bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def artifacts(runs: Path) -> dict[str, Path]:
    return {stage: next((runs / "tiny_test" / stage).glob("[0-9a-f]*")) for stage in STAGES}


@pytest.mark.parametrize(
    ("stage", "maker", "pattern", "overrides"),
    [
        ("preprocess", "generate", "clicks.tsv", {}),
        ("profile", "preprocess", "train/*", {}),
        ("profile", "preprocess", "val/*", {}),
        ("segregate", "preprocess", "train/*", {}),
        ("segregate", "preprocess", "train/*", {"segregate__policy": "sample-aware"}),
        ("segregate", "preprocess", "val/*", {}),
        ("segregate", "preprocess", "test/*", {}),
        ("segregate", "profile", "counts.parquet", {}),
        ("train", "profile", "counts.parquet", {"train__mode": "cached", "train__cache_ratio": 0.5}),
        ("train", "segregate", "hot/*", {}),
        ("train", "segregate", "cold/*", {}),
        ("train", "segregate", "val/*", {}),
        ("train", "segregate", "test/*", {}),
        ("train", "segregate", "slots.npz", {}),
    ],
)
def test_a_flipped_byte_in_an_input_stops_the_stage(
    stage: str, maker: str, pattern: str, overrides: dict[str, Any], runs: Path
):
    altered = sorted(artifacts(runs)[maker].glob(pattern))[-1]
    for later in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(runs / "tiny_test" / later)
    flip_a_byte(altered)
    with pytest.raises(ArtifactError, match=re.escape(f"`{altered}` was altered")) as caught:
        run_pipeline(tiny_config(**overrides), runs)
    expected = "the next run makes it again" if maker == "generate" else f"slipstream {maker} --force"
    assert expected in str(caught.value.hint)
    assert not list((runs / "tiny_test").glob(f"{stage}/[0-9a-f]*"))


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_an_altered_model_is_neither_evaluated_nor_exported(name: str, runs: Path, tmp_path: Path):
    result = run_pipeline(tiny_config(), runs)
    trained = result.stages["train"].artifact.path
    flip_a_byte(trained / name)
    with pytest.raises(ArtifactError, match=f"{name}` was altered"):
        evaluate.run(trained, segregated=result.stages["segregate"].artifact, split="val")
    with pytest.raises(ArtifactError, match=f"{name}` was altered"):
        export_model(trained, representation="int8", out=tmp_path / "packed")


def test_altered_samples_are_not_exported(runs: Path, tmp_path: Path):
    flip_a_byte(next(artifacts(runs)["preprocess"].glob("test/*")))
    with pytest.raises(ArtifactError, match="was altered"):
        export_samples(tiny_config(), runs, export_format="parquet", out_dir=tmp_path / "out")


def test_the_remedy_heals_the_run(runs: Path, finished: Path):
    part = next(artifacts(runs)["preprocess"].glob("train/*"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="altered or removed"):
        run_pipeline(tiny_config(), runs)
    healed: RunResult = run_pipeline(tiny_config(), runs, stages=["preprocess"], force=True)
    assert healed.stages["preprocess"].status == "ran"
    again = run_pipeline(tiny_config(), runs)
    assert {stage.status for stage in again.stages.values()} == {"skipped"}
    assert part.read_bytes() == (finished / part.relative_to(runs)).read_bytes()
