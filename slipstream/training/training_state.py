"""What a checkpoint holds of a training besides the rows: collected, and put back."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from slipstream.embedding.tiers.rows import TieredRows
from slipstream.io.samples import Samples
from slipstream.io.tensors import StoredTensor
from slipstream.training.loop import LoopTotals, Trainer
from slipstream.training.order.rounds import Picked, Position
from slipstream.training.shared_step import SharedStep
from slipstream.training.skipping.skipper import Selection
from slipstream.training.step import TrainStep

_GROUPS = ("hot", "cold")
_BLOCK_ROWS = 1 << 16


def collect_state(trainer: Trainer) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Say what a trainer knows besides its rows, while no row moves.

    Returns:
        (plain values for JSON, arrays that nobody changes any more).
    """
    if isinstance(trainer.step, SharedStep):
        trainer.step.share_peaks()
    trainer.totals.loss_sum += trainer.step.take_loss_sum()
    position = trainer.decided_position()
    plain, arrays = trainer.skipper.state()
    tracker = trainer.step.tracker
    tracked = {} if tracker is None else tracker.state()
    state = {
        "totals": asdict(trainer.totals) | {"seconds": trainer.elapsed(), "cpu_seconds": trainer.elapsed_cpu()},
        "position": _plain_position(position),
        "skipper": plain,
        "lookahead": trainer.lookahead.counters(),
    }
    if trainer.validation is not None:
        state["validation"] = trainer.validation.state()
    tensors = {f"dense.{name}": value for name, value in trainer.step.model.state_dict().items()}
    tensors |= {f"dense_state.{i}": value for i, value in enumerate(trainer.step.dense_optimizer.state)}
    state["tables"], extra = trainer.step.representations.state()
    tensors |= {f"tables.{name}": value for name, value in extra.items()}
    if trainer.step.average is not None:
        tensors |= {f"average.{name}": value for name, value in trainer.step.average.state().items()}
    changing = {name: value.detach().cpu().numpy() for name, value in tensors.items()}
    changing |= _prefixed("skipper.", arrays) | _prefixed("tracker.", tracked)
    if isinstance(trainer.step, SharedStep):
        of_ranks, plain_of_ranks = _collect_parts(trainer.step, tracked)
        state |= plain_of_ranks
        changing |= of_ranks
    copies = {name: value.copy() for name, value in changing.items()}
    return state, {name: StoredTensor.of(value) for name, value in (copies | _position_arrays(position)).items()}


def restore_state(trainer: Trainer, state: Mapping[str, Any], weights: Path, *, clone: Path) -> None:
    """Bring a trainer to a state that was collected, and its rows to those in the same file.

    Args:
        trainer: Built for the same run.
        state: Plain values.
        weights: The safetensors file, known to be whole.
        clone: The file with the cold rows, where the other has none.
    """
    tensors: dict[str, Tensor] = {}
    with safe_open(weights, framework="pt") as stream:
        for name in stream.keys():
            if not name.startswith(("device.", "host.")):
                tensors[name] = stream.get_tensor(name)
        rows = trainer.step.rows
        for index, (buffer, _) in enumerate(rows.pairs):
            stored = stream.get_slice(f"device.{index}")
            for start in range(0, rows.num_hot, _BLOCK_ROWS):
                stop = min(start + _BLOCK_ROWS, rows.num_hot)
                buffer[start:stop] = stored[start:stop].to(buffer.device)
        _restore_cold(rows, stream, clone)
    trainer.step.model.load_state_dict(_below(tensors, "dense."))
    for index, value in enumerate(trainer.step.dense_optimizer.state):
        value.copy_(tensors[f"dense_state.{index}"])
    trainer.totals = LoopTotals(**state["totals"])
    trainer.step.count_from(trainer.totals.steps)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    trainer.position = _read_position(state["position"], arrays)
    trainer.skipper.restore(state["skipper"], _below(arrays, "skipper."))
    of_ranks = [_below(arrays, f"ranks.{rank}.") for rank in range(1, state.get("ranks", 1))]
    if trainer.step.tracker is not None:
        tracked = _below(arrays, "tracker.")
        own = {name: tracked[name] for name in trainer.step.tracker.summable if name in tracked}
        trainer.step.tracker.restore(tracked | _choose_part(trainer.step, [own, *of_ranks]))
    if trainer.validation is not None:
        trainer.validation.restore(state["validation"])
    if trainer.step.average is not None:
        trainer.step.average.restore(_below(tensors, "average."))
    if isinstance(trainer.step, SharedStep):
        trainer.step.sums.ranks.sent = Counter(state.get("sent_bytes", {}))
        trainer.step.sums.ranks.seconds = defaultdict(float, state.get("exchange_seconds", {}))
        own = {name: arrays[name] for name in ("feedback",) if name in arrays}
        trainer.step.sums.restore(_choose_part(trainer.step, [own, *of_ranks]))
    trainer.lookahead.restore_counters(state["lookahead"])
    trainer.step.representations.restore(state["tables"], _below(tensors, "tables."))


def _restore_cold(rows: TieredRows, stream: Any, clone: Path) -> None:
    """Fill the cold tier, in memory or in a file, from a checkpoint of either."""
    read = _cold_reader(rows, stream, clone)
    for start in range(0, rows.num_cold, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, rows.num_cold)
        here, of_block = rows.cold_places(start, stop)
        for (_, host), values in zip(rows.pairs, read(slice(start, stop)), strict=True):
            host[here] = values[of_block]


def _cold_reader(rows: TieredRows, stream: Any, clone: Path) -> Callable[[slice], list[Tensor]]:
    """Give what reads all that travels with some cold rows: each by itself, or side by side in records."""
    names = set(stream.keys())
    if "host.0" in names:
        columns = [stream.get_slice(f"host.{index}") for index in range(len(rows.pairs))]
        return lambda block: [stored[block] for stored in columns]
    if "host.records" in names:
        stored = stream.get_slice("host.records")
        return lambda block: rows.split_records(stored[block])
    cloned = np.memmap(clone, rows.cold.new_empty(0).numpy().dtype, mode="c").reshape(-1, rows.record_width)
    return lambda block: rows.split_records(torch.from_numpy(cloned[block]))


def _collect_parts(step: SharedStep, tracked: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays that every rank has its own of, by rank; plain values): what adds up over ranks."""
    sums = step.sums
    own = {} if step.tracker is None else {name: tracked[name] for name in step.tracker.summable if name in tracked}
    own |= sums.state()
    of_ranks = sums.ranks.gather_arrays(own, "checkpoints")
    arrays = dict(sums.state())
    for rank, theirs in enumerate(of_ranks[1:], start=1):
        arrays |= _prefixed(f"ranks.{rank}.", theirs)
    counted = {"sent_bytes": dict(sums.ranks.sent), "exchange_seconds": dict(sums.ranks.seconds)}
    return arrays, {"ranks": sums.ranks.size, **counted}


def _choose_part(step: TrainStep, of_ranks: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Give this rank its part of what adds up; the first takes the parts of ranks that are no more as well."""
    rank, size = (step.sums.ranks.rank, step.sums.ranks.size) if isinstance(step, SharedStep) else (0, 1)
    chosen = {}
    for name, first in of_ranks[0].items():
        parts = [theirs[name] for theirs in of_ranks]
        if rank == 0:
            chosen[name] = reduce(np.add, parts[size:], first)
        else:
            chosen[name] = parts[rank] if rank < len(parts) else np.zeros_like(first)
    return chosen


def _plain_position(position: Position) -> dict[str, Any]:
    return {
        "epoch": position.epoch,
        "round_index": position.round_index,
        "batches_done": position.batches_done,
    }


def _position_arrays(position: Position) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for kind, samples in position.waiting.items():
        fields = {"X_int": samples.X_int, "X_cat": samples.X_cat, "y": samples.y, "weights": samples.weights}
        arrays |= {f"waiting.{kind}.{name}": value for name, value in fields.items() if value is not None}
    for name, picked in (("picked", position.picked), ("ahead", position.picked_ahead)):
        for group, selection in zip(_GROUPS, picked or (), strict=False):
            arrays[f"{name}.{group}.keep"] = selection.keep
            if selection.weights is not None:
                arrays[f"{name}.{group}.weights"] = selection.weights
    return arrays


def _read_position(plain: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Position:
    waiting = {}
    for kind in _GROUPS:
        if fields := _below(arrays, f"waiting.{kind}."):
            waiting[kind] = Samples(
                X_int=fields["X_int"], X_cat=fields["X_cat"], y=fields["y"], weights=fields.get("weights")
            )
    return Position(
        waiting=waiting, picked=_read_picked(arrays, "picked"), picked_ahead=_read_picked(arrays, "ahead"), **plain
    )


def _read_picked(arrays: Mapping[str, np.ndarray], name: str) -> Picked | None:
    fields = [_below(arrays, f"{name}.{group}.") for group in _GROUPS]
    if not all(fields):
        return None
    hot, cold = (Selection(keep=one["keep"], weights=one.get("weights")) for one in fields)
    return hot, cold


def _below(items: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in items.items() if name.startswith(prefix)}


def _prefixed(prefix: str, items: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {prefix + name: value for name, value in items.items()}
