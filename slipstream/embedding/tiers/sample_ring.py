"""Samples kept on the device, a window at a time, and batches taken from them there.

What is shuffled together goes to the device in one piece, in the order in which it was read, while the round before
trains. What tells the order of samples is their numbers: those of a whole round go along when it begins. A step then
finds its samples by a counter that it keeps on the device itself, so that the host does nothing for it but launch it.

    copies      windows of round r+1, bulk copies | windows of round r+2 ...
    compute     order of r, step, step, step ...  | order of r+1, step, step ...

A window that neither of two rounds in a row takes from gives its place away. Windows come and go in any sizes, so one
may lie in several ranges; numbers are shifted by the range they fall into.

Shape suffixes: R samples that there is room for, B batch, T columns, K of them in tiers, P that may hold padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slipstream.embedding.tiers.batch_plan import RowsInPlace
from slipstream.embedding.tiers.lookahead import Batch, StagedBatch
from slipstream.embedding.tiers.padding import PaddedColumns
from slipstream.embedding.tiers.pinned import PinnedRing
from slipstream.embedding.tiers.transfer import RowMover
from slipstream.ops.picks import Arrays, FreeRanges, Picks, Window, locate, shifts

_KINDS = 2
"""Kinds of batches, of which each may begin with samples that waited for it."""


class PickedBatch(Batch):
    """A batch that is numbers within windows; its arrays are copied from there whenever they are asked for.

    Args:
        picks: The numbers.
        is_hot: As of `Batch`.
        divisor: As of `Batch`.
    """

    __slots__ = ("picks",)
    picks: Picks

    def __init__(self, picks: Picks, *, is_hot: bool, divisor: int | None = None) -> None:
        for name, value in (("picks", picks), ("is_hot", is_hot), ("divisor", divisor)):
            object.__setattr__(self, name, value)

    @property
    def dense(self) -> np.ndarray:
        """As of `Batch`."""
        return self.picks.gather("dense")

    @property
    def slots(self) -> np.ndarray:
        """As of `Batch`."""
        return self.picks.gather("slots")

    @property
    def labels(self) -> np.ndarray:
        """As of `Batch`."""
        return self.picks.gather("labels")

    @property
    def weights(self) -> np.ndarray | None:
        """As of `Batch`."""
        return self.picks.weights

    def __len__(self) -> int:
        """B."""
        return len(self.picks)


@dataclass(frozen=True, slots=True)
class _Placed:
    """Where a window lies, and when it is there."""

    window: Window
    ranges: list[tuple[int, int]]
    arrived: torch.cuda.Event | None


class SampleRing:
    """Room on the device for the windows of two rounds, and for the order of one.

    `bring` belongs to one thread, everything else to the one that trains.

    Args:
        num_samples: R.
        most_samples: How many samples one call of `lay_out` can be given.
        batch_size: B.
        num_dense: Dense columns.
        num_columns: T.
        num_rows: Rows in tiers; their slots are the lowest.
        num_hot: Hot rows among them.
        device: Where all of it is.
        columns: The columns in tiers; None for all. Shape (K,).
        padding: Columns that may hold padding; None for none.
        slot_type: Of slots.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        most_samples: int,
        batch_size: int,
        num_dense: int,
        num_columns: int,
        num_rows: int,
        num_hot: int,
        device: torch.device,
        columns: np.ndarray | None = None,
        padding: PaddedColumns | None = None,
        slot_type: torch.dtype = torch.int32,
    ) -> None:
        self._num_rows, self._free = num_rows, FreeRanges(num_samples)
        self._placed: dict[int, _Placed] = {}
        self._last_brought: list[Window] = []
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pinned = None if self._copies is None else PinnedRing()
        self._computed: torch.cuda.Event | None = None
        # behind the windows, samples that waited on the host for their batch
        self._first_loose, total = num_samples, num_samples + _KINDS * batch_size
        self._kept = (
            torch.zeros(total, num_dense, device=device),
            torch.zeros(total, num_columns, dtype=slot_type, device=device),
            torch.zeros(total, device=device),
        )
        self._order = torch.zeros(most_samples, dtype=torch.int32, device=device)
        self._weights = torch.zeros(most_samples, device=device)
        # of each batch, and twice the end behind the last: there a batch begins that has no samples
        self._starts = torch.zeros(most_samples + 2, dtype=torch.int32, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._numbers = torch.arange(batch_size, device=device)
        self._batch = StagedBatch(
            dense=torch.zeros(batch_size, num_dense, device=device),
            labels=torch.zeros(batch_size, device=device),
            is_hot=False,
            weights=torch.zeros(batch_size, device=device),
        )
        self._columns = self._others = self._tierless = None
        if columns is not None:
            others = np.delete(np.arange(num_columns), columns)
            self._columns, self._others = _put(columns, device), _put(others, device)
            self._tierless = torch.zeros(batch_size, len(others), dtype=torch.int64, device=device)
        self._padding = None if padding is None else _Padding(padding, batch_size, num_rows, num_hot, device)
        if self._copies is not None:
            for kept in self._kept:
                kept.record_stream(self._copies)
            self.mark_computed()

    # --- the thread that prepares rounds ---

    def bring(self, groups: Sequence[Picks]) -> None:
        """Copy the windows that the coming round takes from, where they are not there yet.

        Windows that neither it nor the round before it takes from are forgotten.

        Args:
            groups: The samples of the coming round.
        """
        wanted = [window for picks in groups for window in picks.windows]
        needed = {id(window) for window in (*wanted, *self._last_brought)}
        for name in [name for name in self._placed if name not in needed]:
            self._free.give(self._placed.pop(name).ranges)
        for window in wanted:
            if id(window) not in self._placed:
                ranges = self._free.take(len(window))
                self._placed[id(window)] = _Placed(window, ranges, self._copy(window, ranges))
        self._last_brought = wanted

    def _copy(self, window: Window, ranges: Sequence[tuple[int, int]]) -> torch.cuda.Event | None:
        if self._copies is None:
            for arrays, start, place in _cut(window, ranges):
                for kept, array in zip(self._kept, arrays, strict=True):
                    kept[place].copy_(torch.from_numpy(array[start : start + place.stop - place.start]))
            return None
        with torch.cuda.stream(self._copies):
            if self._computed is not None:
                self._copies.wait_event(self._computed)
            for arrays, start, place in _cut(window, ranges):
                for kept, array in zip(self._kept, arrays, strict=True):
                    self._copy_through_slabs(kept[place], torch.from_numpy(array[start : start + len(kept[place])]))
            arrived: torch.cuda.Event = self._copies.record_event()
            return arrived

    def _copy_through_slabs(self, target: Tensor, values: Tensor) -> None:
        assert self._pinned is not None and self._copies is not None
        row_bytes = target.element_size() * target[:1].numel()
        most_rows = max(1, self._pinned.slab_bytes // max(1, row_bytes))
        for first in range(0, len(target), most_rows):
            slab, part = self._pinned.take(), slice(first, first + most_rows)
            pinned = slab.view(target.dtype, *target[part].shape)
            pinned.copy_(values[part])
            target[part].copy_(pinned, non_blocking=True)
            slab.mark_busy(self._copies)

    # --- the thread that trains ---

    def mark_computed(self) -> None:
        """Let copies from now on wait for the computation enqueued so far, which may still read what they replace."""
        if self._copies is not None:
            self._computed = torch.cuda.current_stream(self._order.device).record_event()

    def lay_out(self, batches: Sequence[Batch], mover: RowMover) -> None:
        """Say which batches the next steps are, from the first on; their windows must have been brought.

        Args:
            batches: In training order.
            mover: Brings what goes along.

        Raises:
            ValueError: They have more samples than there is room for.
        """
        ends = np.cumsum([len(batch) for batch in batches])
        num_samples = int(ends[-1])
        if num_samples > len(self._order):
            raise ValueError(f"expected at most {len(self._order):,} samples at a time, found {num_samples:,}")
        starts = np.concatenate([[0], ends, ends[-1:]]).astype(np.int32)
        order, weights = np.empty(num_samples, np.int32), None
        if any(batch.weights is not None for batch in batches):
            weights = np.ones(num_samples, np.float32)
        loose = _Loose(self._first_loose, stop=len(self._kept[0]))
        for batch, start in zip(batches, starts.tolist(), strict=False):
            part = slice(start, start + len(batch))
            picks = batch.picks if isinstance(batch, PickedBatch) else _pick_all(batch)
            locate(picks.numbers, shifts(picks, lambda window: self._place(window, loose)), out=order[part])
            if weights is not None and batch.weights is not None:
                weights[part] = batch.weights
        self._write(order, starts, weights, loose.pieces, mover)

    def _place(self, window: Window, loose: _Loose) -> Sequence[tuple[int, int]]:
        """Say where a window lies, once it is there; one that was not brought goes behind all windows."""
        placed = self._placed.get(id(window))
        if placed is None:
            return [loose.place(window)]
        if placed.arrived is not None and placed.window not in loose.awaited:
            torch.cuda.current_stream(self._order.device).wait_event(placed.arrived)
            loose.awaited.add(placed.window)
        return placed.ranges

    def _write(
        self,
        order: np.ndarray,
        starts: np.ndarray,
        weights: np.ndarray | None,
        loose: Sequence[tuple[slice, Window]],
        mover: RowMover,
    ) -> None:
        arrays = [order, starts] if weights is None else [order, starts, weights]
        pieces = [(place, piece) for place, window in loose for piece in window.pieces]
        there = mover.to_device([*arrays, *(array for _, piece in pieces for array in piece)])
        mover.await_moved(mover.mark_moved())
        mover.hand_over(there)
        for fixed, values in zip((self._order, self._starts, self._weights), there[: len(arrays)], strict=False):
            fixed[: len(values)].copy_(values)
        for at, (place, _) in enumerate(pieces):
            for kept, values in zip(self._kept, there[len(arrays) + 3 * at :], strict=False):
                kept[place].copy_(values)
        self._step.zero_()

    def stage(self, batch: Batch, in_place: RowsInPlace) -> StagedBatch:
        """Give a batch as a step sees it: memory that is filled when the step begins, the same for every batch."""
        num_samples, fixed = len(batch), self._batch
        assert fixed.weights is not None
        is_value = None if self._padding is None else self._padding.is_value
        return StagedBatch(
            dense=fixed.dense[:num_samples],
            labels=fixed.labels[:num_samples],
            is_hot=batch.is_hot,
            in_place=in_place,
            divisor=batch.divisor,
            weights=None if batch.weights is None else fixed.weights[:num_samples],
            tierless=None if self._tierless is None else self._tierless[:num_samples],
            is_value=None if is_value is None else is_value[:num_samples],
        )

    def padding_counted(self) -> tuple[int, int]:
        """Count the lookups that were padding, and those of cold rows among them; waits for the device."""
        if self._padding is None:
            return 0, 0
        lookups, cold_lookups = self._padding.counted.cpu().tolist()
        return lookups, cold_lookups

    def forget_counts(self) -> None:
        """Count from zero on."""
        if self._padding is not None:
            self._padding.counted.zero_()

    def tensors(self) -> list[Tensor]:
        """Everything on the device."""
        held = [*vars(self).values(), *self._kept, *self._batch.tensors()]
        held += [] if self._padding is None else vars(self._padding).values()
        return [value for value in held if isinstance(value, Tensor)]

    # --- the device ---

    def read(self) -> None:
        """Fill the memory of the batch whose turn it is."""
        entries, is_there = self._find_entries(0)
        samples = self._order.index_select(0, entries)
        dense, slots, labels = self._kept
        torch.index_select(dense, 0, samples, out=self._batch.dense)
        torch.index_select(labels, 0, samples, out=self._batch.labels)
        torch.index_select(self._weights, 0, entries, out=self._batch.weights)
        if self._tierless is None and self._padding is None:
            return
        looked_up = slots.index_select(0, samples)
        if self._tierless is not None and self._others is not None:
            self._tierless.copy_(looked_up.index_select(1, self._others))
        if self._padding is not None:
            self._padding.find(looked_up, is_there)

    def read_slots(self, slots: Tensor, *, ahead: int) -> None:
        """Give the slots of a batch to come, those in tiers; V where there is none.

        Args:
            slots: Where to put them. Shape (B·K,).
            ahead: How many batches it is ahead of the one whose turn it is.
        """
        entries, is_there = self._find_entries(ahead)
        looked_up = self._kept[1].index_select(0, self._order.index_select(0, entries))
        if self._columns is not None:
            looked_up = looked_up.index_select(1, self._columns)
        slots.view(looked_up.shape).copy_(torch.where(is_there.unsqueeze(1), looked_up, self._num_rows))

    def advance(self) -> None:
        """Let it be the next batch's turn."""
        self._step.add_(1)

    def _find_entries(self, ahead: int) -> tuple[Tensor, Tensor]:
        """(where in the order the samples of a batch stand, and whether there are so many); both (B,).

        What is behind the last sample repeats it: a sample of another round might be replaced meanwhile.
        """
        start = self._starts.index_select(0, self._step + ahead).long()
        stop = self._starts.index_select(0, self._step + (ahead + 1)).long()
        entries = self._numbers + start
        return torch.minimum(entries, stop - 1).clamp_(min=0), entries < stop


class _Loose:
    """Windows that lie behind all others for as long as a call of `lay_out` counts, and those that it waits for.

    Args:
        start: The first place there.
        stop: The place after the last.
    """

    def __init__(self, start: int, *, stop: int) -> None:
        self._next, self._stop = start, stop
        self.pieces: list[tuple[slice, Window]] = []
        self.awaited: set[Window] = set()

    def place(self, window: Window) -> tuple[int, int]:
        """Give a window its place."""
        for place, known in self.pieces:
            if known is window:
                return place.start, place.stop
        place = slice(self._next, self._next + len(window))
        if place.stop > self._stop:
            raise ValueError(f"expected windows that were brought, found one of {len(window):,} samples that was not")
        self._next = place.stop
        self.pieces.append((place, window))
        return place.start, place.stop


class _Padding:
    """What a step has to know of columns that may hold padding."""

    def __init__(
        self, padding: PaddedColumns, batch_size: int, num_rows: int, num_hot: int, device: torch.device
    ) -> None:
        self._columns, self._slots = _put(padding.columns, device), _put(padding.slots, device)
        in_tiers = padding.slots < num_rows
        self._in_tiers = _put(np.stack([in_tiers, in_tiers & (padding.slots >= num_hot)]), device)
        shape = batch_size, len(padding.columns)
        self.is_value = torch.zeros(shape, dtype=torch.bool, device=device) if padding.is_pooled else None
        self.counted = torch.zeros(2, dtype=torch.int64, device=device)
        """Lookups of padding so far, and those of cold rows among them."""

    def find(self, looked_up: Tensor, is_there: Tensor) -> None:
        """Say which lookups are values, and count the others. Shapes (B, T) and (B,)."""
        is_value = looked_up.index_select(1, self._columns) != self._slots
        if self.is_value is not None:
            self.is_value.copy_(is_value)
        is_padding = ~is_value & is_there.unsqueeze(1)
        self.counted += (is_padding & self._in_tiers.unsqueeze(1)).sum(dim=(1, 2))


def _pick_all(batch: Batch) -> Picks:
    """Give a batch that has arrays of its own as numbers."""
    return Picks.all_of(Window([(batch.dense, batch.slots, batch.labels)]))


def _put(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)


def _cut(window: Window, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[Arrays, int, slice]]:
    """Cut a window where its pieces and its ranges end: (arrays of the piece, first sample there, place on the device).

    Args:
        window: Samples in pieces, one behind the other.
        ranges: Where they go, as many places as there are samples.
    """
    left = [list(place) for place in ranges]
    for arrays in window.pieces:
        start, length = 0, len(arrays[-1])
        while start < length:
            first, stop = left[0]
            count = min(length - start, stop - first)
            yield arrays, start, slice(first, first + count)
            start += count
            left[0][0] += count
            if left[0][0] == stop:
                left.pop(0)
