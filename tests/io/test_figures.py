from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.errors import ArtifactError
from slipstream.io.artifacts import Artifact, StageKey, publish
from slipstream.io.figures import (
    CurveFigures,
    Figures,
    GenerateFigures,
    PreprocessFigures,
    ProfileFigures,
    SegregateFigures,
    TeacherFigures,
    TrainFigures,
)
from slipstream.ops.metrics import Quality

QUALITY = Quality(auc=0.75, logloss=0.5, ne=0.875, calibration=1.0, accuracy=0.75)
SEGREGATED = SegregateFigures(
    samples={"hot": 3, "cold": 5, "val": 1, "test": 1},
    hot_rows=2,
    rows=9,
    access_threshold=4,
    hit_ratio=0.5,
    hot_sample_share=0.375,
    num_dense=1,
    rows_per_table={"cat_0": 4, "cat_1": 5},
)
EVERY: list[Figures] = [
    GenerateFigures(
        num_samples=9,
        positives=2,
        text_bytes=80,
        teacher_auc=0.75,
        teacher_logloss=0.5,
        splits={"train": TeacherFigures(num_samples=9, positives=2, auc=0.75, logloss=0.5)},
    ),
    PreprocessFigures(
        lines=12,
        rejected=2,
        samples={"train": 8, "val": 1, "test": 1},
        positives={"train": 2, "val": 0, "test": 1},
        files=["day_0"],
        num_dense=1,
        rows_per_table={"cat_0": 4},
        table_of_column=[0, 0],
        padding_rows={"cat_0": 1},
        negatives_left_out=0,
    ),
    ProfileFigures(
        samples_counted=8,
        lookups=16,
        rows=9,
        curve=[
            CurveFigures(
                policy="frequency",
                split="val",
                row_share=0.25,
                hot_rows=2,
                access_threshold=4,
                hit_ratio=0.5,
                hot_sample_share=0.25,
            )
        ],
    ),
    SEGREGATED,
    TrainFigures(
        test=QUALITY,
        val=QUALITY,
        device="cpu",
        steps=4,
        hot_steps=1,
        samples_seen=7,
        samples_dropped=1,
        samples_classified=3,
        drop_asked=0.25,
        drop_achieved=0.5,
        threshold=None,
        samples_per_second=70.0,
        train_seconds=0.5,
        bytes_to_device=640,
        bytes_to_host=320,
        hit_ratio=0.5,
        bytes_per_tier={"hot": 64, "cold": 128},
    ),
]


def published(figures: Figures, folder: Path, *, without: str = "") -> Artifact:
    counts = {name: value for name, value in figures.to_json().items() if name != without}
    key = StageKey(stage=figures.stage, config={}, inputs={}, seed=0)
    return publish(folder, key, json.loads(json.dumps(counts)), seconds=0.0, peak_bytes=0)


@pytest.mark.parametrize("figures", EVERY, ids=lambda figures: figures.stage)
def test_figures_come_back_from_an_artifact_as_they_were(figures: Figures, tmp_path: Path):
    assert type(figures).of(published(figures, tmp_path)) == figures


def test_the_json_has_the_names_of_the_files_on_disk():
    counts = SEGREGATED.to_json()
    assert (counts["lambda"], counts["tables"]) == (SEGREGATED.access_threshold, SEGREGATED.rows_per_table)
    assert not {"access_threshold", "rows_per_table"} & counts.keys()


def test_what_is_none_is_left_out_unless_it_has_to_be_told():
    train = EVERY[-1].to_json()
    assert train["threshold"] is None
    assert "sync_bytes" not in train


def test_older_artifacts_without_a_later_figure_stay_readable(tmp_path: Path):
    assert SegregateFigures.of(published(SEGREGATED, tmp_path, without="warnings")) == SEGREGATED


def test_a_missing_figure_says_what_to_run(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"lacks a figure of stage `segregate`.*hit_ratio") as caught:
        SegregateFigures.of(published(SEGREGATED, tmp_path, without="hit_ratio"))
    assert "slipstream segregate --force" in str(caught.value.hint)


def test_an_artifact_of_another_stage_is_refused(tmp_path: Path):
    with pytest.raises(ArtifactError, match="expected stage `profile`, found stage `segregate`"):
        ProfileFigures.of(published(SEGREGATED, tmp_path))


@given(tables=st.integers(1, 4), columns=st.none() | st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_column_i_looks_up_table_i_unless_told_otherwise(tables: int, columns: list[int] | None):
    figures = SegregateFigures.from_json(
        SEGREGATED.to_json() | {"tables": {f"cat_{at}": 3 for at in range(tables)}, "table_of_column": columns}
    )
    assert figures.column_tables == (list(range(tables)) if columns is None else columns)
