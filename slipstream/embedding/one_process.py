"""Why bags with state outside their parameters train in one process only: several would drift apart."""

from __future__ import annotations

import torch.distributed as dist


def require_one_process(what: str, *, remedy: str) -> None:
    """Refuse to train by `what` where several processes train together.

    DDP averages gradients of parameters. It knows nothing of updates that a module makes itself, and of a cache it
    would average positions, which hold other rows in every process: models would drift apart without a word.

    Args:
        what: Of the module, as its caller wrote it.
        remedy: What to do instead.

    Raises:
        ValueError: A process group of more than one process is initialised.
    """
    if dist.is_available() and dist.is_initialized() and (size := dist.get_world_size()) > 1:
        raise ValueError(
            f"expected one process to train {what}, found a process group of {size}, whose models would drift apart: "
            f"{remedy}"
        )
