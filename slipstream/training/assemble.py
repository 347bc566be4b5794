"""What a training is made of, put together: rows in their tiers, what the model sees of them, the model, the step.

    layout, settings -> rows where the mode wants them, initialised      place_rows, draw_rows
                     -> what the model sees of them                      represent
                     -> one step over both                               make_step

Initial weights depend on the seed alone, not on what is hot, so every mode starts from the same model.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from slipstream.distributed.gradients import GradientSums
from slipstream.distributed.rows import ShardedRows
from slipstream.embedding.quantized import quantize_linears
from slipstream.embedding.row_cache import Policy, RowCache
from slipstream.embedding.rules import OPTIMIZERS
from slipstream.embedding.tiers.batch_plan import BatchPlan
from slipstream.embedding.tiers.in_place import InPlace
from slipstream.embedding.tiers.mapped import CannotMapError, map_to_device
from slipstream.embedding.tiers.on_disk import DiskRows
from slipstream.embedding.tiers.placement import CachedRows, Placement, StagingHalves
from slipstream.embedding.tiers.rows import TieredRows
from slipstream.errors import CapacityError, ConfigError
from slipstream.models.model import Model
from slipstream.schema import Bag
from slipstream.training.averaging import WeightAverage
from slipstream.training.dense_optimizer import DenseOptimizer
from slipstream.training.device import fitting_the_device, has_triton
from slipstream.training.representations import Representations, TableSpec
from slipstream.training.shared_step import SharedStep
from slipstream.training.slot_layout import SlotLayout
from slipstream.training.step import FixedShapeStep, Kernels, Precision, TrainStep

_log = logging.getLogger(__name__)
_DRAWN_ROWS = 1 << 16
"""Rows whose initial weights are drawn at a time."""
_STAGING_CAP = 1 << 19
"""Rows a staging half holds by default, unless one batch needs more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What rows, model and step are put together from; names and meanings are those of section `train`."""

    mode: str
    faithful: bool
    batch_size: int
    chunk_batches: int
    staging_rows: int
    cache_ratio: float
    cache_policy: Policy
    average: float
    optimizer: str
    eps: float
    weight_decay: float
    precision: Literal["auto", "fp32", "tf32", "bf16"]
    kernels: Literal["auto", "torch", "triton"]
    cold_access: Literal["auto", "in_place", "look_ahead"]
    cold_path: str
    deterministic: bool

    def precision_on(self, *, on_cuda: bool) -> Precision:
        """Give the precision in force."""
        if self.precision == "auto":
            return "tf32" if on_cuda else "fp32"
        return self.precision

    def kernels_on(self, *, on_cuda: bool, have_rule: bool) -> Kernels:
        """Give the kernels in force; `have_rule` says whether those in Triton have the optimizer."""
        if self.kernels == "auto":
            return "triton" if on_cuda and has_triton() and have_rule else "torch"
        return self.kernels


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembly:
    """What trains, before anything was trained."""

    layout: SlotLayout
    num_dense: int
    rows: TieredRows
    placement: Placement | InPlace
    """Where the host puts cold rows, or what lets the device read them in place."""
    representations: Representations
    model: nn.Module
    step: TrainStep
    padding_slots: np.ndarray | None
    """Hot slots that stand for no id; None for none. int64."""
    on_cuda: bool
    """Whether it is for a GPU."""

    @property
    def columns(self) -> np.ndarray | None:
        """Columns of samples that look up rows in tiers; None for all."""
        return None if self.layout.is_whole else self.layout.columns


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Design:
    """What is to train, wherever it will."""

    settings: Settings
    layout: SlotLayout
    """Slots of the tables."""
    specs: Sequence[TableSpec]
    """How each table is held, in the order of the layout."""
    padding_rows: Mapping[str, int]
    """Tables with a row that stays zero, and that row."""
    bags: Sequence[Bag] = ()
    """Columns whose rows the model sees pooled."""
    counts: np.ndarray
    """Access counts per global row, which mode `cached` ranks by. Shape (V,), int64."""
    network: Model
    """Builds the model, and says how wide its rows are and how they start."""
    linear_bits: int
    """Bits of the dense layers' weights; 0 leaves them fp32."""
    quantize_biases: bool = False
    """Whether biases are rounded with them."""
    num_dense: int
    """Dense columns."""

    def represent(self, rows: TieredRows, *, seed: int) -> Representations:
        """Give what the model sees of rows in tiers."""
        return represent(
            self.settings, self.specs, self.layout, rows, seed=seed, bags=self.bags, padding_rows=self.padding_rows
        )

    def build_model(self, *, num_fields: int, device: torch.device) -> nn.Module:
        """Build the model that sees so many sparse inputs."""
        model = self.network.build(num_dense=self.num_dense, num_columns=num_fields).to(device)
        if self.linear_bits:
            quantize_linears(model, self.linear_bits, quantize_bias=self.quantize_biases)
        return model

    def find_padding(self) -> np.ndarray | None:
        """Find the hot slots of padding rows; None where there are none."""
        layout, padding_rows = self.layout, self.padding_rows
        slots = [layout.slot_maps[name][row] for name, row in padding_rows.items() if name in layout.tiered]
        hot = np.array([slot for slot in slots if slot < layout.num_hot], np.int64)
        return hot if len(hot) else None


def assemble(design: Design, *, seed: int, device: torch.device, sums: GradientSums | None = None) -> Assembly:
    """Put together what trains.

    Args:
        design: What it is.
        seed: Of initial weights.
        device: Where to train.
        sums: What several ranks exchange; None for a process alone.

    Raises:
        CapacityError: The device has no room for it.
    """
    settings, layout, network, num_dense = design.settings, design.layout, design.network, design.num_dense
    rows, placement = place_rows(settings, layout, design.counts, row_width=network.row_width, device=device, sums=sums)
    draw_rows(rows, layout, design.padding_rows, bound_of=network.initial_bound, seed=seed)
    representations = design.represent(rows, seed=seed)
    representations.clear_what_is_not_stored(rows)
    representations.set_exact_scales(rows)
    torch.manual_seed(seed)
    with fitting_the_device("the dense layers"):
        model = design.build_model(num_fields=representations.pooling.num_fields, device=device)
    with fitting_the_device(f"what a step over {settings.batch_size:,} samples keeps"):
        step = make_step(settings, model, rows, representations, num_dense=num_dense, sums=sums)
    return Assembly(
        layout=layout,
        num_dense=num_dense,
        rows=rows,
        placement=placement,
        representations=representations,
        model=model,
        step=step,
        padding_slots=design.find_padding(),
        on_cuda=device.type == "cuda",
    )


def place_rows(
    settings: Settings,
    layout: SlotLayout,
    counts: np.ndarray,
    *,
    row_width: int,
    device: torch.device,
    on_cuda: bool | None = None,
    sums: GradientSums | None = None,
) -> tuple[TieredRows, Placement | InPlace]:
    """Make tiers of the sizes that the mode wants, and what brings cold rows to the device.

    Args:
        settings: How.
        layout: Slots of the tables.
        counts: As in `Design`.
        row_width: Of the model.
        device: Where the buffer is to be.
        on_cuda: Whether they are to be as on a GPU; None where `device` is one.
        sums: As in `assemble`.

    Raises:
        CapacityError: The device has no room for them.
        ConfigError: Cold rows are to be read in place, and cannot be.
    """
    on_cuda = device.type == "cuda" if on_cuda is None else on_cuda
    if choose_in_place(settings, layout, on_cuda=on_cuda, is_alone=sums is None):
        rows = make_rows(settings, layout, row_width=row_width, device=device, is_in_place=True)
        try:
            return rows, _read_in_place(settings, layout, rows, on_cuda=on_cuda)
        except CannotMapError as exc:
            if settings.cold_access == "in_place":
                raise ConfigError(
                    f"`train.cold_access` is in_place, and {exc}",
                    hint="set train.cold_access to 'auto' or 'look_ahead', or allow more locked memory (ulimit -l)",
                ) from exc
            _log.warning(f"the host gathers cold rows: {exc}")
            del rows
    rows = make_rows(settings, layout, row_width=row_width, device=device, sums=sums)
    if settings.mode != "cached":
        return rows, StagingHalves(rows)
    slot_counts = layout.counts_by_slot(counts)
    cache = RowCache(
        len(slot_counts),
        rows.num_staged,
        policy=settings.cache_policy,
        row_counts=slot_counts if settings.cache_policy == "rank" else None,
    )
    return rows, CachedRows(rows, cache)


def choose_in_place(settings: Settings, layout: SlotLayout, *, on_cuda: bool, is_alone: bool) -> bool:
    """Decide whether the device is to read cold rows in place.

    Args:
        settings: How.
        layout: Slots of the tables.
        on_cuda: Whether training is on a GPU.
        is_alone: Whether it is in a process alone.

    Raises:
        ConfigError: It is to, and several ranks or kernels that do not know the optimizer speak against it.
    """
    have_rule = _kernels_have(settings.optimizer)
    kernels = settings.kernels_on(on_cuda=on_cuda, have_rule=have_rule)
    if settings.cold_access == "in_place" and not is_alone:
        raise ConfigError(
            "`train.cold_access` = 'in_place' does not go with several ranks, which share the cold tier",
            hint="set train.cold_access to 'auto' or 'look_ahead'",
        )
    if settings.cold_access == "in_place" and kernels == "triton" and not have_rule:
        raise ConfigError(
            f"`train.cold_access` is in_place, and no Triton kernel has `train.optimizer` = '{settings.optimizer}'",
            hint="set train.cold_access to 'look_ahead', or train.kernels to 'torch'",
        )
    if not len(layout.columns) or settings.cold_access == "look_ahead" or settings.cold_path:
        return False
    is_default = kernels == "triton" and have_rule and settings.mode != "cached" and not settings.faithful
    return settings.cold_access == "in_place" or (is_default and is_alone)


def _kernels_have(optimizer: str) -> bool:
    """Whether the kernels that work in place have a rule."""
    if not has_triton():
        return False
    from slipstream.embedding.tiers.triton_plan import has_kernel  # needs Triton

    return has_kernel(OPTIMIZERS.get(optimizer))


def _read_in_place(settings: Settings, layout: SlotLayout, rows: TieredRows, *, on_cuda: bool) -> InPlace:
    make_plan = BatchPlan
    if settings.kernels_on(on_cuda=on_cuda, have_rule=_kernels_have(settings.optimizer)) == "triton":
        from slipstream.embedding.tiers.triton_plan import TritonPlan as make_plan  # needs Triton

    host = map_to_device(rows.on_host, rows.device)
    with fitting_the_device(f"the slots of two batches of {settings.batch_size:,} samples"):
        return InPlace(
            rows,
            host,
            batch_size=settings.batch_size,
            num_columns=len(layout.columns),
            most_distinct=layout.most_distinct(settings.batch_size),
            columns=None if layout.is_whole else layout.columns,
            make_plan=make_plan,
        )


def make_rows(
    settings: Settings,
    layout: SlotLayout,
    *,
    row_width: int,
    device: torch.device,
    sums: GradientSums | None = None,
    is_in_place: bool = False,
) -> TieredRows:
    """Make tiers of the sizes that the mode wants, with room for two batches in place; all rows are zero.

    Raises:
        CapacityError: The device has no room for them, or the disk none for a cold tier in a file.
        ConfigError: A file cannot be made in `train.cold_path`, or there are several ranks.
    """
    num_hot, num_staged = _size_tiers(settings, layout)
    if is_in_place:
        num_staged = 2 * min(layout.most_distinct(settings.batch_size), layout.num_rows - num_hot)
    with fitting_the_device(f"{num_hot:,} hot rows and {num_staged:,} staged rows of {row_width} floats"):
        kind = _kind_of_rows(settings, sums)
        with _making_cold_file(settings.cold_path):
            return kind(
                num_rows=layout.num_rows,
                num_hot=num_hot,
                embedding_dim=row_width,
                num_staged=num_staged,
                optimizer=settings.optimizer,
                device=device,
                keeps_lead=settings.average > 0,
            )


def _kind_of_rows(settings: Settings, sums: GradientSums | None) -> Callable[..., TieredRows]:
    if not settings.cold_path:
        return TieredRows if sums is None else partial(ShardedRows, ranks=sums.ranks)
    if sums is not None:
        raise ConfigError(
            "`train.cold_path` does not go with several ranks, which share the cold tier in their memory",
            hint="train in one process, or leave train.cold_path out: the more ranks, the less memory each needs",
        )
    return partial(DiskRows, folder=Path(settings.cold_path))


@contextmanager
def _making_cold_file(folder: str) -> Iterator[None]:
    """Say what the file system had against a file for the cold tier."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CapacityError(
                f"the disk of `train.cold_path` = '{folder}' has no room for the cold tier: {exc.strerror}",
                hint="free some disk, or set train.cold_path to a folder on a larger one",
            ) from exc
        raise ConfigError(
            f"`train.cold_path` must be a folder that can be written, found '{folder}': {exc.strerror or exc}",
            hint="set it to a folder on a fast local disk",
        ) from exc


def _size_tiers(settings: Settings, layout: SlotLayout) -> tuple[int, int]:
    """(hot rows, staged rows)."""
    num_rows = layout.num_rows
    num_hot = {"resident": num_rows, "baseline": 0, "cached": 0}.get(settings.mode, layout.num_hot)
    if settings.faithful:
        num_hot = 0  # the master copy of every row is on the host
    if settings.mode == "cached":
        # half the cache is for the batches at work, the other half for those that come next
        least = 2 * layout.most_distinct(settings.batch_size)
        return num_hot, min(num_rows, max(least, int(num_rows * settings.cache_ratio)))
    num_cold = num_rows - num_hot
    lookups = settings.batch_size * len(layout.columns)
    # a quarter of the cold rows is plenty where it holds a batch: chunks that do not fit are split
    usual = max(lookups, min(settings.chunk_batches * lookups, _STAGING_CAP, num_cold // 4))
    return num_hot, 2 * min(settings.staging_rows or usual, num_cold)


def draw_rows(
    rows: TieredRows,
    layout: SlotLayout,
    padding_rows: Mapping[str, int],
    *,
    bound_of: Callable[[int], float],
    seed: int,
) -> None:
    """Draw initial weights table by table, so that they do not depend on what is hot; padding rows are zero."""
    generator = torch.Generator().manual_seed(seed)
    for name in layout.tiered:
        slots = torch.from_numpy(layout.held_slots(name))
        bound = bound_of(len(slots))
        for part in slots.split(_DRAWN_ROWS):  # one draw after the other: the same as all at once
            weights = torch.empty(len(part), rows.embedding_dim).uniform_(-bound, bound, generator=generator)
            rows.load(part, weights)
        if name in padding_rows:
            rows.load(slots[padding_rows[name]].view(1), torch.zeros(1, rows.embedding_dim))


def represent(
    settings: Settings,
    specs: Sequence[TableSpec],
    layout: SlotLayout,
    rows: TieredRows,
    *,
    seed: int,
    bags: Sequence[Bag] = (),
    padding_rows: Mapping[str, int] | None = None,
) -> Representations:
    """Make what the model sees of rows, cores drawn by seed; scales wait for the initial weights."""
    return Representations(
        specs,
        layout=layout,
        embedding_dim=rows.embedding_dim,
        optimizer=settings.optimizer,
        eps=settings.eps,
        seed=seed,
        device=rows.device,
        bags=bags,
        padding_rows=padding_rows,
    )


def make_step(
    settings: Settings,
    model: nn.Module,
    rows: TieredRows,
    representations: Representations,
    *,
    num_dense: int,
    on_cuda: bool | None = None,
    sums: GradientSums | None = None,
) -> TrainStep:
    """Make the step: of fixed shape where a CUDA graph can hold it; `on_cuda` is whether it is for a GPU."""
    layout = representations.layout
    is_there = rows.device.type == "cuda"
    on_cuda = is_there if on_cuda is None else on_cuda
    optimizer = DenseOptimizer(
        model.parameters(),
        optimizer=settings.optimizer,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        at_once=on_cuda,
        fused=settings.kernels_on(on_cuda=on_cuda, have_rule=True) == "triton",
    )
    options: dict[str, Any] = {
        "model": model,
        "rows": rows,
        "dense_optimizer": optimizer,
        "representations": representations,
        "eps": settings.eps,
        "precision": settings.precision_on(on_cuda=is_there),
        "kernels": settings.kernels_on(on_cuda=is_there, have_rule=rows.rule.has_kernel),
        "most_distinct": layout.most_distinct(settings.batch_size),
        "average": WeightAverage(rows, [*model.parameters(), *representations.cores()]) if settings.average else None,
    }
    if sums is not None:
        options["kernels"] = "torch"
        return SharedStep(sums=sums, batch_size=settings.batch_size, deterministic=settings.deterministic, **options)
    asks_plain = settings.deterministic or settings.faithful or representations.has_cores
    if on_cuda and not asks_plain:
        num_tables = len(layout.column_tables)
        return FixedShapeStep(batch_size=settings.batch_size, num_dense=num_dense, num_tables=num_tables, **options)
    batch_size = None if settings.faithful else settings.batch_size
    return TrainStep(batch_size=batch_size, deterministic=settings.deterministic, **options)
