"""The mean of all weights over the last steps of a training, which is what is served.

Steps at a high rate scatter around the weights they aim at; their mean lies nearer, and hardly depends on which samples
came last. Training goes on from the weights themselves.

Dense layers and tensor-train cores are few, so each step moves a running mean of them. A row must not be visited by
steps that do not look it up, so what is kept of it is not a mean but its *lead*, Σ (w - w_k) over the averaged steps k
so far: a step that moves the row by Δ adds Δ for every averaged step before it, a step that does not look the row up
adds nothing, and after n averaged steps the mean is w - lead / n, exactly that of n copies.

Source: Polyak and Juditsky (1992), over the last part of training; the form for rows is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from slipstream.embedding.tiers.rows import TieredRows


class WeightAverage:
    """The means, and how many steps they are over.

    Args:
        rows: The tiers, which keep the lead of each row beside it.
        parameters: Every other weight, all on the device of the rows.
    """

    def __init__(self, rows: TieredRows, parameters: Iterable[Tensor]) -> None:
        if rows.buffer_lead is None:
            raise ValueError("expected tiers that keep the lead of their rows; make them with keeps_lead=True")
        self._rows, self._lead = rows, rows.buffer_lead
        self._parameters = [parameter.detach() for parameter in parameters]
        self._means = [torch.zeros_like(parameter) for parameter in self._parameters]
        # a tensor, so that a captured step counts on; float32 counts 2²⁴ steps, more than a mean can tell apart
        self._count = torch.zeros((), device=rows.device)

    def follow_rows(self, positions: Tensor, before: Tensor) -> None:
        """Add to the lead of the rows that a step has moved; before `count`.

        Args:
            positions: Distinct rows of the buffer. Shape (U,), int64.
            before: What they were. Shape (U, D).
        """
        moved = self._rows.buffer.index_select(0, positions).sub_(before)
        self._lead.index_add_(0, positions, moved.mul_(self._count))

    def count(self) -> None:
        """Take the weights as they are now into the mean."""
        self._count.add_(1)
        away = torch._foreach_sub(self._parameters, self._means)
        torch._foreach_mul_(away, self._count.reciprocal())
        torch._foreach_add_(self._means, away)

    def num_steps(self) -> int:
        """Count the steps in the mean; waits for the device."""
        return int(self._count)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model, the cores and `TieredRows.gather` be the mean for as long as this is entered.

        No row may be staged. Before the first averaged step the weights stay as they are.
        """
        if not (num_steps := self.num_steps()):
            yield
            return
        kept = [parameter.clone() for parameter in self._parameters]
        torch._foreach_copy_(self._parameters, self._means)
        self._rows.mean_over = num_steps
        try:
            yield
        finally:
            self._rows.mean_over = 0
            torch._foreach_copy_(self._parameters, kept)

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs beside the tiers."""
        return {"count": self._count, **{str(at): mean for at, mean in enumerate(self._means)}}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        self._count.copy_(tensors["count"])
        for at, mean in enumerate(self._means):
            mean.copy_(tensors[str(at)])
