"""Evaluate: predict a split from a model on disk, whatever its tables are held as.

Reads   a folder      model.safetensors, model.json: a train artifact or an exported model
        segregate/    shards of the split, slots.npz
Keeps   the predictions of the run that trained the model, to the bit on a CPU
Costs   one pass over the split; memory for the stored tables and one batch of rows
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from slipstream.io.artifacts import MANIFEST, Artifact, open_artifact
from slipstream.io.figures import SegregateFigures
from slipstream.io.model_folder import FILES
from slipstream.io.samples import read_shard
from slipstream.training.model_file import load_model
from slipstream.training.order.shards import read_slot_maps
from slipstream.training.predict import predict


def run(folder: Path, *, segregated: Artifact, split: str, batch_size: int = 16_384) -> tuple[np.ndarray, np.ndarray]:
    """Predict a split from a model on disk.

    Args:
        folder: Folder of the model.
        segregated: The segregate artifact that it was trained from.
        split: `val` or `test`.
        batch_size: Samples at once.

    Returns:
        (probabilities (n,) float32, labels (n,) float32), in the order of the split's parts.

    Raises:
        ArtifactError: The folder holds no whole model, or a file was altered.
    """
    if (folder / MANIFEST).exists():
        trained = open_artifact(folder)
        for name in FILES:
            trained.check(folder / name)
    model, tables = load_model(folder)
    row_of_slot = np.empty(SegregateFigures.of(segregated).rows, np.int64)
    for slots in read_slot_maps(segregated).values():
        row_of_slot[slots] = np.arange(len(slots))
    shards = (read_shard(segregated.check(path)) for path in segregated.files(f"{split}/", ".npz"))
    return predict(
        model, lambda slots: tables.look_up(torch.from_numpy(row_of_slot[slots])), shards, batch_size=batch_size
    )
