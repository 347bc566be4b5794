"""The pipeline file: every knob on one page.

One TOML file is one complete run. It becomes a tree of frozen dataclasses; the string under a field is its
documentation. `options.py` reads and checks them. Fields marked `speed_only` change how fast a stage works, never what
it writes, so they stay out of fingerprints.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from slipstream.dataset_schema import DatasetConfig
from slipstream.distributed.options import DistributedConfig
from slipstream.embedding.rules import check_kernels
from slipstream.engine.options import EngineConfig
from slipstream.errors import ConfigError
from slipstream.models.dlrm import DLRM
from slipstream.models.model import Model
from slipstream.options import build, later, parse_budget, read_tree, require, speed_only
from slipstream.preprocess_schema import PreprocessConfig
from slipstream.published import check_published_order
from slipstream.registry import ChoiceOf
from slipstream.schema import BITS, Representation, RowFormat, TableScale
from slipstream.skip_config import SkipConfig
from slipstream.training.skipping.criterion import SkipRule
from slipstream.training.skipping.registry import CRITERIA


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """Access counts and the curve budget -> hot set."""

    sample_ratio: float = 1.0
    """Share of training samples counted; 1.0 is exact, 0.05 is enough above ten million samples."""
    curve: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
    """Budgets of the reported curve, as shares of all rows."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(0 < self.sample_ratio <= 1, "profile.sample_ratio", "in (0, 1]", self.sample_ratio)
        require(
            bool(self.curve) and all(0 < share <= 1 for share in self.curve),
            "profile.curve",
            "a list of shares in (0, 1]",
            self.curve,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SegregateConfig:
    """The hot set, and samples split by it."""

    hot_budget: str | int = "10%"
    """Accelerator memory of the hot rows with their optimizer state and what staleness keeps of them: bytes,
    `"64MiB"`, or `"1%"` of what all rows would take by the same account. More than that makes every row hot."""
    access_threshold: int = 0
    """Λ given by hand: rows counted at least this often are hot and the bytes follow; 0 lets the budget decide."""
    policy: Literal["frequency", "sample-aware"] = "frequency"
    """`frequency` takes the most counted rows (FAE); `sample-aware` prefers rows whose companions are hot too."""
    sample_aware_power: float = 4.0
    """p of the sample-aware score (1 + cold lookups)^-p; 2 generalises better at large budgets."""
    sample_aware_rounds: int = 4
    """Rounds of re-scoring; each is one pass over the training samples."""
    samples_per_shard: int = 131_072
    """Samples in each npz shard; the last shard of a group may be shorter."""

    def __post_init__(self) -> None:
        """Check ranges."""
        try:
            parse_budget(self.hot_budget, total_bytes=100)
        except ValueError as exc:
            raise ConfigError(f"`segregate.hot_budget`: {exc}") from exc
        require(self.access_threshold >= 0, "segregate.access_threshold", "at least 0", self.access_threshold)
        require(self.sample_aware_power > 0, "segregate.sample_aware_power", "above 0", self.sample_aware_power)
        require(
            self.sample_aware_rounds >= 1,
            "segregate.sample_aware_rounds",
            "at least 1",
            self.sample_aware_rounds,
        )
        require(self.samples_per_shard >= 1, "segregate.samples_per_shard", "at least 1", self.samples_per_shard)


@dataclass(frozen=True, kw_only=True, slots=True)
class TableChoice:
    """How one table is held; a field left out falls back to the rule for its size, then to all tables."""

    representation: Representation | None = None
    """As `tables.representation`, for this table."""
    period: int | None = None
    """As `tables.period`, for this table."""
    scale_per: TableScale | None = None
    """As `tables.scale_per`, for this table."""
    tt_ranks: tuple[int, ...] | None = None
    """As `tables.tt_ranks`, for this table."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _check_table_options(self.period, self.tt_ranks)


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRule:
    """How tables of a size are held; of several rules that fit a table the one with the largest `min_rows` holds."""

    min_rows: int
    """Rows a table must have, row 0 included, for the rule to fit."""
    representation: Representation | None = None
    """As `tables.representation`, for these tables."""
    period: int | None = None
    """As `tables.period`, for these tables."""
    scale_per: TableScale | None = None
    """As `tables.scale_per`, for these tables."""
    tt_ranks: tuple[int, ...] | None = None
    """As `tables.tt_ranks`, for these tables."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.min_rows >= 0, "tables.rules.min_rows", "at least 0", self.min_rows)
        _check_table_options(self.period, self.tt_ranks)


_FORMAT = re.compile(r"[842](/[1-9][0-9]{0,4})?")
"""Bits of a value, and perhaps the share of a row's values that is stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TablesConfig:
    """How tables are held: in full, on few bits, or as products of small tensors."""

    representation: Representation = "dense"
    """`dense` fp32; `int8`, `int4`, `int2` trained on the grid they are stored on, from an fp32 master; `mixed` the
    same, on fewer bits the rarer rows are used, a tail sharing row 0; `tt` tensor-train cores instead of rows."""
    mixed_budget: str | int = later("5%")
    """What the rows of all `mixed` tables may take, together: bytes, `"64MiB"`, or `"5%"` of what they take as fp32.
    Profile's counts decide which rows get how many bits, over all those tables; scales of rows count."""
    mixed_formats: tuple[str, ...] = later(("8", "4", "4/4", "4/16"))
    """What rows of `mixed` tables may have: `8`, `4` or `2` bits a value, or bits and a share, `"4/16"`: 4 bits of a
    sixteenth of the values, the others zero. The more a row is used, the larger its format."""
    scale_per: TableScale = "table"
    """What shares the step between two levels of an `int8`, `int4` or `int2` table: the whole `table`, or each `row`
    has its own, four bytes a row more and exact at every lookup."""
    period: int = 200
    """Steps between refreshes of a scale per table; the first period has more, at 1, 2, 4, …."""
    tt_ranks: tuple[int, ...] = (16, 16)
    """Inner ranks of `tt` tables; one more core than ranks."""
    quantize_linears: int = 0
    """Bits of the dense layers' weights, 8 or 4, one scale per output; 0 leaves them fp32."""
    quantize_biases: bool = later(False)
    """Round the dense layers' biases too, to the grid of their weights, as DQRM does; with `quantize_linears`. It saves
    next to nothing, and a bias larger than every weight of its output is cut off: for comparison with DQRM."""
    rules: tuple[TableRule, ...] = ()
    """Choices by size: `[[tables.rules]]`, each with `min_rows`."""
    overrides: Mapping[str, TableChoice] = field(default_factory=dict)
    """Choices for single tables, for instance `[tables.overrides.cat_2]`; they win over rules."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _check_table_options(self.period, self.tt_ranks)
        require(self.quantize_linears in (0, 4, 8), "tables.quantize_linears", "0, 4 or 8", self.quantize_linears)
        if self.quantize_biases and not self.quantize_linears:
            raise ConfigError(
                "`tables.quantize_biases` rounds biases to the grid of weights that `tables.quantize_linears` = 0 "
                "leaves fp32",
                hint="set tables.quantize_linears to 8 or 4, or leave tables.quantize_biases out",
            )
        are_right = bool(self.mixed_formats) and all(map(_FORMAT.fullmatch, self.mixed_formats))
        expected = "formats such as '8' (bits) and '4/16' (4 bits of a sixteenth of the values), of 8, 4 or 2 bits"
        require(are_right, "tables.mixed_formats", expected, self.mixed_formats)
        try:
            parse_budget(self.mixed_budget, total_bytes=100)
        except ValueError as exc:
            raise ConfigError(f"`tables.mixed_budget`: {exc}") from exc

    @property
    def used(self) -> set[str]:
        """Every representation that some table may have."""
        chosen = [rule.representation for rule in self.rules]
        chosen += [choice.representation for choice in self.overrides.values()]
        return {self.representation, *(name for name in chosen if name is not None)}

    @property
    def is_plain(self) -> bool:
        """Whether this section says nothing: fp32 throughout."""
        return self.used == {"dense"} and not self.quantize_linears

    def formats_for(self, row_width: int) -> list[RowFormat]:
        """Give what rows of `mixed` tables may have, of so many values; a share fills whole bytes."""
        formats = []
        for text in self.mixed_formats:
            bits, _, part = text.partition("/")
            per_byte = 8 // int(bits)
            values = row_width // int(part or 1) // per_byte * per_byte
            formats.append(RowFormat(bits=int(bits), values=max(per_byte, values) if part else None))
        return formats

    @property
    def bits_of(self) -> dict[str, int]:
        """The fewest bits of a value, for every representation that some table may have and that has few bits."""
        bits = BITS | {"mixed": min(int(text[0]) for text in self.mixed_formats)}
        return {name: bits[name] for name in sorted(self.used) if bits.get(name)}

    def choice_for(self, table: str, num_rows: int) -> TableChoice:
        """How a table of this many rows is held, every field filled in."""
        fitting = [rule for rule in self.rules if num_rows >= rule.min_rows]
        sources: list[Any] = [self.overrides.get(table), max(fitting, key=lambda rule: rule.min_rows, default=None)]
        picked = {}
        for spec in dataclasses.fields(TableChoice):
            values = [getattr(source, spec.name) for source in (*sources, self) if source is not None]
            picked[spec.name] = next(value for value in values if value is not None)
        return TableChoice(**picked)


def _check_table_options(period: int | None, tt_ranks: tuple[int, ...] | None) -> None:
    require(period is None or period >= 1, "tables.period", "at least 1", period)
    ranks_ok = tt_ranks is None or (1 <= len(tt_ranks) <= 3 and all(rank >= 1 for rank in tt_ranks))
    require(ranks_ok, "tables.tt_ranks", "one to three ranks of at least 1", tt_ranks)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Placement, optimizer and loop."""

    mode: Literal["resident", "baseline", "fae", "slipstream", "cached"] = "slipstream"
    """Where rows live: `resident` all on the device, `baseline` all on the host, `fae` hot rows on the device,
    `slipstream` like fae and samples skipped, `cached` in a software cache that needs no hot set."""
    faithful: bool = False
    """Reproduce the published order of `fae` and `slipstream`: all cold batches, then all hot ones, whole-table
    copies between them, T by bisection, one classification an epoch. No checkpoints, constant learning rate;
    keys it would ignore are refused."""
    seed: int | None = None
    """Seed of training alone; left out, the seed of the pipeline."""
    cache_ratio: float = 0.01
    """Share of all rows that mode `cached` holds on the device; at least what two batches can look up."""
    cache_policy: Literal["rank", "lfu"] = "rank"
    """Who leaves the cache first: `rank` the row least used in the training split, `lfu` the least used so far."""
    checkpoint_minutes: float = speed_only(5.0)
    """Minutes between checkpoints that an interrupted run goes on from; 0 does not look at the clock. Where this and
    `train.checkpoint_steps` are both 0 none is kept; else one more is after the last step and when you stop the run."""
    checkpoint_steps: int = speed_only(0)
    """Steps between checkpoints; 0 does not count steps."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Accelerator; `auto` takes CUDA where there is one."""
    epochs: int = 1
    """Passes over the training samples."""
    batch_size: int = 2048
    """Samples per step. The loss of a step is their sum over this number, so the fewer that end an epoch pull no
    harder than others; with `train.faithful` it is the mean over the batch, as published."""
    optimizer: Annotated[str, ChoiceOf("slipstream.embedding.rules:OPTIMIZERS")] = "rowwise_adagrad"
    """What updates the rows, each when it is looked up; the dense layers follow, element-wise."""
    lr: float = 0.02
    """Learning rate of rows and dense layers."""
    lr_warmup: float = 0.0
    """Share of training over which the learning rate rises from zero."""
    lr_decay: Literal["none", "linear"] = "none"
    """`linear` lowers the learning rate to zero at the end of training."""
    average: float = later(0.0)
    """Share of training, its last part, whose weights are averaged, rows and layers, after every step: the model is
    their mean, and .15 is a good share. A row then takes 4 bytes more for each of its values. 0 averages nothing, and
    the model is what the last step left."""
    eps: float = 1e-8
    """Added to the root of Adagrad's accumulator and of Adam's second moment."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Of matrix products: `auto` is `tf32` on CUDA, `fp32` elsewhere; `tf32` on CUDA only, `bf16` by autocast. Weights
    and updates stay fp32."""
    deterministic: bool = False
    """Repeat to the bit on CUDA too, without graph capture; on CPU results always repeat."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """What looks rows up and updates them: `triton` needs a GPU and computes the same up to rounding; `auto` takes it
    on a GPU where it is installed and has the optimizer, else `torch`."""
    cold_access: Literal["auto", "in_place", "look_ahead"] = "auto"
    """How cold rows get to the step: `in_place` the device reads and writes them in page-locked host memory,
    `look_ahead` the host gathers them chunk by chunk. The same results, to the bit on a CPU; `auto` is `in_place` on
    CUDA with `triton` kernels, except in mode `cached`, and `look_ahead` elsewhere."""
    cold_path: str = speed_only("")
    """Folder on a fast local disk for a cold tier larger than memory: its rows, with their optimizer state, are mapped
    from a file there, which has no name and is gone with the run. The same model, to the bit. Empty: in memory."""
    shuffle_on: Literal["auto", "device", "host"] = speed_only("auto")
    """Where samples are put in their order: on the `device`, to which they are copied in the windows they are shuffled
    in, so that batches cost the host nothing, or on the `host`, which sends every batch. The same order, and the same
    results; `auto` is `device` where a GPU reads cold rows in place and has room for the windows of two rounds, at most
    2.5 million samples."""
    weight_decay: float = 0.0
    """L2 penalty on the dense layers' weights."""
    order: Literal["interleaved", "mixed"] = "interleaved"
    """`interleaved`: pure hot and pure cold batches in a seeded order; `mixed`: samples shuffled across both."""
    chunk_batches: int = 16
    """Batches per look-ahead chunk: cold rows of a chunk are fetched together."""
    staging_rows: int = 0
    """Rows of each of the two staging halves; 0 sizes them for a whole chunk."""
    init_from: str = later("")
    """Folder of a train artifact to start from: rows are found by raw id through both vocabularies, dense layers by
    name and shape, and the report says how many; all else starts as without, the optimizer too. Empty for none."""
    positive_weight: float = later(1.0)
    """Samples that a clicked one counts as, for rare clicks: it multiplies their loss, and with it the odds that the
    model predicts, so its calibration is not that of the data."""
    validate_steps: int = later(0)
    """Steps between measurements on the validation split, beside one at the end of every epoch. The model with the
    least logloss of all measured is kept. 0: at the end of every epoch; one epoch is measured after training alone."""
    patience: int = later(0)
    """Measurements in a row without a better logloss after which training stops; 0 trains to the end."""
    log_every: int = 50
    """Steps between TensorBoard points and progress updates."""
    eval_batch_size: int = 16_384
    """Samples per evaluation step."""
    num_threads: int = speed_only(0)
    """CPU threads of torch; 0: one for every 2 GFLOP of a step, within affinity, quota and OMP_NUM_THREADS."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("epochs", "batch_size", "chunk_batches", "log_every", "eval_batch_size"):
            require(getattr(self, name) >= 1, f"train.{name}", "at least 1", getattr(self, name))
        if self.faithful and self.mode not in ("fae", "slipstream"):
            raise ConfigError(
                f"`train.faithful` goes with mode `fae` or `slipstream`, found `{self.mode}`",
                hint="set train.mode, or leave train.faithful out",
            )
        require(0 < self.cache_ratio <= 1, "train.cache_ratio", "in (0, 1]", self.cache_ratio)
        require(self.seed is None or 0 <= self.seed < 2**32, "train.seed", "in [0, 2^32)", self.seed)
        require(self.positive_weight > 0, "train.positive_weight", "above 0", self.positive_weight)
        if self.patience and self.epochs == 1 and not self.validate_steps:
            raise ConfigError(
                f"`train.patience` = {self.patience} stops nothing: one epoch is measured once, after its last step",
                hint="set train.validate_steps, or train.epochs above 1",
            )
        for name in (
            "validate_steps",
            "patience",
            "staging_rows",
            "num_threads",
            "weight_decay",
            "checkpoint_steps",
            "checkpoint_minutes",
        ):
            require(getattr(self, name) >= 0, f"train.{name}", "at least 0", getattr(self, name))
        require(0 <= self.average <= 1, "train.average", "in [0, 1]", self.average)
        require(self.lr > 0, "train.lr", "above 0", self.lr)
        require(0 <= self.lr_warmup < 1, "train.lr_warmup", "in [0, 1)", self.lr_warmup)
        require(self.eps > 0, "train.eps", "above 0", self.eps)
        check_kernels(self.optimizer, self.kernels)
        if self.cold_path:
            self._check_cold_path()
        if self.cold_access == "in_place" and self.mode == "cached":
            raise ConfigError(
                "`train.cold_access` = 'in_place' does not go with mode `cached`, whose cache the host keeps",
                hint="set train.cold_access to 'auto' or 'look_ahead', or choose another train.mode",
            )

    def _check_cold_path(self) -> None:
        for key, value, why in (
            ("mode", "resident", "which has no cold rows"),
            ("cold_access", "in_place", "for which cold rows are locked in memory"),
            ("faithful", True, "which copies whole tables from tier to tier"),
        ):
            if getattr(self, key) == value:
                raise ConfigError(
                    f"`train.cold_path` does not go with `train.{key}` = {value!r}, {why}",
                    hint=f"leave train.cold_path out, or set another train.{key}",
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineConfig:
    """One complete run."""

    name: str
    """Folder of the run below --runs."""
    seed: int = 0
    """Seed of everything that draws: synthetic data, splits, initial weights, batch order, dropping."""
    dataset: DatasetConfig
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    segregate: SegregateConfig = field(default_factory=SegregateConfig)
    model: Annotated[Model, ChoiceOf("slipstream.models.registry:MODELS")] = field(default_factory=DLRM)
    tables: TablesConfig = field(default_factory=TablesConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    skip: SkipConfig = field(default_factory=SkipConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tune: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """What `slipstream tune` may try for keys, by section: `[tune.train]` with `lr = ".005:.1:log"`, bounds of a number
    drawn by its logarithm, `epochs = "1:3"`, or values with a bar between, `optimizer = "adam | rowwise_adagrad"`.
    Every other command passes over it."""

    def __post_init__(self) -> None:
        """Check the name, the seed, and keys that only make sense together."""
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) is not None,
            "name",
            "letters, digits, '.', '_' or '-'",
            self.name,
        )
        require(0 <= self.seed < 2**32, "seed", "in [0, 2^32)", self.seed)
        for representation, bits in self.tables.bits_of.items():
            per_byte = 8 // bits
            if self.model.row_width % per_byte:
                raise ConfigError(
                    f"`model.embedding_dim` must make rows of a multiple of {per_byte} values for {representation} "
                    f"tables, which put {per_byte} into a byte; found {self.model.embedding_dim}, which makes rows of "
                    f"{self.model.row_width} in `{self.model.name}`",
                    hint="set another model.embedding_dim, or use int8",
                )
        for name in sorted({"mixed", "tt"} & self.tables.used):
            if self.train.faithful:
                raise ConfigError(
                    f"`train.faithful` does not go with {name} tables: the published order copies whole tables of rows",
                    hint="leave train.faithful out, or use another representation",
                )
        if self.train.faithful:
            check_published_order(self.train, self.skip, criterion=self.criterion)
        if self.criterion == "stale" and self.skip_rule.movement != "net" and self.skip.alpha_per == "table":
            raise ConfigError(
                "`skip.alpha_per` = 'table' goes with net movement, found `skip.movement` = 'per-label', whose mean is "
                "over the rows of all tables",
                hint="set skip.movement to 'net', or leave skip.alpha_per out",
            )
        if self.model.sources and self.dataset.source not in self.model.sources:
            raise ConfigError(
                f"`model.name` = '{self.model.name}' is for source {', '.join(self.model.sources)}, "
                f"found `dataset.source` = '{self.dataset.source}'",
                hint="set another model, or another dataset.source",
            )

    @property
    def validates(self) -> bool:
        """Whether several models are measured on validation data, and the best is kept."""
        return not self.train.faithful and (self.train.epochs > 1 or self.train.validate_steps > 0)

    @property
    def train_seed(self) -> int:
        """Seed of initial weights, batch order and dropping."""
        return self.seed if self.train.seed is None else self.train.seed

    @property
    def criterion(self) -> str:
        """The skip criterion in force: only mode `slipstream` skips."""
        return self.skip.criterion if self.train.mode == "slipstream" else "none"

    @property
    def skip_rule(self) -> SkipRule:
        """The criterion in force with its settings; the published order has one measure of movement only."""
        skip = self.skip
        scopes = CRITERIA.get(self.criterion).scopes
        return SkipRule(
            criterion=self.criterion,
            target_drop=skip.target_drop,
            scope=skip.scope if skip.scope in scopes else scopes[0],
            movement="net" if self.train.faithful else skip.movement,
            alpha=skip.alpha,
            threshold=skip.threshold,
            sample_size=skip.sample_size,
            floor=CRITERIA.get(self.criterion).floor if skip.floor is None else skip.floor,
            reweight=skip.reweight,
        )


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Read a pipeline file and apply `key=value` overrides.

    Args:
        path: TOML file.
        overrides: Dotted keys with TOML values; a value that is not TOML is taken as a string.

    Raises:
        ConfigError: The file cannot be read, or a key, type or value is wrong.
    """
    return build_pipeline(read_tree(path, overrides))


def build_pipeline(tree: Mapping[str, Any]) -> PipelineConfig:
    """Turn a parsed TOML tree into a checked `PipelineConfig`.

    Raises:
        ConfigError: A key, type or value is wrong.
    """
    return build(PipelineConfig, tree)
