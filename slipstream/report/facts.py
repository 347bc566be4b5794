"""What a run left behind, read from its artifacts and condensed to frames of at most a few thousand lines."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import polars as pl

from slipstream.config import PipelineConfig
from slipstream.errors import ArtifactError
from slipstream.io.artifacts import Artifact, describe_altered, open_artifact
from slipstream.io.counts import read_counts
from slipstream.io.figures import Figures, PreprocessFigures, ProfileFigures, TrainFigures
from slipstream.io.locks import hold_artifact
from slipstream.ops.curves import prediction_histogram, rank_curve, reliability_bins, roc_points
from slipstream.ops.hot_set import table_offsets
from slipstream.ops.learning_rate import learning_rate
from slipstream.pipeline import Run, stage_names
from slipstream.progress import Progress

FiguresT = TypeVar("FiguresT", bound=Figures)
SPLIT_NAMES = {"test": "test", "val": "validation"}
_LR_POINTS = 120


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """A run and its artifacts; every frame is read and condensed when it is asked for."""

    config: PipelineConfig
    run_dir: Path
    artifacts: dict[str, Artifact]
    """Published, by stage, in order."""

    def figures(self, kind: type[FiguresT]) -> FiguresT | None:
        """Typed figures of the stage that reports them; None when it has nothing published."""
        artifact = self.artifacts.get(kind.stage)
        return kind.of(artifact) if artifact else None

    @property
    def missing(self) -> list[str]:
        """Stages that have nothing published."""
        return [name for name in stage_names(self.config) if name not in self.artifacts]

    @property
    def warnings(self) -> list[str]:
        """What looks wrong though nothing failed, each with its stage."""
        return [f"{name}: {text}" for name, one in self.artifacts.items() for text in one.counts.get("warnings", [])]

    def column_title(self, table: str) -> str:
        """Name of a table, with what its column is called where the data come from."""
        encoded = self.figures(PreprocessFigures)
        named = (encoded.columns or {}).get(table) if encoded else None
        return f"{table} ({named})" if named else table

    # --- preprocess --------------------------------------------------------------------------------------------

    def rejects(self) -> pl.DataFrame:
        """Lines that are no samples: `reason` and `lines`, most frequent first."""
        files = self._files("preprocess", "rejects/")
        if not files:
            return pl.DataFrame(schema={"reason": pl.String, "lines": pl.UInt32})
        counted = pl.scan_parquet(files).group_by("reason").agg(pl.len().alias("lines")).collect()
        return counted.sort("lines", "reason", descending=[True, False])

    # --- profile and segregate ---------------------------------------------------------------------------------

    @cached_property
    def _counts(self) -> np.ndarray:
        return read_counts(self.artifacts["profile"])

    @property
    def _rows_per_table(self) -> dict[str, int]:
        encoded = self.figures(PreprocessFigures)
        assert encoded is not None, "profile comes after preprocess"
        return encoded.rows_per_table

    def _by_table(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every table with the counts of its rows."""
        offsets = table_offsets(list(self._rows_per_table.values()))
        for at, name in enumerate(self._rows_per_table):
            yield name, self._counts[offsets[at] : offsets[at + 1]]

    def frequencies(self) -> pl.DataFrame:
        """How lookups fall with rank: `table`, `rank`, `lookups`."""
        parts = [rank_curve(counts).with_columns(pl.lit(name).alias("table")) for name, counts in self._by_table()]
        return pl.concat(parts)

    def tables(self) -> pl.DataFrame:
        """One line per table: `table`, `rows`, `lookups`, `top` (of its top row); with a hot set `hot_rows`, `hits`."""
        frame = pl.DataFrame(
            [
                {"table": name, "rows": len(counts), "lookups": int(counts.sum()), "top": int(counts.max(initial=0))}
                for name, counts in self._by_table()
            ]
        )
        files = self._files("segregate", "hot_set.parquet")
        if not files:
            return frame
        hot = (
            pl.scan_parquet(files)
            .group_by("table")
            .agg(pl.len().cast(pl.Int64).alias("hot_rows"), pl.col("count").sum().alias("hits"))
            .collect()
        )
        numbered = frame.with_columns(pl.int_range(pl.len(), dtype=pl.Int16).alias("number"))
        joined = numbered.join(hot, left_on="number", right_on="table", how="left", maintain_order="left")
        return joined.drop("number").with_columns(pl.col("hot_rows", "hits").fill_null(0))

    def curve(self) -> pl.DataFrame:
        """Say what budgets buy, as profile wrote it, with `hot_share`: hot rows over all rows."""
        profiled = self.figures(ProfileFigures)
        assert profiled is not None
        frame = pl.read_parquet(self._files("profile", "curve.parquet"))
        return frame.with_columns((pl.col("hot_rows") / profiled.rows).alias("hot_share"))

    # --- train -------------------------------------------------------------------------------------------------

    def losses(self) -> pl.DataFrame:
        """Mean training loss of each stretch: `step` (its last) and `loss`."""
        trained = self.figures(TrainFigures)
        assert trained is not None
        losses = self._json("losses.json")
        steps = [min(self.config.train.log_every * number, trained.steps) for number in range(1, len(losses) + 1)]
        return pl.DataFrame({"step": steps, "loss": losses}, schema={"step": pl.Int64, "loss": pl.Float64})

    def learning_rates(self) -> pl.DataFrame:
        """Say what the schedule gives over training: `step` and `lr`, a step being worth its share of all steps."""
        trained, train = self.figures(TrainFigures), self.config.train
        assert trained is not None
        shares = np.linspace(0.0, 1.0, _LR_POINTS)
        return pl.DataFrame(
            {
                "step": shares * trained.steps,
                "lr": [learning_rate(s, lr=train.lr, warmup=train.lr_warmup, decay=train.lr_decay) for s in shares],
            }
        )

    def checks(self) -> pl.DataFrame:
        """Give checks of staleness: `step`, `threshold`, `stale_rows`, `untouched_rows`; empty without any."""
        schema = {"step": pl.Int64, "threshold": pl.Float64, "stale_rows": pl.Int64, "untouched_rows": pl.Int64}
        return pl.DataFrame(self._json("staleness.json"), schema=schema)

    @cached_property
    def events(self) -> pl.DataFrame:
        """What training told TensorBoard: `step`, `tag`, `value`; of a step told twice the later.

        A training that was interrupted leaves one file per attempt, and repeats the steps since its last checkpoint.
        """
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        told = [
            (event.step, value.tag, value.tensor.float_val[0])
            for file in self._files("train", "events/")
            for event in EventFileLoader(str(file)).Load()
            for value in event.summary.value
            if value.tensor.float_val
        ]
        schema = {"step": pl.Int64, "tag": pl.String, "value": pl.Float64}
        frame = pl.DataFrame(told, schema=schema, orient="row")
        return frame.unique(["step", "tag"], keep="last", maintain_order=True).sort("step", maintain_order=True)

    def dropped(self) -> pl.DataFrame:
        """Give samples left out by the rounds that began since the report before: `step`, `dropped`, `total`."""
        told = self.events.filter(tag="train/samples_dropped").select("step", pl.col("value").cast(pl.Int64))
        return told.select("step", pl.col("value").diff().fill_null(pl.col("value")).alias("dropped"), total="value")

    def speeds(self) -> pl.DataFrame:
        """Give samples trained on per second since the start of training: `step`, `samples_per_second`."""
        told = self.events.filter(tag="train/samples_per_second")
        return told.select("step", pl.col("value").alias("samples_per_second"))

    # --- predictions -------------------------------------------------------------------------------------------

    @cached_property
    def _predictions(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By split, labels and probabilities; of splits that have samples."""
        found = {}
        for split in SPLIT_NAMES:
            parts = self._files("preprocess", f"{split}/")
            predicted = self._files("train", f"predictions_{split}.npy")
            if parts and predicted:
                labels = pl.read_parquet(parts, columns=["label"]).get_column("label").to_numpy()
                found[split] = labels, np.load(predicted[0], allow_pickle=False)
        return {split: pair for split, pair in found.items() if len(pair[0])}

    def roc(self) -> pl.DataFrame:
        """ROC curves: `split`, `false_positive_rate`, `true_positive_rate`."""
        return self._of_splits(roc_points)

    def reliability(self) -> pl.DataFrame:
        """Predictions against click rates, binned: `split` and what `reliability_bins` gives."""
        return self._of_splits(reliability_bins)

    def histogram(self) -> pl.DataFrame:
        """Distribution of predictions: `split` and what `prediction_histogram` gives."""
        return self._of_splits(prediction_histogram)

    def _of_splits(self, condense: Callable[[np.ndarray, np.ndarray], pl.DataFrame]) -> pl.DataFrame:
        parts = [
            condense(labels, predicted).with_columns(pl.lit(SPLIT_NAMES[split]).alias("split"))
            for split, (labels, predicted) in self._predictions.items()
        ]
        return pl.concat(parts) if parts else pl.DataFrame()

    def _files(self, stage: str, prefix: str) -> list[Path]:
        """Files of a stage whose names begin so, unaltered; none when it has nothing published.

        Raises:
            ArtifactError: One was altered.
        """
        artifact = self.artifacts.get(stage)
        return [artifact.check(file) for file in artifact.files(prefix)] if artifact else []

    def _json(self, name: str) -> list[float] | list[dict[str, float]]:
        body: list[float] = json.loads(self._files("train", name)[0].read_text(encoding="utf-8"))
        return body


@contextlib.contextmanager
def open_run(config: PipelineConfig, runs_dir: Path, progress: Progress) -> Iterator[RunFacts]:
    """Hold what a pipeline has published, so that nobody takes it away while it is read.

    Raises:
        ArtifactError: Nothing is published, or something was altered.
        DataError: A raw file is missing.
    """
    run = Run(config, runs_dir, progress)
    with contextlib.ExitStack() as locks:
        found = {plan.stage: plan.artifact for plan in run.plan() if plan.artifact is not None}
        if not found:
            raise ArtifactError(
                f"nothing is published in `{run.run_dir}` for this pipeline",
                hint="run `slipstream run` first, with the same pipeline, --runs and --set",
            )
        artifacts = {}
        for stage, artifact in found.items():
            locks.enter_context(hold_artifact(artifact.path, shared=True))
            artifacts[stage] = open_artifact(artifact.path)  # nobody took it away before it was locked
            if altered := artifact.find_altered():
                raise ArtifactError(describe_altered(artifact.path, altered), hint=artifact.remedy)
        yield RunFacts(config=config, run_dir=run.run_dir, artifacts=artifacts)


def joined(names: Sequence[str]) -> str:
    """Names as a person lists them: `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
