"""Questions about hardware, and what answers them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from slipstream.config import PipelineConfig
from slipstream.errors import ArtifactError, CapacityError, ConfigError
from slipstream.io.artifacts import open_artifact
from slipstream.io.capacity import show_bytes
from slipstream.io.counts import read_counts
from slipstream.io.figures import CurveFigures, PreprocessFigures, ProfileFigures
from slipstream.io.locks import hold_artifact
from slipstream.ops.hit_curve import HitCurve, Served
from slipstream.ops.hot_set import CurvePoint, table_offsets
from slipstream.options import parse_budget, parse_bytes
from slipstream.pipeline import StageResult, plan_pipeline, run_pipeline
from slipstream.progress import Progress, Silent
from slipstream.sizing.memory import Memory
from slipstream.sizing.speed import Calibration, Speed, calibrate, forecast_speed, moves_per_sample
from slipstream.stage import affordable_rows, row_bytes_of

POLICIES = ("frequency", "sample-aware")
Kind = Literal["hit ratio", "hot samples", "budget", "device memory", "mode"]
Mode = Literal["resident", "baseline", "fae", "slipstream", "cached"]
_ACROSS_HOT_SETS = ("fae", "slipstream")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One question."""

    kind: Kind
    text: str
    """As it was asked."""
    value: float = 0.0
    """A share in (0, 1], or bytes; a budget is read when the rows are known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a hot set serves and takes."""

    asked: Asked
    policy: str
    served: Served
    budget_bytes: int
    """`segregate.hot_budget` that chooses it."""
    device: dict[str, int]
    """Bytes by part."""
    host: dict[str, int]
    """Bytes by part."""
    disk: dict[str, int]
    """Bytes by part of a cold tier in a file; empty where it is in memory."""
    speed: Speed | None = None
    """As forecast for this machine; None where nothing was calibrated."""

    @property
    def device_bytes(self) -> int:
        """All of the device."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """All of the host."""
        return sum(self.host.values())

    @property
    def disk_bytes(self) -> int:
        """All of the cold tier in a file."""
        return sum(self.disk.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """All answers of a pipeline."""

    pipeline: str
    mode: str
    """Of training, whose hot sets these are."""
    num_rows: int
    """V."""
    num_tables: int
    num_samples: int
    """Training samples of an epoch."""
    row_bytes: int
    """Of a hot row, all included."""
    on_cuda: bool
    """Whether the device is taken to be a GPU."""
    calibration: Calibration | None
    """Of this machine; None where none was asked for."""
    answers: list[Answer]
    """To what was asked, by policy; then all rows on the device, and none."""

    def to_json(self) -> dict[str, Any]:
        """Give them as plain values, with sums."""
        plain = asdict(self)
        for answer, values in zip(self.answers, plain["answers"], strict=True):
            values |= {"device_bytes": answer.device_bytes, "host_bytes": answer.host_bytes}
            values |= {"disk_bytes": answer.disk_bytes}
        return plain


def read_questions(
    *,
    hit_ratios: Sequence[str] = (),
    hot_samples: Sequence[str] = (),
    budgets: Sequence[str] = (),
    device_memories: Sequence[str] = (),
) -> list[Asked]:
    """Turn what was typed into questions; several stand in one text with commas between.

    Args:
        hit_ratios: Shares of lookups, `95%` or `0.95`.
        hot_samples: Shares of samples.
        budgets: As `segregate.hot_budget`: `16GiB`, or `5%` of what all rows take.
        device_memories: `80GB`.

    Raises:
        ConfigError: One is none; names the option.
    """
    questions = [
        Asked(kind="hit ratio", text=text, value=_read_share(text, "--hit-ratio")) for text in _split(hit_ratios)
    ]
    for text in _split(hot_samples):
        questions.append(Asked(kind="hot samples", text=text, value=_read_share(text, "--hot-samples")))
    for text in _split(budgets):
        _read_bytes(partial(parse_budget, total_bytes=100), text, "--budget")
        questions.append(Asked(kind="budget", text=text))
    for text in _split(device_memories):
        size = _read_bytes(parse_bytes, text, "--device-memory")
        questions.append(Asked(kind="device memory", text=text, value=size))
    return questions


def _split(texts: Sequence[str]) -> list[str]:
    return [part.strip() for text in texts for part in text.split(",")]


def _read_bytes(read: Callable[[str], int], text: str, option: str) -> int:
    try:
        return read(text)
    except ValueError as exc:
        raise ConfigError(f"`{option}`: {exc}") from exc


def _read_share(text: str, option: str) -> float:
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = float("nan")
    if not 0 < share <= 1:
        raise ConfigError(f"`{option}` must be a share such as 95% or 0.95, found {text!r}")
    return share


def size_pipeline(
    config: PipelineConfig,
    runs_dir: Path,
    questions: Sequence[Asked],
    *,
    profiles: bool = False,
    calibrates: bool = False,
    progress: Progress | None = None,
    on_stage: Callable[[StageResult], None] = lambda result: None,
) -> Sizes:
    """Answer questions about the hardware of a pipeline.

    Args:
        config: The pipeline.
        runs_dir: Folder that holds run folders.
        questions: What is asked; nothing asks about the budget of the pipeline.
        profiles: Run what a profile takes, where there is none.
        calibrates: Train a few seconds, to forecast how fast hot sets would train on this machine.
        progress: Told how far that is.
        on_stage: Told when a stage ran or was skipped.

    Raises:
        ArtifactError: There is no profile, and none was asked for.
        SlipstreamError: Whatever else preprocess and profile expect to go wrong.
    """
    wanted, progress = ("preprocess", "profile"), progress or Silent()
    if profiles:
        run_pipeline(config, runs_dir, stages=wanted, progress=progress, on_stage=on_stage)
    found = {plan.stage: plan.artifact for plan in plan_pipeline(config, runs_dir, progress) if plan.stage in wanted}
    if missing := [name for name, artifact in found.items() if artifact is None]:
        raise ArtifactError(
            f"expected a profile of `{config.name}` in `{runs_dir / config.name}`: stage `{missing[0]}` has no output "
            "for this pipeline yet",
            hint="add --profile, or run " + " and ".join(f"`slipstream {name}`" for name in missing) + " with the same "
            "pipeline, --runs and --set",
        )
    with contextlib.ExitStack() as locks:
        for artifact in found.values():
            assert artifact is not None
            locks.enter_context(hold_artifact(artifact.path, shared=True))
        encoded, profiled = (open_artifact(artifact.path) for artifact in found.values() if artifact is not None)
        figures = ProfileFigures.of(profiled)
        sizer = Sizer(
            config,
            PreprocessFigures.of(encoded),
            read_counts(profiled),
            figures.curve,
            num_counted=figures.samples_counted,
        )
    budget = str(config.segregate.hot_budget)
    if calibrates:
        with progress.task("calibrate", None, "steps"):
            sizer.calibrate()
    return sizer.size(questions or [Asked(kind="budget", text=budget)])


class Sizer:
    """Answers questions about one pipeline.

    Args:
        config: The pipeline.
        figures: What preprocess says of its tables and samples.
        counts: Access counts per global row. Shape (V,), int64.
        curve: What profile measured.
        num_counted: Samples that the counts are of.

    Raises:
        ConfigError: The pipeline trains in the published order, which holds rows twice.
    """

    def __init__(
        self,
        config: PipelineConfig,
        figures: PreprocessFigures,
        counts: np.ndarray,
        curve: Sequence[CurveFigures],
        *,
        num_counted: int,
    ) -> None:
        if config.train.faithful:
            raise ConfigError(
                "no sizes are forecast of `train.faithful`: the published order holds hot rows twice",
                hint="leave train.faithful out",
            )
        self.config = config if config.train.mode in _ACROSS_HOT_SETS else with_mode(config, "fae")
        self.asked_mode = config.train.mode
        self.figures, self.counts, self.num_counted = figures, counts, num_counted
        self.num_samples = figures.samples["train"]
        self.on_cuda = config.train.device != "cpu"
        points: dict[str, list[CurvePoint]] = {policy: [] for policy in POLICIES}
        for point in curve:
            if point.split == "train":
                points[point.policy].append(point)
        offsets = table_offsets(list(figures.rows_per_table.values()))
        padded = [at for at, name in enumerate(figures.rows_per_table) if name in (figures.padding_rows or {})]
        self.curve = HitCurve(counts, offsets, figures.column_tables, points, padded)
        self.calibration: Calibration | None = None
        self.memory = Memory(self.config, figures, counts, on_cuda=self.on_cuda)

    def calibrate(self) -> None:
        """Train a few seconds, so that answers say how fast."""
        self.calibration = calibrate(self.config, self.figures, self.counts)

    def size(self, questions: Sequence[Asked]) -> Sizes:
        """Answer them, and add what all rows on the device would take, and none."""
        answers = [self._answer(asked, policy) for asked in questions for policy in POLICIES]
        answers += list(self._bounds())
        return Sizes(
            pipeline=self.config.name,
            mode=self.config.train.mode,
            num_rows=self.curve.num_rows,
            num_tables=self.curve.num_tables,
            num_samples=self.num_samples,
            row_bytes=row_bytes_of(self.config),
            on_cuda=self.on_cuda,
            calibration=self.calibration,
            answers=answers,
        )

    def _answer(self, asked: Asked, policy: str) -> Answer:
        return self._describe(asked, policy, self._rows_for(asked, policy), self.config)

    def _rows_for(self, asked: Asked, policy: str) -> int:
        """H that answers a question."""
        curve = self.curve
        if asked.kind == "hit ratio":
            return curve.rows_for_hits(policy, asked.value)
        if asked.kind == "hot samples":
            return curve.rows_for_hot_samples(policy, asked.value)
        if asked.kind == "budget":
            return affordable_rows(
                asked.text,
                curve.num_rows,
                curve.num_tables,
                row_bytes_of(self.config),
                num_padding=len(self.figures.padding_rows or {}),
            )
        return self._rows_that_fit(int(asked.value))

    def _rows_that_fit(self, memory_bytes: int) -> int:
        """Give the most hot rows whose device parts, with all that is beside them, take no more than a memory.

        Raises:
            CapacityError: Not even the OOV rows fit.
        """

        def taken(num_rows: int) -> int:
            return self.memory.weigh(self.config, self._hot_in_tiers(num_rows)).device_bytes

        low, high = self.curve.num_always, self.curve.num_rows
        if (least := taken(low)) > memory_bytes:
            raise CapacityError(
                f"a device of {show_bytes(memory_bytes)} is too small: with the OOV rows alone hot, training takes "
                f"{show_bytes(least)} there",
                hint="lower `train.batch_size`, `train.eval_batch_size`, `train.chunk_batches` or the layers' widths",
            )
        while low < high:  # the last size that fits: rows added take more than staging gives back
            middle = (low + high + 1) // 2
            if taken(middle) <= memory_bytes:
                low = middle
            else:
                high = middle - 1
        return low

    def _hot_in_tiers(self, num_rows: int) -> int:
        """Hot rows of tables that have rows."""
        return int(self.curve.hot_rows_by_table(num_rows)[self.memory.has_rows].sum())

    def _bounds(self) -> Iterator[Answer]:
        """Give what bounds all hot sets: every row on the device, and none."""
        modes: tuple[tuple[Mode, int], ...] = (("resident", self.curve.num_rows), ("baseline", 0))
        for mode, num_rows in modes:
            yield self._describe(Asked(kind="mode", text=mode), "", num_rows, with_mode(self.config, mode))

    def _describe(self, asked: Asked, policy: str, num_rows: int, config: PipelineConfig) -> Answer:
        if num_rows:
            served = self.curve.at(policy or "frequency", num_rows)
        else:
            served = Served(
                hot_rows=0, access_threshold=None, hit_ratio=0.0, hot_sample_share=0.0, is_within_curve=True
            )
        hot_in_tiers = self._hot_in_tiers(num_rows) if num_rows else 0
        footprint = self.memory.weigh(config, hot_in_tiers)
        return Answer(
            asked=asked,
            policy=policy,
            served=served,
            budget_bytes=served.hot_rows * row_bytes_of(self.config),
            device=footprint.device,
            host=footprint.host,
            disk=footprint.disk,
            speed=self._forecast(config, policy or "frequency", served, num_rows, hot_in_tiers),
        )

    def _forecast(
        self, config: PipelineConfig, policy: str, served: Served, num_rows: int, hot_in_tiers: int
    ) -> Speed | None:
        if self.calibration is None:
            return None
        fetched, forwarded = moves_per_sample(
            self.curve,
            policy,
            num_rows,
            room=self.memory.staging_room(config, hot_in_tiers, on_cuda=self.calibration.device == "cuda"),
            config=config,
            num_samples=self.num_counted,
        )
        return forecast_speed(
            self.calibration,
            config,
            num_samples=self.num_samples,
            hot_sample_share=served.hot_sample_share,
            fetched_per_sample=fetched,
            forwarded_per_sample=forwarded,
        )


def with_mode(config: PipelineConfig, mode: Mode) -> PipelineConfig:
    """Give the pipeline with another `train.mode`; without a file for cold rows, where the mode has none."""
    cold_path = "" if mode == "resident" else config.train.cold_path
    return replace(config, train=replace(config.train, mode=mode, cold_path=cold_path))
