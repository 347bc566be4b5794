"""Click probabilities from a model and its rows, wherever they live."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from slipstream.embedding.tiers.rows import TieredRows
from slipstream.io.samples import Samples
from slipstream.training.representations import Representations


def predict(
    model: nn.Module,
    rows: TieredRows,
    shards: Iterable[Samples],
    *,
    batch_size: int,
    representations: Representations | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Predict samples; changes nothing and evicts nothing.

    Args:
        model: (dense (B, n), looked-up rows (B, T, D)) -> logits (B,).
        rows: The tiers, flushed.
        shards: Samples, `X_cat` in slots.
        batch_size: Samples at once.
        representations: What the model sees of rows; None for the rows themselves.

    Returns:
        (probabilities (n,) float32, labels (n,) float32), in the order given.
    """
    was_training = model.training
    model.eval()
    probabilities, labels = [], []
    with torch.inference_mode():
        for samples in shards:
            for start in range(0, len(samples), batch_size):
                piece = samples.take(slice(start, start + batch_size))
                if representations is None:
                    slots = torch.from_numpy(np.ascontiguousarray(piece.X_cat))
                    looked_up = rows.gather(slots.flatten()).view(*slots.shape, -1)
                else:
                    looked_up = representations.look_up(rows, piece.X_cat)
                dense = torch.from_numpy(np.ascontiguousarray(piece.X_int)).to(rows.device)
                probabilities.append(torch.sigmoid(model(dense, looked_up)).cpu().numpy())
                labels.append(piece.y)
    model.train(was_training)
    return np.concatenate(probabilities), np.concatenate(labels)
