"""The order of stages, what each depends on, and whether it has to run.

    generate -> preprocess -> profile -> segregate -> train        (generate only for source `synthetic`)

Every stage has a key: its config, the fingerprints of its inputs, its seed. A published artifact of that key
is used as it is; otherwise the stage runs. Keys are known before anything runs, so a plan is exact.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from slipstream.config import PipelineConfig
from slipstream.errors import ArtifactError
from slipstream.io.artifacts import (
    Artifact,
    StageKey,
    complete_publishing,
    describe_altered,
    discard,
    find_artifact,
    leftovers,
    open_artifact,
    publish,
    remove_artifact,
    run_lock,
    scratch_dir,
)
from slipstream.ops.hot_set import hot_row_bytes
from slipstream.options import to_dict
from slipstream.progress import Progress, Silent

_VERBS = {"generate": "preprocess", "profile": "segregate"}
"""Commands that run a stage and go on to the next, where that is what a person wants."""


_CHANGES_SHOWN = 4
_UP_TO_DATE = "up to date: same config, inputs and seed"


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

    @property
    def warnings(self) -> list[str]:
        """What looks wrong though nothing failed, each with its stage."""
        return [f"{name}: {text}" for name in self.stages for text in self.counts(name).get("warnings", [])]


def stage_names(config: PipelineConfig) -> list[str]:
    """Stages of a pipeline, in order."""
    first = ["generate"] if config.dataset.source == "synthetic" else []
    return [*first, "preprocess", "profile", "segregate", "train"]


def plan_pipeline(config: PipelineConfig, runs_dir: Path) -> list[StagePlan]:
    """Say for every stage whether it would run, and why. Reads manifests and raw files, changes nothing.

    Raises:
        DataError: A raw file is missing.
    """
    run_dir = runs_dir / config.name
    plans: list[StagePlan] = []
    for key in _stage_keys(config).values():
        published = find_artifact(run_dir, key)
        if published is not None:
            altered = published.find_altered()
            reason = describe_altered(published.path, altered) if altered else _UP_TO_DATE
            plans.append(StagePlan(stage=key.stage, will_run=False, reason=reason, key=key, artifact=published))
        else:
            reason = _why_run(run_dir, key, [plan.stage for plan in plans if plan.will_run])
            plans.append(StagePlan(stage=key.stage, will_run=True, reason=reason, key=key))
    return plans


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
    run_dir = runs_dir / config.name
    result = RunResult(config=config, run_dir=run_dir)
    with run_lock(run_dir):
        for key in _stage_keys(config).values():
            complete_publishing(run_dir, key)
        plans = plan_pipeline(config, runs_dir)
        chosen = set(stage_names(config) if stages is None else stages)
        asked = set(chosen)
        if "segregate" in chosen:
            chosen.add("profile")
        if "preprocess" in chosen:
            chosen.add("generate")
        for plan in plans:
            forced = force and plan.stage in asked
            if plan.stage not in chosen and plan.will_run:
                if all(later.stage not in chosen for later in plans[plans.index(plan) :]):
                    break
                verb = _VERBS.get(plan.stage, plan.stage)
                raise ArtifactError(
                    f"stage `{plan.stage}` has no output for this pipeline yet ({plan.reason})",
                    hint=f"run `slipstream {verb}` first, or `slipstream run` for everything",
                )
            if plan.will_run or forced:
                if forced:
                    remove_artifact(run_dir, plan.key)
                stage = _run_stage(config, plan, run_dir, result, progress or Silent(), forced=forced)
            else:
                assert plan.artifact is not None
                if plan.reason != _UP_TO_DATE:
                    raise ArtifactError(plan.reason, hint=plan.artifact.remedy)
                stage = StageResult(
                    stage=plan.stage, status="skipped", reason=plan.reason, seconds=0.0, artifact=plan.artifact
                )
            result.stages[plan.stage] = stage
            if plan.stage in chosen:
                on_stage(stage)
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


def export_model(artifact: Path, *, representation: str, out_dir: Path) -> dict[str, Any]:
    """Write a trained model with its fp32 tables rounded and packed.

    Returns:
        Bytes of the weights before and after, and how each table is held now.

    Raises:
        SlipstreamError: Whatever the export expects to go wrong.
    """
    from slipstream.stages import export_model

    return export_model.run(open_artifact(artifact), representation=representation, out_dir=out_dir)


def score_lines(
    model: Path,
    *,
    raw: Sequence[str],
    out: Path,
    keep: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score raw lines by a trained model.

    Args:
        model: Folder of the model.
        raw: Paths, globs, addresses, or `-` for standard input.
        out: File to write: Parquet, CSV or JSON lines by its suffix.
        keep: Columns of a line to pass on.
        progress: Told how far it is.

    Returns:
        Lines, samples, rejects, and with labels the quality.

    Raises:
        SlipstreamError: Whatever scoring expects to go wrong.
    """
    from slipstream.serving.model import ServedModel
    from slipstream.stages import score

    return score.run(ServedModel(model), raw=raw, out=out, keep=keep, progress=progress or Silent())


def clean_run(runs_dir: Path, name: str) -> list[Path]:
    """Remove what killed processes left in a run folder; returns what was removed."""
    run_dir = runs_dir / name
    with run_lock(run_dir):
        found = leftovers(run_dir)
        for path in found:
            discard(path)
    return found


def find_altered(config: PipelineConfig, runs_dir: Path) -> dict[str, list[str]]:
    """Hash every file that the stages of a pipeline have published.

    Returns:
        By stage that has something published, names of files that are missing or altered.

    Raises:
        ArtifactError: A manifest is damaged.
        DataError: A raw file is missing.
    """
    published = (find_artifact(runs_dir / config.name, key) for key in _stage_keys(config).values())
    return {one.manifest["stage"]: one.find_altered(by_hash=True) for one in published if one is not None}


def latest_artifact(run_dir: Path, stage: str) -> Artifact | None:
    """The artifact of a stage that was published last, whatever its key."""
    published = [path for path in (run_dir / stage).glob("[0-9a-f]*") if (path / "manifest.json").exists()]
    if not published:
        return None
    return open_artifact(max(published, key=lambda path: (path / "manifest.json").stat().st_mtime_ns))


# --- keys ----------------------------------------------------------------------------------------------------


def _stage_keys(config: PipelineConfig) -> dict[str, StageKey]:
    keys: dict[str, StageKey] = {}
    dataset = config.dataset
    inputs: dict[str, str] = {}
    if dataset.source == "synthetic":
        body: dict[str, Any] = {"num_samples": dataset.num_samples, "num_days": dataset.num_days}
        keys["generate"] = StageKey(stage="generate", config=body, inputs={}, seed=config.seed)
        inputs["generate"] = keys["generate"].fingerprint
    else:
        from slipstream.io.raw import find_raw_files, fingerprint_raw

        digests = [fingerprint_raw(path) for path in find_raw_files(dataset.raw)]
        inputs["raw"] = xxhash.xxh3_64_hexdigest(" ".join(digests).encode())
    body = to_dict(config.preprocess, execution=False)
    body |= {"source": dataset.source, "max_ind_range": dataset.max_ind_range}
    if dataset.source == "taobao":
        body |= {"history_length": dataset.history_length, "points_per_user": dataset.points_per_user}
        body |= {"users_brought_together": True}
    if dataset.negative_keep_ratio < 1:
        body |= {"negative_keep_ratio": dataset.negative_keep_ratio}
    draws = config.preprocess.split == "random" or dataset.source == "taobao" or dataset.negative_keep_ratio < 1
    keys["preprocess"] = StageKey(stage="preprocess", config=body, inputs=inputs, seed=config.seed if draws else 0)
    processed = {"preprocess": keys["preprocess"].fingerprint}
    segregate = config.segregate
    body = to_dict(config.profile, execution=False)
    body |= {
        "sample_aware_power": segregate.sample_aware_power,
        "sample_aware_rounds": segregate.sample_aware_rounds,
    }
    draws = config.profile.sample_ratio < 1
    keys["profile"] = StageKey(stage="profile", config=body, inputs=processed, seed=config.seed if draws else 0)
    body = to_dict(segregate, execution=False)
    if not str(segregate.hot_budget).strip().endswith("%"):
        # a share of all rows is the same rows whatever a row weighs
        body["row_bytes"] = row_bytes_of(config)
    profiled = processed | {"profile": keys["profile"].fingerprint}
    keys["segregate"] = StageKey(stage="segregate", config=body, inputs=profiled, seed=0)
    skip = to_dict(config.skip, execution=False)
    if config.criterion == "none":
        skip = {"refresh_steps": config.skip.refresh_steps}
    elif config.criterion == "stale":
        skip["movement"] = config.movement
    train = to_dict(config.train, execution=False) | {"seed": config.train_seed}
    if config.train.mode != "cached":
        train = {name: value for name, value in train.items() if not name.startswith("cache_")}
    body = {
        "train": train,
        "model": to_dict(config.model, execution=False),
        "skip": skip | {"criterion": config.criterion},
    }
    if not config.tables.is_plain:
        body["tables"] = to_dict(config.tables, execution=False)
    keys["train"] = StageKey(
        stage="train",
        config=body,
        inputs={"segregate": keys["segregate"].fingerprint},
        seed=config.train_seed,
    )
    return keys


def row_bytes_of(config: PipelineConfig) -> int:
    """Accelerator bytes of one hot row under a pipeline's optimizer and skip criterion."""
    return hot_row_bytes(
        embedding_dim=config.model.row_width,
        optimizer=config.train.optimizer,
        movement=config.movement if config.criterion == "stale" else None,
    )


def _why_run(run_dir: Path, key: StageKey, rerun: list[str]) -> str:
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
    return "format changed" if not rerun else "inputs changed"


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    changes = []
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changes += _changes(old, new, f"{prefix}{name}.")
        elif old != new:
            changes.append(f"{prefix}{name} {old} -> {new}")
    return changes


# --- running a stage -----------------------------------------------------------------------------------------


def _run_stage(
    config: PipelineConfig,
    plan: StagePlan,
    run_dir: Path,
    result: RunResult,
    progress: Progress,
    *,
    forced: bool,
) -> StageResult:
    started = time.perf_counter()
    scratch = scratch_dir(run_dir, plan.key)
    inputs = {name: stage.artifact for name, stage in result.stages.items()}
    counts = _STAGES[plan.stage](config, inputs, scratch, progress)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    artifact = publish(run_dir, plan.key, counts, seconds=seconds, peak_bytes=peak)
    reason = "forced" if forced else plan.reason
    return StageResult(stage=plan.stage, status="ran", reason=reason, seconds=seconds, artifact=artifact)


def _generate(
    config: PipelineConfig, inputs: Mapping[str, Artifact], scratch: Path, progress: Progress
) -> dict[str, Any]:
    from slipstream.stages import generate

    return generate.run(config.dataset, seed=config.seed, scratch=scratch, progress=progress)


def _preprocess(
    config: PipelineConfig, inputs: Mapping[str, Artifact], scratch: Path, progress: Progress
) -> dict[str, Any]:
    from slipstream.datasets.registry import SOURCES
    from slipstream.datasets.source import SourceOptions
    from slipstream.io.raw import find_raw_files
    from slipstream.stages import preprocess

    if "generate" in inputs:
        generated = inputs["generate"]
        files = [str(generated.check(path)) for path in generated.files(suffix=".tsv")]
    else:
        files = find_raw_files(config.dataset.raw)
    dataset = config.dataset
    options = SourceOptions(
        files=files,
        seed=config.seed,
        max_ind_range=dataset.max_ind_range,
        history_length=dataset.history_length,
        points_per_user=dataset.points_per_user,
    )
    return preprocess.run(
        config.preprocess,
        source=SOURCES.get(dataset.source)(options),
        files=files,
        seed=config.seed,
        scratch=scratch,
        progress=progress,
        negative_keep_ratio=dataset.negative_keep_ratio,
    )


def _profile(
    config: PipelineConfig, inputs: Mapping[str, Artifact], scratch: Path, progress: Progress
) -> dict[str, Any]:
    from slipstream.stages import profile

    return profile.run(
        config.profile,
        processed=inputs["preprocess"],
        sample_aware_power=config.segregate.sample_aware_power,
        sample_aware_rounds=config.segregate.sample_aware_rounds,
        seed=config.seed,
        scratch=scratch,
        progress=progress,
    )


def _segregate(
    config: PipelineConfig, inputs: Mapping[str, Artifact], scratch: Path, progress: Progress
) -> dict[str, Any]:
    from slipstream.io.counts import read_counts
    from slipstream.stages import segregate

    return segregate.run(
        config.segregate,
        processed=inputs["preprocess"],
        counts=read_counts(inputs["profile"]),
        row_bytes=row_bytes_of(config),
        scratch=scratch,
        progress=progress,
    )


def _train(config: PipelineConfig, inputs: Mapping[str, Artifact], scratch: Path, progress: Progress) -> dict[str, Any]:
    from slipstream.io.counts import read_counts
    from slipstream.stages import train

    return train.run(
        config,
        processed=inputs["preprocess"],
        segregated=inputs["segregate"],
        counts=read_counts(inputs["profile"]),
        fingerprint=_stage_keys(config)["train"].fingerprint,
        scratch=scratch,
        progress=progress,
    )


_STAGES = {
    "generate": _generate,
    "preprocess": _preprocess,
    "profile": _profile,
    "segregate": _segregate,
    "train": _train,
}
