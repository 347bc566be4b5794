"""What a stage of a pipeline is: what its result depends on, and what makes it.

A stage is a module of `stages/` with a function `run_stage(job)`, and one entry of `STAGES` in `stage_list.py`; its
command, its plan, its place in a run and its artifact follow. The entry loads nothing heavy, so a run is planned
without the packages that do the work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipstream.config import PipelineConfig
from slipstream.embedding.rules import OPTIMIZERS
from slipstream.errors import CapacityError
from slipstream.io.artifacts import Artifact, StageKey
from slipstream.options import parse_budget, to_dict
from slipstream.progress import Progress
from slipstream.training.skipping.registry import make_criterion

if TYPE_CHECKING:
    from slipstream.distributed.ranks import Ranks
    from slipstream.io.figures import Figures


@dataclass(frozen=True, kw_only=True, slots=True)
class StageJob:
    """One stage of one run, about to run."""

    config: PipelineConfig
    key: StageKey
    inputs: Mapping[str, Artifact]
    """Artifacts of the stages before it, by stage."""
    scratch: Path
    """Folder to write to; finished parts of an interrupted run are still there."""
    progress: Progress
    """Told how far the stage is."""
    ranks: Ranks | None = None
    """Who does it together, for a stage on all ranks; None for a process alone."""
    claim: Path | None = None
    """File that is there as long as this process holds the artifact; None on ranks that only help."""

    def absolute(self) -> StageJob:
        """Give the same job with paths that other processes understand, wherever they run."""
        inputs = {name: replace(artifact, path=artifact.path.absolute()) for name, artifact in self.inputs.items()}
        claim = None if self.claim is None else self.claim.absolute()
        return replace(self, inputs=inputs, scratch=self.scratch.absolute(), claim=claim)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One entry of the list of stages."""

    name: str
    """Of its module in `stages/`, its command, its folder and, where it has one, its section of the pipeline file."""
    summary: str = ""
    """Of its command; empty where it has none."""
    after: tuple[str, ...] = ()
    """Stages whose artifacts its result depends on, where they are part of the pipeline."""
    comes_with: str = ""
    """Stage whose command runs this one too."""
    is_part: Callable[[PipelineConfig], bool] = field(default=lambda config: True)
    """Whether a pipeline has the stage."""
    on_all_ranks: bool = False
    """Whether all ranks do it together, where there are several; the first does the other stages alone."""
    settings: Callable[[PipelineConfig], Mapping[str, Any]] | None = None
    """Plain values of the pipeline file that its result depends on; None for its section."""
    other_inputs: Callable[[PipelineConfig, Progress], Mapping[str, str]] = field(default=lambda config, progress: {})
    """Fingerprints of what it reads beside artifacts."""
    seed: Callable[[PipelineConfig], int] = field(default=lambda config: config.seed)
    """Seed of what it draws; 0 where it draws nothing."""

    def key(self, config: PipelineConfig, earlier: Mapping[str, StageKey], progress: Progress) -> StageKey:
        """Name everything that the stage's result depends on.

        Args:
            config: The pipeline.
            earlier: Keys of the stages before it.
            progress: Told how far the hashing of raw files is.

        Raises:
            DataError: A raw file is missing.
        """
        inputs = {name: earlier[name].fingerprint for name in self.after if name in earlier}
        return StageKey(
            stage=self.name,
            config=self.settings_of(config),
            inputs=inputs | dict(self.other_inputs(config, progress)),
            seed=self.seed(config),
        )

    def settings_of(self, config: PipelineConfig) -> Mapping[str, Any]:
        """Give the plain values of a pipeline that its result depends on."""
        settings = self.settings or (lambda config: to_dict(getattr(config, self.name), execution=False))
        return settings(config)

    def run(self, job: StageJob) -> Figures:
        """Do the work; returns what the manifest says of it."""
        figures: Figures = import_module(f"slipstream.stages.{self.name}").run_stage(job)
        return figures


def row_bytes_of(config: PipelineConfig) -> int:
    """Count the accelerator bytes of one hot row: as in training, and what the skip criterion keeps of it."""
    watched = make_criterion(config.skip_rule).tracker_bytes(embedding_dim=config.model.row_width)
    return trained_row_bytes(config) + watched


def trained_row_bytes(config: PipelineConfig) -> int:
    """Count the bytes of one row in training: fp32 weights, what the optimizer keeps of it, and its part in a mean."""
    width = config.model.row_width
    return 4 * width * (2 if config.train.average else 1) + OPTIMIZERS.get(config.train.optimizer).state_bytes(width)


def affordable_rows(budget: str | int, num_rows: int, num_oov: int, row_bytes: int, *, num_padding: int = 0) -> int:
    """Count the rows that a hot budget holds.

    Args:
        budget: As `segregate.hot_budget`.
        num_rows: V; more are never hot.
        num_oov: OOV rows, which always are.
        row_bytes: Accelerator bytes of one hot row, all included.
        num_padding: Rows that stand for padding, which are always hot too.

    Raises:
        CapacityError: The rows that are always hot take more.
    """
    asked = parse_budget(budget, total_bytes=num_rows * row_bytes)
    affordable = min(asked // row_bytes, num_rows)
    num_always = num_oov + num_padding
    if affordable < num_always:
        padding = f" and {num_padding} padding rows" if num_padding else ""
        raise CapacityError(
            f"`segregate.hot_budget` = {budget} is {asked:,} bytes and holds {affordable} rows of {row_bytes} "
            f"bytes; the OOV rows of {num_oov} tables{padding} are always hot",
            hint=f"raise it to at least {num_always * row_bytes} bytes",
        )
    return affordable
