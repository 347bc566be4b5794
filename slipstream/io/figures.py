"""What the counts of a manifest mean, written once as types.

A stage returns its figures, the manifest holds them as JSON, and whoever reads the artifact gets the same type again:

    GenerateFigures  PreprocessFigures  ProfileFigures  SegregateFigures  TrainFigures

A field that is None by default is left out of the JSON where it is None. Fields that came later have defaults, so older
artifacts stay readable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, ClassVar, Self, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from slipstream.errors import ArtifactError
from slipstream.io.artifacts import Artifact
from slipstream.ops.hot_set import CurvePoint, table_offsets
from slipstream.ops.metrics import Quality
from slipstream.schema import Bag


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Figures of a stage."""

    stage: ClassVar[str]
    """The stage that reports them."""

    def to_json(self) -> dict[str, Any]:
        """Return them as the manifest has them, those that the stage alone has first."""
        plain = asdict(self)
        ordered = sorted(fields(self), key=lambda spec: spec.name not in type(self).__annotations__)
        present = [spec for spec in ordered if not (spec.default is None and plain[spec.name] is None)]
        return {_key(spec): plain[spec.name] for spec in present}

    @classmethod
    def from_json(cls, counts: Mapping[str, Any]) -> Self:
        """Make them of what a manifest has; keys that are no figures are passed over.

        Raises:
            TypeError: A figure is missing.
        """
        read: Self = _read(cls, counts)
        return read

    @classmethod
    def of(cls, artifact: Artifact) -> Self:
        """Read the figures of an artifact.

        Raises:
            ArtifactError: It is of another stage, or lacks a figure.
        """
        found = artifact.manifest["stage"]
        if found != cls.stage:
            raise ArtifactError(f"expected stage `{cls.stage}`, found stage `{found}` at `{artifact.path}`")
        try:
            return cls.from_json(artifact.counts)
        except (TypeError, AttributeError) as exc:
            raise ArtifactError(
                f"`{artifact.path}` lacks a figure of stage `{cls.stage}`: {exc}", hint=artifact.remedy
            ) from exc


FiguresT = TypeVar("FiguresT", bound=Figures)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherFigures:
    """How well the teacher of a synthetic log predicts the labels of a split."""

    num_samples: int
    positives: int
    auc: float
    logloss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateFigures(Figures):
    """Figures of a written log."""

    stage: ClassVar[str] = "generate"
    num_samples: int
    positives: int
    text_bytes: int
    teacher_auc: float
    """Over all samples; no model can do better in expectation."""
    teacher_logloss: float
    splits: dict[str, TeacherFigures]
    """Of `train`, `test` and `val`, split in order of time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableFigures(Figures):
    """What every stage from preprocess on knows of tables."""

    num_dense: int
    """Dense columns."""
    rows_per_table: dict[str, int]
    """Rows of each table, row 0 included, in the order of the tables."""
    table_of_column: list[int] | None = None
    """Table, by position, that each sparse column looks up; None where column i looks up table i."""
    padding_rows: dict[str, int] | None = None
    """Tables with a row that stands for padding, and that row; it is no lookup."""
    bags: list[Bag] | None = None
    """Columns that the model sees pooled."""

    @property
    def column_tables(self) -> list[int]:
        """Table, by position, that each sparse column looks up."""
        return list(range(len(self.rows_per_table))) if self.table_of_column is None else self.table_of_column

    @property
    def zero_rows(self) -> dict[str, int]:
        """Padding rows of tables that no bag looks up: there a model knows padding by its zeros."""
        pooled = {self.column_tables[bag.columns[0]] for bag in self.bags or ()}
        padded = self.padding_rows or {}
        return {
            name: padded[name] for at, name in enumerate(self.rows_per_table) if name in padded and at not in pooled
        }

    def global_padding_rows(self) -> np.ndarray:
        """Give the padding rows, counted through all tables. Shape (P,), int64."""
        offsets = dict(zip(self.rows_per_table, table_offsets(list(self.rows_per_table.values())), strict=False))
        return np.array([offsets[name] + row for name, row in (self.padding_rows or {}).items()], np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class ListFigures:
    """What the lists of one column were like, over all samples that were read."""

    values: int
    """That samples have, all together."""
    empty: int
    """Samples without any."""
    cut: int
    """Samples that had more, and kept the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessFigures(TableFigures):
    """Figures of encoded samples."""

    stage: ClassVar[str] = "preprocess"
    lines: int
    """Of the raw files."""
    rejected: int
    """Lines that are no samples."""
    samples: dict[str, int]
    """Of each split."""
    positives: dict[str, int]
    """Samples with label 1 of each split."""
    files: list[str]
    """Names of the raw files, in order."""
    columns: dict[str, str] | None = None
    """What columns such as `cat_3` are called where the data come from."""
    extra_columns: list[str] | None = None
    """Columns that are neither label, dense nor sparse."""
    fields: list[str] | None = None
    """Names of the fields of a line, in order, where the files say them."""
    dense_minima: list[int] | None = None
    """Smallest training value of each dense column, for the transform that shifts by it."""
    dense_means: list[float] | None = None
    """Mean of each dense column's logarithms in the training split, for the transform that subtracts it."""
    dense_deviations: list[float] | None = None
    """Their standard deviation, for the transform that divides by it."""
    flagged_columns: list[int] | None = None
    """Dense columns, by number, whose missing values have a column of flags each, behind the dense columns."""
    past: dict[str, Any] | None = None
    """Dense columns of what was before each line, behind all others: fields of `slipstream.ops.past.PastEncoding`."""
    negatives_left_out: int | None = None
    """Training negatives not kept, where a share of them is."""
    lists: dict[str, ListFigures] | None = None
    """By table, where samples have lists of values."""
    warnings: list[str] = field(default_factory=list)
    """What looks wrong though nothing failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveFigures(CurvePoint):
    """One point of the hot-set curve."""

    policy: str
    """That chose the rows, by training samples."""
    split: str
    """That hits are measured on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileFigures(Figures):
    """Figures of counted accesses."""

    stage: ClassVar[str] = "profile"
    samples_counted: int
    lookups: int
    """Of the counted samples."""
    rows: int
    """V, over all tables."""
    curve: list[CurveFigures]


@dataclass(frozen=True, kw_only=True, slots=True)
class SegregateFigures(TableFigures):
    """Figures of a hot set, and of the samples split by it."""

    stage: ClassVar[str] = "segregate"
    samples: dict[str, int]
    """Of the groups `hot` and `cold`, which are the training split, `val` and `test`."""
    hot_rows: int
    """H."""
    rows: int
    """V, over all tables."""
    access_threshold: int = field(metadata={"key": "lambda"})
    """Λ: count of the last row taken."""
    hit_ratio: float
    """Share of training lookups that find a hot row."""
    hot_sample_share: float
    """Share of training samples whose lookups all do."""
    rows_per_table: dict[str, int] = field(metadata={"key": "tables"})
    warnings: list[str] = field(default_factory=list)
    """What looks wrong though nothing failed."""

    @property
    def num_train(self) -> int:
        """Training samples."""
        return self.samples["hot"] + self.samples["cold"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FitFigures:
    """What training amounted to, evaluation left out."""

    steps: int
    hot_steps: int
    """Steps on batches of hot samples alone."""
    samples_seen: int
    samples_dropped: int
    samples_classified: int
    """Samples that the skip criterion was applied to."""
    drop_asked: float
    """D: share of the classified samples to drop; 0 without a criterion."""
    drop_achieved: float
    threshold: float | None
    """T in force at the end, for criteria that have one."""
    samples_per_second: float
    """Samples trained on, dropped ones not among them, over `train_seconds`."""
    train_seconds: float
    """Wall time, loading included."""
    bytes_to_device: int
    bytes_to_host: int
    hit_ratio: float
    """Share of lookups that found their row on the device."""
    bytes_per_tier: dict[str, int]
    """By tier: hot, staging, cold; where there are any, what watches rows move, and tensor-train cores."""
    cpu_seconds: float = 0.0
    """Processor time of all threads in `train_seconds`; 0 in artifacts of older versions."""
    averaged_steps: int | None = None
    """Steps whose weights the model is the mean of; None where it is the weights of the last."""
    input_seconds: float | None = None
    """Of `train_seconds`, those that the thread that trains waited for samples: to be read, and chosen."""
    move_seconds: float | None = None
    """Those it spent on finding, moving and staging rows, or waited for them."""
    compute_seconds: float | None = None
    """Those of its steps; what is left are checks, checkpoints and what ends training. On CUDA a step is begun, not
    awaited: the device's seconds show where the thread next waits for it. None of the three in the published order."""
    sync_bytes: int | None = None
    """Bytes of whole-table copies, in the published order."""
    sync_seconds: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationFigures:
    """One measurement on validation data while training goes on."""

    step: int
    """Steps trained before it."""
    epoch: int
    """The epoch it was made in, from 0."""
    quality: Quality
    """Of what would be served then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartFigures:
    """What a training took from the model it started from."""

    rows_found: int
    """Rows whose raw id that model knew."""
    rows: int
    """V."""
    layers_taken: int
    """Tensors of the dense layers whose name and shape agreed."""
    layers: int
    """Tensors of the dense layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedFigures:
    """What became of the rows of mixed tables; their ranges, table by table, are in model.json."""

    rows: dict[str, int]
    """Rows that are stored, by what of: `16 x 4` is 16 values of 4 bits."""
    shared: int
    """Rows of tails, which share row 0 of their table."""
    bytes: int
    """Of all rows as they are stored, scales included."""
    fp32_bytes: int
    """What these tables would take as fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainFigures(FitFigures, Figures):
    """Figures of a trained model."""

    stage: ClassVar[str] = "train"
    test: Quality
    val: Quality
    device: str
    """That trained: `cpu` or `cuda`."""
    ranks: int | None = None
    """R: processes that trained together; None for one alone."""
    sent_bytes_per_step: dict[str, int] | None = None
    """Bytes that the first rank sent, by what for, over all of training and evaluation, divided by steps."""
    exchange_seconds: dict[str, float] | None = None
    """Seconds that it spent in exchanges, waiting for the others included, by what for."""
    validations: list[ValidationFigures] = field(default_factory=list)
    """Measurements on the way, in order; none where the model after the last step is the only one measured."""
    start: StartFigures | None = None
    """What came from the model of `train.init_from`; None without one."""
    mixed: MixedFigures | None = None
    """Of the tables whose rows differ in bits; None where there are none."""
    best_step: int | None = None
    """Step after which the model was kept, where several were measured."""
    stopped_early: bool | None = None
    """Whether `train.patience` ended training, where several models were measured."""
    warnings: list[str] = field(default_factory=list)
    """What looks wrong though nothing failed."""


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _key(spec: Field[Any]) -> str:
    """Name of a field in the JSON."""
    return str(spec.metadata.get("key", spec.name))


def _read(hint: Any, value: Any) -> Any:
    """Turn JSON into what a type hint says; keys that no field has are passed over."""
    if is_dataclass(hint) and isinstance(hint, type):
        specs: Mapping[str, Any] = {_key(spec): spec for spec in fields(hint)}
        known = {key: spec for key, spec in specs.items() if key in value}
        return hint(**{spec.name: _read(_hints(hint)[spec.name], value[key]) for key, spec in known.items()})
    if isinstance(hint, UnionType):
        return None if value is None else _read(get_args(hint)[0], value)
    if get_origin(hint) is tuple:
        return tuple(_read(get_args(hint)[0], one) for one in value)
    if get_origin(hint) is UnionType and value is not None:
        present = [one for one in get_args(hint) if one is not NoneType]
        return _read(present[0], value) if len(present) == 1 else value
    if get_origin(hint) is list:
        return [_read(get_args(hint)[0], one) for one in value]
    if get_origin(hint) is dict:
        return {name: _read(get_args(hint)[1], one) for name, one in value.items()}
    return value
