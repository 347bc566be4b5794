"""Runs of the stages in `stage_list.py`: which of them have to run, and why.

Every stage has a key: its config, the fingerprints of its inputs, its seed. A published artifact of that key
is used as it is; otherwise the stage runs. Keys are known before anything runs, so a plan is exact.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from slipstream import __version__
from slipstream.config import PipelineConfig
from slipstream.distributed.environment import count_ranks
from slipstream.distributed.options import refuse_unshared
from slipstream.errors import ArtifactError
from slipstream.io.artifacts import (
    Artifact,
    StageKey,
    complete_publishing,
    describe_altered,
    discard,
    find_artifact,
    find_place,
    leftovers,
    open_artifact,
    parsed_folders,
    publish,
    remove_artifact,
    scratch_dir,
)
from slipstream.io.capacity import peak_memory
from slipstream.io.locks import InUseError, hold_artifact, require_held
from slipstream.options import to_dict
from slipstream.progress import Progress, Silent
from slipstream.stage import StageJob
from slipstream.stage_list import STAGES

if TYPE_CHECKING:
    from slipstream.distributed.ranks import Ranks
    from slipstream.io.figures import FiguresT

_CHANGES_SHOWN = 4
_UP_TO_DATE = "up to date: same config, inputs and seed"


# --- a run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """Whether a stage has to run, and why."""

    stage: str
    will_run: bool
    reason: str
    key: StageKey
    artifact: Artifact | None = None
    """What is published already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResult:
    """What became of a stage."""

    stage: str
    status: str
    """`ran` or `skipped`."""
    reason: str
    seconds: float
    artifact: Artifact


@dataclass(kw_only=True, slots=True)
class RunResult:
    """What became of a run."""

    config: PipelineConfig
    run_dir: Path
    stages: dict[str, StageResult] = field(default_factory=dict)

    def counts(self, stage: str) -> dict[str, Any]:
        """Figures of a stage that ran or was skipped; empty when it was neither."""
        result = self.stages.get(stage)
        return result.artifact.counts if result else {}

    def figures(self, kind: type[FiguresT]) -> FiguresT | None:
        """Typed figures of the stage that reports them; None when it neither ran nor was skipped."""
        result = self.stages.get(kind.stage)
        return kind.of(result.artifact) if result else None

    @property
    def warnings(self) -> list[str]:
        """What looks wrong though nothing failed, each with its stage."""
        return [f"{name}: {text}" for name in self.stages for text in self.counts(name).get("warnings", [])]


class Run:
    """A pipeline and its run folder; what each stage depends on is known, and raw files are hashed once.

    Args:
        config: The pipeline.
        runs_dir: Folder that holds run folders.
        progress: Told how far the hashing of raw files is.
        ranks: Who does stages together with this process; None for nobody.

    Raises:
        DataError: A raw file is missing.
    """

    def __init__(
        self,
        config: PipelineConfig,
        runs_dir: Path,
        progress: Progress | None = None,
        *,
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.run_dir, self._ranks = config, runs_dir / config.name, ranks
        self.stages = {stage.name: stage for stage in STAGES if stage.is_part(config)}
        """By name, in order."""
        self.keys: dict[str, StageKey] = {}
        for name, stage in self.stages.items():
            self.keys[name] = stage.key(config, self.keys, progress or Silent())

    def plan(self) -> list[StagePlan]:
        """Say for every stage whether it would run, and why. Reads manifests, changes nothing."""
        plans: list[StagePlan] = []
        for name, key in self.keys.items():
            published = find_artifact(self.run_dir, key)
            if published is not None:
                altered = published.find_altered()
                reason = describe_altered(published.path, altered) if altered else _UP_TO_DATE
            else:
                reason = _why_run(self.run_dir, key, is_first=not any(plan.will_run for plan in plans))
            plans.append(StagePlan(stage=name, will_run=published is None, reason=reason, key=key, artifact=published))
        return plans

    def execute(
        self,
        asked: Sequence[str] | None,
        *,
        force: bool,
        progress: Progress,
        on_stage: Callable[[StageResult], None],
    ) -> RunResult:
        """Run what has to; as `run_pipeline`."""
        for key in self.keys.values():
            # who holds it publishes it
            with contextlib.suppress(InUseError), hold_artifact(find_place(self.run_dir, key)):
                complete_publishing(self.run_dir, key)
        named = set(self.stages if asked is None else asked)
        chosen = named | {stage.name for stage in self.stages.values() if stage.comes_with in named}
        plans = self.plan()
        result = RunResult(config=self.config, run_dir=self.run_dir)
        # what is there is locked for the stages after it
        with contextlib.ExitStack() as locks:
            for at, plan in enumerate(plans):
                if plan.will_run and plan.stage not in chosen:
                    if not any(later.stage in chosen for later in plans[at:]):
                        break
                    verb = self.stages[plan.stage].comes_with or plan.stage
                    raise ArtifactError(
                        f"stage `{plan.stage}` has no output for this pipeline yet ({plan.reason})",
                        hint=f"run `slipstream {verb}` first, or `slipstream run` for everything",
                    )
                brought_up = self._bring_up(plan, result, progress, forced=force and plan.stage in named)
                locks.enter_context(hold_artifact(brought_up.artifact.path, shared=True))
                open_artifact(brought_up.artifact.path)  # nobody took it away before it was locked
                result.stages[plan.stage] = brought_up
                if plan.stage in chosen:
                    on_stage(brought_up)
        return result

    def _bring_up(self, plan: StagePlan, result: RunResult, progress: Progress, *, forced: bool) -> StageResult:
        """Run a stage, or take what it has published."""
        if not forced and plan.artifact is not None:
            if plan.reason != _UP_TO_DATE:
                raise ArtifactError(plan.reason, hint=plan.artifact.remedy)
            return StageResult(
                stage=plan.stage, status="skipped", reason=plan.reason, seconds=0.0, artifact=plan.artifact
            )
        with hold_artifact(find_place(self.run_dir, plan.key)) as claim:
            if forced:
                remove_artifact(self.run_dir, plan.key)
            elif (published := find_artifact(self.run_dir, plan.key)) is not None:
                reason = "up to date: another process has just made it"
                return StageResult(stage=plan.stage, status="skipped", reason=reason, seconds=0.0, artifact=published)
            return self._run_stage(plan, result, progress, claim, reason="forced" if forced else plan.reason)

    def _run_stage(
        self, plan: StagePlan, result: RunResult, progress: Progress, claim: Path, *, reason: str
    ) -> StageResult:
        started = time.perf_counter()
        stage = self.stages[plan.stage]
        job = StageJob(
            config=self.config,
            key=plan.key,
            inputs={name: stage.artifact for name, stage in result.stages.items()},
            scratch=scratch_dir(self.run_dir, plan.key),
            progress=progress,
            ranks=self._ranks if stage.on_all_ranks else None,
            claim=claim,
        )
        if job.ranks is not None:
            job.ranks.tell(_describe_job(job))
        figures = stage.run(job)
        seconds = time.perf_counter() - started
        require_held(claim)
        artifact = publish(self.run_dir, plan.key, figures.to_json(), seconds=seconds, peak_bytes=peak_memory())
        return StageResult(stage=plan.stage, status="ran", reason=reason, seconds=seconds, artifact=artifact)


def stage_names(config: PipelineConfig) -> list[str]:
    """Stages of a pipeline, in order."""
    return [stage.name for stage in STAGES if stage.is_part(config)]


def plan_pipeline(config: PipelineConfig, runs_dir: Path, progress: Progress | None = None) -> list[StagePlan]:
    """Say for every stage whether it would run, and why. Reads manifests and raw files, changes nothing.

    Raises:
        DataError: A raw file is missing.
    """
    return Run(config, runs_dir, progress).plan()


def run_pipeline(
    config: PipelineConfig,
    runs_dir: Path,
    *,
    stages: Sequence[str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
    on_stage: Callable[[StageResult], None] = lambda result: None,
) -> RunResult:
    """Run the stages that need it.

    Args:
        config: The pipeline.
        runs_dir: Folder that holds run folders.
        stages: Only these, whose inputs must be there; None for all. `segregate` profiles first when needed.
        force: Run the chosen stages even if they are up to date.
        progress: Told how far each stage is.
        on_stage: Told when a stage ran or was skipped.

    Raises:
        SlipstreamError: Whatever a stage expects to go wrong.
    """
    progress = progress or Silent()
    if count_ranks(os.environ) > 1:
        return _run_together(config, runs_dir, stages, force=force, progress=progress, on_stage=on_stage)
    return Run(config, runs_dir, progress).execute(stages, force=force, progress=progress, on_stage=on_stage)


# --- a run on several ranks ----------------------------------------------------------------------------------


def _run_together(
    config: PipelineConfig,
    runs_dir: Path,
    stages: Sequence[str] | None,
    *,
    force: bool,
    progress: Progress,
    on_stage: Callable[[StageResult], None],
) -> RunResult:
    """Run stages as one of several ranks: the first does what `run_pipeline` does, the others what it tells them."""
    refuse_unshared(
        faithful=config.train.faithful,
        representations=config.tables.used,
        kernels=config.train.kernels,
        num_ranks=count_ranks(os.environ),
    )
    from slipstream.distributed.launch import join_ranks

    ranks = join_ranks(device=config.train.device, timeout_seconds=config.distributed.timeout_seconds)
    try:
        settings = json.dumps([__version__, to_dict(config, execution=False)], sort_keys=True)
        ranks.require_equal(xxhash.xxh3_64_intdigest(settings.encode()) >> 1, "settings")
        if ranks.leads:
            run = Run(config, runs_dir, progress, ranks=ranks)
            result = run.execute(stages, force=force, progress=progress, on_stage=on_stage)
            ranks.tell({"ended": {name: str(stage.artifact.path.resolve()) for name, stage in result.stages.items()}})
        else:
            result = _follow(config, runs_dir, ranks)
        ranks.decide(False)  # nobody leaves before all have heard
    except BaseException as exc:
        ranks.fail(exc)
        raise
    return result


def _describe_job(job: StageJob) -> dict[str, Any]:
    """Say what another rank needs to know to do its part of a stage."""
    key = {"stage": job.key.stage, "config": job.key.config, "inputs": job.key.inputs, "seed": job.key.seed}
    inputs = {name: str(artifact.path.resolve()) for name, artifact in job.inputs.items()}
    return {"key": key, "inputs": inputs, "scratch": str(job.scratch.resolve())}


def _follow(config: PipelineConfig, runs_dir: Path, ranks: Ranks) -> RunResult:
    """Do this rank's part of every stage that the first one begins on all of them, until it has no more."""
    stages = {stage.name: stage for stage in STAGES}
    while "ended" not in (message := ranks.listen("rank 0 to bring up the stages before, or to end")):
        key = StageKey(**message["key"])
        job = StageJob(
            config=config,
            key=key,
            inputs={name: open_artifact(Path(path)) for name, path in message["inputs"].items()},
            scratch=Path(message["scratch"]),
            progress=Silent(),
            ranks=ranks,
        )
        stages[key.stage].run(job)
    result = RunResult(config=config, run_dir=runs_dir / config.name)
    for name, path in message["ended"].items():
        result.stages[name] = StageResult(
            stage=name, status="skipped", reason="rank 0 has it", seconds=0.0, artifact=open_artifact(Path(path))
        )
    return result


def export_samples(
    config: PipelineConfig,
    runs_dir: Path,
    *,
    export_format: str,
    out_dir: Path,
    progress: Progress | None = None,
    on_stage: Callable[[StageResult], None] = lambda result: None,
) -> dict[str, Any]:
    """Write the samples of a pipeline for another project, preprocessing them first where needed.

    Returns:
        What export.json says.

    Raises:
        SlipstreamError: Whatever preprocess or the export expects to go wrong.
    """
    from slipstream.stages import export

    export.check_format(export_format)
    progress = progress or Silent()
    result = run_pipeline(config, runs_dir, stages=["preprocess"], progress=progress, on_stage=on_stage)
    processed = result.stages["preprocess"].artifact
    return export.run(processed, export_format=export_format, out_dir=out_dir, progress=progress)


def export_model(
    model: Path, *, out: Path, representation: str | None = None, format_name: str = "folder"
) -> dict[str, Any]:
    """Write a trained model elsewhere: as it is, rounded and packed, or in the format of another program.

    Returns:
        Where it is, its bytes, and those of its weights before.

    Raises:
        SlipstreamError: Whatever the export expects to go wrong.
    """
    from slipstream.stages import export_model

    return export_model.run(model, out=out, representation=representation, format_name=format_name)


def score_lines(
    models: Sequence[Path],
    *,
    raw: Sequence[str],
    out: Path,
    keep: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score raw lines by a trained model, or by the mean of several.

    Args:
        models: Folders of the models.
        raw: Paths, globs, addresses, or `-` for standard input.
        out: File to write: Parquet, CSV or JSON lines by its suffix.
        keep: Columns of a line to pass on.
        progress: Told how far it is.

    Returns:
        Lines, samples, rejects, and with labels the quality; see `stages.score.run`.

    Raises:
        SlipstreamError: Whatever scoring expects to go wrong.
    """
    from slipstream.serving.model import ServedModel
    from slipstream.stages import score

    return score.run(list(map(ServedModel, models)), raw=raw, out=out, keep=keep, progress=progress or Silent())


def clean_run(runs_dir: Path, name: str) -> list[Path]:
    """Remove what killed processes left in a run folder, and parsed chunks; returns what was removed.

    What somebody works in stays.
    """
    run_dir, is_in_use = runs_dir / name, False
    removed = []
    for path in leftovers(run_dir):
        try:
            with hold_artifact(path.with_name(path.name.strip(".").partition(".")[0])):
                discard(path)
                removed.append(path)
        except InUseError:
            is_in_use = True  # somebody works in it, and perhaps on parsed chunks
    for path in [] if is_in_use else parsed_folders(run_dir):
        discard(path)
        removed.append(path)
    return removed


def find_altered(config: PipelineConfig, runs_dir: Path) -> dict[str, list[str]]:
    """Hash every file that the stages of a pipeline have published.

    Returns:
        By stage that has something published, names of files that are missing or altered.

    Raises:
        ArtifactError: A manifest is damaged.
        DataError: A raw file is missing.
    """
    published = (find_artifact(runs_dir / config.name, key) for key in Run(config, runs_dir).keys.values())
    return {one.manifest["stage"]: one.find_altered(by_hash=True) for one in published if one is not None}


def latest_artifact(run_dir: Path, stage: str) -> Artifact | None:
    """Give the artifact of a stage that was published last, whatever its key."""
    published = [path for path in (run_dir / stage).glob("[0-9a-f]*") if (path / "manifest.json").exists()]
    if not published:
        return None
    return open_artifact(max(published, key=lambda path: (path / "manifest.json").stat().st_mtime_ns))


def _why_run(run_dir: Path, key: StageKey, *, is_first: bool) -> str:
    previous = latest_artifact(run_dir, key.stage)
    if (run_dir / key.stage / f".{key.fingerprint}.partial").exists():
        return "interrupted before; finished parts are kept"
    if previous is None:
        return "no output yet"
    changes = _changes(previous.manifest["config"], dict(key.config))
    if changes:
        more = f"; and {len(changes) - _CHANGES_SHOWN} more" if len(changes) > _CHANGES_SHOWN else ""
        return "config changed: " + "; ".join(changes[:_CHANGES_SHOWN]) + more
    if previous.manifest["inputs"] != dict(key.inputs):
        names = [name for name in key.inputs if previous.manifest["inputs"].get(name) != key.inputs[name]]
        return "inputs changed: " + ", ".join(names)
    if previous.manifest["seed"] != key.seed:
        return f"seed changed: {previous.manifest['seed']} -> {key.seed}"
    return "format changed" if is_first else "inputs changed"


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    changes = []
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changes += _changes(old, new, f"{prefix}{name}.")
        elif old != new:
            changes.append(f"{prefix}{name} {old} -> {new}")
    return changes
