"""Everything of a training that a checkpoint holds, beside the rows: collected, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from torch import Tensor

from slipstream.io.samples import Samples
from slipstream.io.tensors import StoredTensor
from slipstream.training.loop import LoopTotals, Trainer
from slipstream.training.order.rounds import Picked, Position
from slipstream.training.skipping.skipper import Selection

_GROUPS = ("hot", "cold")
_BLOCK_ROWS = 1 << 16


def collect_state(trainer: Trainer) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Say what a trainer knows beside its rows, while no row moves.

    Returns:
        (plain values for JSON, arrays that nobody changes any more).
    """
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
    tensors = {f"dense.{name}": value for name, value in trainer.step.model.state_dict().items()}
    tensors |= {f"dense_state.{i}": value for i, value in enumerate(trainer.step.dense_optimizer.state)}
    state["tables"], extra = trainer.step.representations.state()
    tensors |= {f"tables.{name}": value for name, value in extra.items()}
    if trainer.step.average is not None:
        tensors |= {f"average.{name}": value for name, value in trainer.step.average.state().items()}
    changing = {name: value.detach().cpu().numpy() for name, value in tensors.items()}
    changing |= _prefixed("skipper.", arrays) | _prefixed("tracker.", tracked)
    copies = {name: value.copy() for name, value in changing.items()}
    return state, {name: StoredTensor.of(value) for name, value in (copies | _position_arrays(position)).items()}


def restore_state(trainer: Trainer, state: Mapping[str, Any], weights: Path) -> None:
    """Bring a trainer to a state that was collected, and its rows to those in the same file.

    Args:
        trainer: Built for the same run.
        state: Plain values.
        weights: The safetensors file, known to be whole.
    """
    tensors: dict[str, Tensor] = {}
    with safe_open(weights, framework="pt") as stream:
        for name in stream.keys():
            if not name.startswith(("device.", "host.")):
                tensors[name] = stream.get_tensor(name)
        rows = trainer.step.rows
        for index, (buffer, host) in enumerate(rows.pairs):
            for name, target in ((f"device.{index}", buffer[: rows.num_hot]), (f"host.{index}", host)):
                stored = stream.get_slice(name)
                for start in range(0, len(target), _BLOCK_ROWS):
                    target[start : start + _BLOCK_ROWS] = stored[start : start + _BLOCK_ROWS].to(target.device)
    trainer.step.model.load_state_dict(_below(tensors, "dense."))
    for index, value in enumerate(trainer.step.dense_optimizer.state):
        value.copy_(tensors[f"dense_state.{index}"])
    trainer.totals = LoopTotals(**state["totals"])
    trainer.step.count_from(trainer.totals.steps)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    trainer.position = _read_position(state["position"], arrays)
    trainer.skipper.restore(state["skipper"], _below(arrays, "skipper."))
    if trainer.step.tracker is not None:
        trainer.step.tracker.restore(_below(arrays, "tracker."))
    if trainer.step.average is not None:
        trainer.step.average.restore(_below(tensors, "average."))
    trainer.lookahead.restore_counters(state["lookahead"])
    trainer.step.representations.restore(state["tables"], _below(tensors, "tables."))


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
