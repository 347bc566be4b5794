"""Checkpoints of a training: safetensors, no pickles.

A checkpoint holds everything a killed run needs to end with the parameters of an uninterrupted one, in one file
that is renamed into place: rows and optimizer state by tier, dense layers, position in the epoch, samples waiting
for a batch, what was kept of the current round, staleness state. The order of samples and batches is redrawn from
the seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from slipstream.errors import ArtifactError
from slipstream.io.artifacts import write_atomically
from slipstream.io.samples import Samples
from slipstream.training.loop import LoopTotals, Trainer
from slipstream.training.model_file import read_tensors
from slipstream.training.order.rounds import Picked, Position
from slipstream.training.skipping.skipper import Selection

_GROUPS = ("hot", "cold")


class Checkpointer:
    """Saves and restores a trainer.

    Args:
        path: The checkpoint file.
        fingerprint: Of the run; a checkpoint of another run is refused.
        every_steps: Steps between saves, rounded up to the end of a look-ahead chunk; 0 never saves.
    """

    def __init__(self, path: Path, *, fingerprint: str, every_steps: int) -> None:
        self._path, self._fingerprint, self._every_steps = path, fingerprint, every_steps
        self._saved_at = 0

    def between_chunks(self, trainer: Trainer) -> None:
        """Save when it is time; called while no row moves."""
        steps = trainer.totals.steps
        if self._every_steps and steps - self._saved_at >= self._every_steps:
            self._save(trainer)
            self._saved_at = steps

    def restore(self, trainer: Trainer) -> bool:
        """Bring a trainer to the state of the checkpoint; returns whether there was one.

        Raises:
            ArtifactError: The file is damaged or belongs to another run.
        """
        if not self._path.exists():
            return False
        tensors, metadata = read_tensors(self._path)
        if metadata.get("fingerprint") != self._fingerprint:
            raise ArtifactError(
                f"`{self._path}` is a checkpoint of run {metadata.get('fingerprint')}, expected {self._fingerprint}",
                hint="remove it, or run `slipstream train --force`",
            )
        _set_parameters(trainer, tensors)
        state = json.loads(metadata["state"])
        trainer.totals = LoopTotals(**state["totals"])
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        trainer.position = _read_position(state["position"], arrays)
        trainer.skipper.restore(state["skipper"], _below(arrays, "skipper."))
        if trainer.step.tracker is not None:
            trainer.step.tracker.restore(_below(arrays, "tracker."))
        trainer.lookahead.restore_counters(state["lookahead"])
        trainer.step.representations.restore(state.get("tables", {}), _below(tensors, "tables."))
        self._saved_at = trainer.totals.steps
        return True

    def _save(self, trainer: Trainer) -> None:
        trainer.totals.loss_sum += trainer.step.take_loss_sum()
        position = trainer.settle_position()
        plain, arrays = trainer.skipper.state()
        tracker = trainer.step.tracker
        tracked = {} if tracker is None else tracker.state()
        tensors = {name: tensor.cpu().contiguous() for name, tensor in _parameters(trainer).items()}
        for name, array in (
            _prefixed("skipper.", arrays) | _prefixed("tracker.", tracked) | _position_arrays(position)
        ).items():
            tensors[name] = torch.from_numpy(np.ascontiguousarray(array))
        state = {
            "totals": asdict(trainer.totals) | {"seconds": trainer.elapsed()},
            "position": _plain_position(position),
            "skipper": plain,
            "lookahead": trainer.lookahead.counters(),
        }
        state["tables"], extra = trainer.step.representations.state()
        tensors |= {f"tables.{name}": value.cpu().contiguous() for name, value in extra.items()}
        metadata = {"fingerprint": self._fingerprint, "state": json.dumps(state)}
        with write_atomically(self._path) as path:
            save_file(tensors, path, metadata=metadata)


def _parameters(trainer: Trainer) -> dict[str, Tensor]:
    rows = trainer.step.rows
    tensors = {f"hot.{index}": buffer[: rows.num_hot].cpu() for index, (buffer, _) in enumerate(rows.pairs)}
    tensors |= {f"cold.{index}": host for index, host in enumerate(trainer.lookahead.cold_now())}
    tensors |= {f"dense.{name}": value for name, value in trainer.step.model.state_dict().items()}
    tensors |= {f"dense_state.{i}": value for i, value in enumerate(trainer.step.dense_optimizer.state)}
    return tensors


def _set_parameters(trainer: Trainer, tensors: Mapping[str, Tensor]) -> None:
    rows = trainer.step.rows
    for index, (buffer, host) in enumerate(rows.pairs):
        buffer[: rows.num_hot] = tensors[f"hot.{index}"].to(buffer.device)
        host.copy_(tensors[f"cold.{index}"])
    trainer.step.model.load_state_dict(_below(tensors, "dense."))
    for index, value in enumerate(trainer.step.dense_optimizer.state):
        value.copy_(tensors[f"dense_state.{index}"])


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
