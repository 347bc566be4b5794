"""What `from slipstream import run, load` gives: the command line's main job, and its result, from Python."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from slipstream.config import load_pipeline
from slipstream.errors import ArtifactError, ConfigError
from slipstream.io.processors import wait_without_spinning
from slipstream.options import to_toml
from slipstream.pipeline import RunResult, run_pipeline
from slipstream.progress import Silent
from slipstream.shipped import find_pipeline

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

    from slipstream.serving.encoder import Encoder
    from slipstream.serving.ensemble import Ensemble
    from slipstream.serving.model import ServedModel


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a run."""

    run: RunResult
    """Stage by stage, with the config."""
    pipeline: str = ""
    """Pipeline file or name, as it was given."""
    overrides: tuple[str, ...] = ()
    """As `--set` takes them."""

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        """The figures of every stage, as `--json` prints them, by stage."""
        return {name: stage.artifact.counts for name, stage in self.run.stages.items()}

    @property
    def paths(self) -> dict[str, Path]:
        """The folder of every stage's artifact, by stage."""
        return {name: stage.artifact.path for name, stage in self.run.stages.items()}

    @property
    def warnings(self) -> list[str]:
        """What looks wrong though nothing failed, each with its stage."""
        return self.run.warnings

    @property
    def model(self) -> Path:
        """The folder of the trained model, for `slipstream.load`.

        Raises:
            ArtifactError: Training was not asked for.
        """
        return self._path("train")

    def curve(self) -> pl.DataFrame:
        """Say what budgets buy: one row for each budget, policy and split, as profile wrote them."""
        import polars as pl

        return pl.read_parquet(self._path("profile") / "curve.parquet")

    def losses(self) -> pl.DataFrame:
        """Training loss: `step`, the last of each stretch of `train.log_every` steps, and `loss`, the mean over it."""
        import polars as pl

        losses: list[float] = json.loads((self.model / "losses.json").read_text(encoding="utf-8"))
        every, last = self.run.config.train.log_every, self.figures["train"]["steps"]
        steps = [min(every * number, last) for number in range(1, len(losses) + 1)]
        return pl.DataFrame({"step": steps, "loss": losses}, schema={"step": pl.Int64, "loss": pl.Float64})

    def predictions(self, split: str = "test") -> pl.DataFrame:
        """Predict nothing anew: `probability` and `label` of every sample of a split, as training left them.

        Args:
            split: `test` or `val`.

        Raises:
            ValueError: There is no such split.
        """
        import numpy as np
        import polars as pl

        if split not in ("test", "val"):
            raise ValueError(f"expected split test or val, found {split!r}")
        probabilities: np.ndarray = np.load(self.model / f"predictions_{split}.npy", allow_pickle=False)
        labels = pl.read_parquet(self._path("preprocess") / split / "*.parquet", columns=["label"])
        return pl.DataFrame({"probability": probabilities, "label": labels.get_column("label")})

    def report(self, path: str | Path) -> int:
        """Write what the run left behind as one HTML page with charts; needs the extra `report`.

        Args:
            path: File to write.

        Returns:
            Bytes of the file.

        Raises:
            ConfigError: The extra is not installed.
            ArtifactError: An artifact was altered or removed since.
        """
        from slipstream.report.run_page import write_run_page

        runs_dir = self.run.run_dir.parent
        command = ["slipstream", "run", self.pipeline or self.run.config.name, "--runs", str(runs_dir)]
        command += [part for override in self.overrides for part in ("--set", override)]
        return write_run_page(self.run.config, runs_dir, Path(path), command=command, progress=Silent())

    def _path(self, stage: str) -> Path:
        if stage not in self.run.stages:
            raise ArtifactError(f"stage `{stage}` was not part of this run", hint="leave `stages` out to run them all")
        return self.run.stages[stage].artifact.path


def run(
    pipeline: str | Path = "tiny",
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    runs: str | Path = "runs",
    stages: Sequence[str] | None = None,
    force: bool = False,
) -> Result:
    """Run every stage that needs it, from raw log to trained model: what `slipstream run` does, without its output.

    Args:
        pipeline: Pipeline file, or the name of a shipped one.
        overrides: `{"train.mode": "resident"}`, or `["train.mode=resident"]` as for `--set`. A value may itself be a
            mapping, for a whole section.
        runs: Folder that holds run folders.
        stages: Only these, whose inputs must be there; None for all.
        force: Run even what is up to date.

    Returns:
        Figures, frames and folders.

    Raises:
        SlipstreamError: Whatever the command line reports with exit code 1 or 2.
    """
    if isinstance(overrides, str):
        raise ConfigError(
            f"expected overrides as a mapping or a list, found the text {overrides!r}", hint="put it in [ ]"
        )
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={to_toml(key, value)}" for key, value in overrides.items()]
    wait_without_spinning(os.environ)
    config = load_pipeline(find_pipeline(str(pipeline)), overrides)
    result = run_pipeline(config, Path(runs), stages=stages, force=force)
    return Result(result, pipeline=str(pipeline), overrides=tuple(overrides))


@overload
def load(folder: str | Path, /) -> ServedModel: ...


@overload
def load(folder: str | Path, /, *others: str | Path) -> Ensemble: ...


def load(folder: str | Path, /, *others: str | Path) -> ServedModel | Ensemble:
    """Load a trained model to predict with, or several whose probabilities are averaged.

    Args:
        folder: Folder of a train artifact, or of an exported model.
        others: Further ones.

    Returns:
        Of one folder an `nn.Module` on the CPU, in evaluation mode: `model(dense, rows)` gives logits,
        `model.predict(dense, rows)` probabilities of encoded samples, `model.score(path or frame)` those of raw lines.
        Of several an `Ensemble`, whose `score(path or frame)` gives the mean of theirs.

    Raises:
        ArtifactError: A folder holds no whole model.
        ConfigError: Two models read lines of different formats.
    """
    wait_without_spinning(os.environ)
    from slipstream.serving.ensemble import Ensemble
    from slipstream.serving.model import ServedModel

    model = ServedModel(Path(folder))
    return Ensemble([model, *(ServedModel(Path(other)) for other in others)]) if others else model


def load_encoder(folder: str | Path) -> Encoder:
    """Load what turns raw samples into the inputs of a model, without the model: a server of its ONNX export needs it.

    Args:
        folder: Folder of a train artifact, or of an exported model.

    Returns:
        An encoder: `encode_values` takes samples by name. It does not load torch.

    Raises:
        ArtifactError: The folder holds no whole model, or does not say how lines are encoded.
    """
    from slipstream.io.model_folder import read_description
    from slipstream.serving.encoder import Encoder

    return Encoder(Path(folder), read_description(Path(folder)))
