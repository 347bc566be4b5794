"""Sums of gradients over ranks: the dense layers' in one message, those of rows as the distinct rows of each rank.

Uncompressed, dense gradients are one flat all-reduce. Compressed, they are cut into blocks with a scale each, and what
rounding lost is added to the next step's (error feedback), so that nothing is lost for long. Rows come back too seldom
for that: their codes are drawn, rounding up or down at random so that their mean is right.

Whatever is added is added in rank order on every rank.

Shape suffixes: U distinct rows of all ranks, u distinct rows of one rank, D embedding_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from slipstream.distributed.compression import CODECS, Compression, read_as
from slipstream.distributed.ranks import Ranks
from slipstream.embedding.tiers.lookahead import BatchPart

_BLOCK = 256
"""Values of dense gradients that share a scale."""


class GradientSums:
    """What a training step exchanges.

    Args:
        ranks: Who with.
        compress_dense: How dense gradients travel.
        compress_rows: How gradients of rows do.
        seed: Of the codes of rows that are drawn.
    """

    def __init__(
        self, ranks: Ranks, *, compress_dense: Compression = "none", compress_rows: Compression = "none", seed: int = 0
    ) -> None:
        self.ranks = ranks
        self._dense, self._rows = compress_dense, compress_rows
        self._seed = seed
        self._noise = torch.Generator(device=ranks.device)
        self.feedback: Tensor | None = None
        """What rounding took from the dense gradients that this rank sent so far. Shape (parameters padded,)."""

    def state(self) -> dict[str, np.ndarray]:
        """Say what this rank has to remember, for a checkpoint; it adds up over ranks."""
        return {} if self.feedback is None else {"feedback": self.feedback.cpu().numpy()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` gave, on this rank or in sum on several."""
        self.feedback = torch.from_numpy(state["feedback"]).to(self.ranks.device) if "feedback" in state else None

    def sum_dense(self, gradients: Sequence[Tensor], beside: Tensor) -> Tensor:
        """Add the dense gradients of all ranks, in place.

        Args:
            gradients: Of every parameter, in one order on all ranks.
            beside: A few numbers that are added with them, at full precision. Shape (n,).

        Returns:
            The sums of what stood beside.
        """
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        if self._dense == "none":
            together = torch.cat([flat, beside])
            self.ranks.sum(together, "dense gradients")
            summed, beside = together[: len(flat)], together[len(flat) :]
        else:
            summed, beside = self._sum_compressed(flat, beside)
        at = 0
        for gradient in gradients:
            gradient.copy_(summed[at : at + gradient.numel()].view(gradient.shape))
            at += gradient.numel()
        return beside

    def sum_rows(self, gradients_uD: Tensor, beside: Tensor | None, part: BatchPart, *, step: int) -> Tensor:
        """Add the gradients of rows over all ranks.

        Args:
            gradients_uD: Of this rank's distinct rows.
            beside: A few numbers per row that are added with them, at full precision. Shape (u, n).
            part: Where the distinct rows of each rank stand among those of all.
            step: Number of the step, for what is drawn.

        Returns:
            Sums, and behind them those of what stood beside. Shape (U, D + n).
        """
        codec, dim, dtype = CODECS[self._rows], gradients_uD.shape[1], gradients_uD.dtype
        noise = None
        if self._rows in ("int8", "int4"):
            # by step, so that a training that goes on draws what an uninterrupted one would
            noise = self._noise.manual_seed(((self._seed << 32) + step) * self.ranks.size + self.ranks.rank)
        lines = codec.encode(gradients_uD, noise=noise)
        coded = lines.shape[1]
        if beside is not None:
            lines = torch.cat([lines, beside.contiguous().view(torch.uint8)], dim=1)
        pieces = self.ranks.gather_uneven(lines, [len(places) for places in part.places], "row gradients")
        total = gradients_uD.new_zeros(len(part.rows), dim + (0 if beside is None else beside.shape[1]))
        for places, piece in zip(part.places, pieces, strict=True):
            # each place once in a call, so a row's sum has one order of additions: that of the ranks
            values = codec.decode(piece[:, :coded], dim, dtype)
            if beside is not None:
                values = torch.cat([values, read_as(piece[:, coded:], dtype)], dim=1)
            total.index_add_(0, places, values)
        return total

    def _sum_compressed(self, flat: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
        codec, dtype = CODECS[self._dense], flat.dtype
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % _BLOCK))
        if self.feedback is not None:
            padded += self.feedback
        blocks = padded.view(-1, _BLOCK)
        lines = codec.encode(blocks)
        self.feedback = (blocks - codec.decode(lines, _BLOCK, dtype)).view(-1)
        message = torch.cat([lines.view(-1), beside.view(torch.uint8)])
        total = torch.zeros_like(blocks)
        total_beside = torch.zeros_like(beside)
        for received in self.ranks.gather(message, "dense gradients").unbind(0):
            total += codec.decode(received[: lines.numel()].view(lines.shape), _BLOCK, dtype)
            # a copy: in the message it stands wherever the codes end, which is where no number may begin
            total_beside += received[lines.numel() :].clone().view(dtype)
        return total.view(-1)[: len(flat)], total_beside
