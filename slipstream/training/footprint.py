"""What a training will hold, counted without holding it.

The objects that train are made by the functions that always make them, on torch's `meta` device: tensors with shapes
and types but no memory. What they would hold is then read off them. So a forecast cannot drift from the training, for
there is no second formula. A step is run the same way, and the memory that comes and goes meanwhile is followed.

Not counted: what a driver, cuBLAS and the allocator's rounding keep for themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slipstream.embedding.duplicates import Distinct
from slipstream.embedding.tiers.in_place import InPlace
from slipstream.embedding.tiers.lookahead import Batch, LookAhead, StagedBatch
from slipstream.embedding.tiers.on_disk import DiskRows
from slipstream.embedding.tiers.padding import PaddedColumns
from slipstream.embedding.tiers.pinned import NUM_SLABS, SLAB_BYTES
from slipstream.embedding.tiers.placement import StagingHalves
from slipstream.embedding.tiers.rows import TieredRows
from slipstream.training.assemble import Assembly, Design, make_step, place_rows
from slipstream.training.loop import Trainer
from slipstream.training.predict import click_probabilities
from slipstream.training.slot_layout import SlotLayout

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Bytes by part; a part that takes nothing is left out."""

    device: dict[str, int]
    """`hot rows` and their `optimizer state` (with what a mean over steps keeps of them),
    `staging`, `staleness`, `layers`, `finding rows`, `samples`, `scales and cores`."""
    host: dict[str, int]
    """`cold rows` and their `optimizer state`, `slots`, `skipping`, `moving rows`."""
    disk: dict[str, int]
    """`cold rows` and their `optimizer state`, where a file holds them."""

    @property
    def device_bytes(self) -> int:
        """All of the device."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """All of the host."""
        return sum(self.host.values())


class PeakMemory(TorchDispatchMode):
    """Follows the memory of tensors made inside the block; what was there before does not count."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, weakref.finalize[..., Any]] = {}
        self.bytes: int = 0
        self.peak: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what it made."""
        made = func(*args, **(kwargs or {}))
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in given and id(storage) not in self._live:
                    self._note(storage)
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        size, name = storage.nbytes(), id(storage)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

        def forget() -> None:
            self.bytes -= size
            del self._live[name]

        self._live[name] = weakref.finalize(storage, forget)


def peak_of(work: Callable[[], object]) -> int:
    """Bytes of tensors that some work makes, at their most."""
    memory = PeakMemory()
    with memory:
        work()
    return memory.peak


def assemble_weightless(design: Design, *, on_cuda: bool) -> Assembly:
    """Put together what trains, as `assemble` does, with tensors that have no memory.

    Args:
        design: What it is.
        on_cuda: Whether the step is the one that a GPU gets.
    """
    settings, layout, num_dense = design.settings, design.layout, design.num_dense
    with META:  # the cold tier names no device: it lives where tensors live by default
        rows, placement = place_rows(
            settings, layout, design.counts, row_width=design.network.row_width, device=META, on_cuda=on_cuda
        )
    representations = design.represent(rows, seed=0)
    model = design.build_model(num_fields=representations.pooling.num_fields, device=META)
    return Assembly(
        layout=layout,
        num_dense=num_dense,
        rows=rows,
        placement=placement,
        representations=representations,
        model=model,
        step=make_step(settings, model, rows, representations, num_dense=num_dense, on_cuda=on_cuda),
        padding_slots=design.find_padding(),
        on_cuda=on_cuda,
    )


def weigh(trainer: Trainer, *, on_cuda: bool = False) -> Footprint:
    """Count what a trainer holds between two steps.

    Args:
        trainer: One that trains, or a weightless one.
        on_cuda: Whether moves would go through page-locked memory, where they do not yet.
    """
    step, rows = trainer.step, trainer.step.rows
    seen = _Weighed()
    hot = slice(0, rows.num_hot)
    buffers, (cold, *cold_states) = [buffer for buffer, _ in rows.pairs], rows.on_host
    device = {
        "hot rows": rows.buffer[hot].nbytes,
        "optimizer state": sum(state[hot].nbytes for state in buffers[1:]),
        "staging": sum(buffer[rows.num_hot :].nbytes for buffer in buffers),
    }
    tier = {"cold rows": cold.nbytes, "optimizer state": sum(state.nbytes for state in cold_states)}
    disk, host = (tier, {}) if isinstance(rows, DiskRows) else ({}, tier)
    seen.add(rows)
    host["slots"] = seen.add(step.representations.layout)
    device["scales and cores"] = seen.add(step.representations)
    if step.tracker is not None:
        device["staleness"] = seen.add(step.tracker)
    device["layers"] = seen.add(step)
    num_rings = 1
    if isinstance(trainer.lookahead, InPlace):
        device["finding rows"] = seen.add(trainer.lookahead.plans)
        if (ring := trainer.lookahead.ring) is not None:
            device["samples"] = seen.add(ring.tensors())
            num_rings += 1
    host["skipping"] = seen.add(trainer.skipper)
    host["moving rows"] = seen.add(trainer.lookahead) + (num_rings * NUM_SLABS * SLAB_BYTES if on_cuda else 0)
    return Footprint(
        device={name: size for name, size in device.items() if size},
        host={name: size for name, size in host.items() if size},
        disk={name: size for name, size in disk.items() if size},
    )


class _Weighed:
    """Finds every tensor and array that objects of this package hold, each once: nobody has to list them."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._kept: list[object] = []  # so that no address is used again

    def add(self, root: object) -> int:
        """Bytes that an object holds, and that nothing given before it held."""
        total, waiting = 0, [root]
        while waiting:
            found = waiting.pop()
            memory = _memory_of(found)
            if id(memory) not in self._seen:
                self._seen.add(id(memory))
                self._kept.append(memory)
                total += _size_of(memory)
                waiting += _parts_of(found)
        return total


def _memory_of(found: object) -> object:
    """Give what a tensor or array lies in; for all else the object itself."""
    if isinstance(found, Tensor):
        return found.untyped_storage()
    while isinstance(found, np.ndarray) and isinstance(found.base, np.ndarray):
        found = found.base
    return found


def _size_of(memory: object) -> int:
    if isinstance(memory, torch.UntypedStorage):
        return int(memory.nbytes())
    return memory.nbytes if isinstance(memory, np.ndarray) else 0


def _parts_of(found: object) -> list[object]:
    if isinstance(found, Mapping):
        return list(found.values())
    if isinstance(found, list | tuple | set):
        return list(found)
    if isinstance(found, Tensor | np.ndarray) or not type(found).__module__.startswith(("slipstream.", "torch.nn.")):
        return []
    slots = [name for cls in type(found).__mro__ for name in getattr(cls, "__slots__", ())]
    return [*getattr(found, "__dict__", {}).values(), *(getattr(found, name, None) for name in slots)]


# --- what comes and goes ---


def step_bytes(trainer: Trainer, batch: StagedBatch) -> int:
    """Bytes that come and go within a step: the batch's rows, activations, gradients, what updates need.

    Args:
        trainer: One that trains, or a weightless one; a window is opened where its criterion watches rows.
        batch: What to train on.
    """
    step = trainer.step
    step.is_averaging = step.average is not None
    if step.tracker is not None and not step.tracker.is_open:
        step.tracker.open_window()

    def train() -> None:
        step(batch, 0.0)
        step.dense_optimizer.zero_grad()

    step.dense_optimizer.zero_grad()
    return peak_of(train)


def evaluation_bytes(model: nn.Module, *, batch_size: int, num_dense: int, num_fields: int, row_width: int) -> int:
    """Bytes that a batch of evaluation takes: looked-up rows, pooled, and activations.

    Args:
        model: On the device `meta`.
        batch_size: B.
        num_dense: Dense columns.
        num_fields: F.
        row_width: D.
    """

    def predict() -> None:
        looked_up = torch.zeros(batch_size, num_fields, row_width, device=META)
        click_probabilities(model, torch.zeros(batch_size, num_dense, device=META), looked_up)

    with torch.inference_mode():
        return peak_of(predict)


def cut_layout(layout: SlotLayout, batch_size: int) -> SlotLayout:
    """Give a layout whose tables have no more rows than a batch can look up: a step over it takes as much."""
    sizes = {
        name: min(len(layout.held_slots(name)), batch_size * layout.column_tables.count(name))
        if name in layout.tiered
        else len(slots)
        for name, slots in layout.slot_maps.items()
    }
    starts = np.cumsum([0, *sizes.values()])
    slot_maps = {
        name: np.arange(start, start + size) for start, (name, size) in zip(starts[:-1], sizes.items(), strict=True)
    }
    return SlotLayout(
        slot_maps,
        num_hot=int(starts[-1]),
        table_of_column=[layout.tables.index(name) for name in layout.column_tables],
        tierless=set(layout.tables) - set(layout.tiered),
    )


def stage_example(
    layout: SlotLayout,
    *,
    batch_size: int,
    num_dense: int,
    device: torch.device,
    on_cuda: bool,
    weighted: bool,
    padding: PaddedColumns | None = None,
    range_of_slot: np.ndarray | None = None,
) -> StagedBatch:
    """Give a batch as a step gets it, whose lookups are as different as they can be.

    Args:
        layout: As `cut_layout` gives it: every row is hot.
        batch_size: B.
        num_dense: Dense columns.
        device: Where its tensors are.
        on_cuda: Whether the device finds the duplicates, as a GPU does.
        weighted: Whether its samples have weights.
        padding: Columns that may hold padding.
        range_of_slot: Range of its table that each row is in, if steps must know. Shape (num_rows,), uint8.
    """
    slots = np.empty((batch_size, len(layout.column_tables)), np.int32)
    passed = dict.fromkeys(layout.tables, 0)
    for at, name in enumerate(layout.column_tables):
        # columns of one table go on where the one before stopped, so that they look up all of its rows
        numbers = passed[name] + np.arange(batch_size)
        slots[:, at] = layout.slot_maps[name][numbers % len(layout.slot_maps[name])]
        passed[name] += batch_size
    rows = TieredRows(
        num_rows=layout.num_rows, num_hot=layout.num_rows, embedding_dim=1, num_staged=0, optimizer="sgd", device=META
    )
    lookahead = LookAhead(
        rows,
        StagingHalves(rows),
        chunk_batches=1,
        columns=None if layout.is_whole else layout.columns,
        padding=padding,
        range_of_slot=range_of_slot,
        in_thread=False,
        sorts_all=not on_cuda,
    )
    batch = Batch(
        dense=np.zeros((batch_size, num_dense), np.float32),
        slots=slots,
        labels=np.zeros(batch_size, np.float32),
        is_hot=True,
        weights=np.ones(batch_size, np.float32) if weighted else None,
    )
    staged: list[StagedBatch] = []
    lookahead.run(iter([batch]), staged.append)
    return _move(staged[0], device)


def _move(batch: StagedBatch, device: torch.device) -> StagedBatch:
    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    found = batch.distinct
    return StagedBatch(
        dense=batch.dense.to(device),
        labels=batch.labels.to(device),
        is_hot=batch.is_hot,
        positions=there(batch.positions),
        distinct=None
        if found is None
        else Distinct(found.rows.to(device), found.inverse.to(device), there(found.order), there(found.starts)),
        weights=there(batch.weights),
        tierless=there(batch.tierless),
        is_value=there(batch.is_value),
        ranges=there(batch.ranges),
    )
