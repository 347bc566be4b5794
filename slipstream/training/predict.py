"""Click probabilities from a model and its rows, wherever they live."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from slipstream.distributed.ranks import ALONE, Alone
from slipstream.io.processors import usable_cores
from slipstream.io.samples import Samples
from slipstream.training.threads import choose_threads, step_flop, torch_threads

_SAMPLES_MULTIPLE = 64
"""Samples at once are a multiple of this: what is left over is computed by other instructions."""


def click_probabilities(model: nn.Module, dense: Tensor, looked_up: Tensor) -> Tensor:
    """Probabilities that depend on each sample alone, to the bit on a CPU: not on the number or order of the others.

    The last few rows of a matrix product, and the last few values of a sigmoid, are rounded otherwise than those in
    even blocks; so batches are filled up with zeros.

    Args:
        model: (dense (B, n), looked-up rows (B, T, D)) -> logits (B,).
        dense: Shape (B, n).
        looked_up: Shape (B, T, D).

    Returns:
        Shape (B,).
    """
    num_samples = len(dense)
    if missing := -num_samples % _SAMPLES_MULTIPLE:
        dense, looked_up = pad(dense, (0, 0, 0, missing)), pad(looked_up, (0, 0, 0, 0, 0, missing))
    return torch.sigmoid(model(dense, looked_up))[:num_samples]


def predict(
    model: nn.Module,
    look_up: Callable[[np.ndarray], Tensor],
    shards: Iterable[Samples],
    *,
    batch_size: int,
    num_threads: int = 0,
    ranks: Alone = ALONE,
) -> tuple[np.ndarray, np.ndarray]:
    """Predict samples; changes nothing and evicts nothing.

    Args:
        model: (dense (B, n), looked-up rows (B, T, D)) -> logits (B,).
        look_up: Rows that a batch looks up, on the model's device: `X_cat` (B, T) -> (B, T, D).
        shards: Samples.
        batch_size: Samples at once.
        num_threads: CPU threads; 0 takes as many as a batch is worth, the same for the same model and batch size.
        ranks: Who predicts together, each a part of every batch; all are given the same samples.

    Returns:
        (probabilities (n,) float32, labels (n,) float32), in the order given.
    """
    was_training = model.training
    model.eval()
    probabilities, labels = [], []
    threads = choose_threads(
        num_threads,
        flop=step_flop(model, batch_size, backward=False),
        cores=usable_cores(),
        default=torch.get_num_threads(),
    )
    with torch.inference_mode(), torch_threads(threads):
        for samples in shards:
            for start in range(0, len(samples), batch_size):
                piece = samples.take(slice(start, start + batch_size))
                mine = ranks.own_part(len(piece))
                looked_up = look_up(piece.X_cat)[mine]
                dense = torch.from_numpy(np.ascontiguousarray(piece.X_int[mine])).to(looked_up.device)
                own = click_probabilities(model, dense, looked_up)
                probabilities.append(ranks.join(own, len(piece)).cpu().numpy())
                labels.append(piece.y)
    model.train(was_training)
    return np.concatenate(probabilities), np.concatenate(labels)
