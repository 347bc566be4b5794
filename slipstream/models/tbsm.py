"""TBSM: a DLRM per time step, attention of the candidate over the history, and an MLP over both.

Shape suffixes: B batch, S time steps with the candidate last, F features of a step, D embedding_dim, M width of a
step's vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from slipstream.models.dlrm import DLRM, make_mlp


class TBSM(nn.Module):
    """Click logits from a sequence of events and a candidate.

    Looked-up rows come as one list of columns: those of the whole sequence first (the user), then the features of
    each step. A row that is all zero is padding: it stands for no event. Its step gets no attention, and it
    gets no gradient, so that a row that starts as zero stays zero, whichever optimizer updates it.

    Args:
        num_steps: S; also the dense columns, one per step.
        num_columns: Looked-up columns in all.
        num_shared: Columns of the whole sequence; the others divide evenly among the steps.
        embedding_dim: D; also the width the bottom MLP must end in.
        bottom_mlp: Layer widths after a step's dense value.
        step_mlp: Layer widths after a step's interaction; the last is M.
        attention_mlp: Hidden widths between the weights of the history's steps before and after.
        top_mlp: Layer widths after [context, candidate]; the last is 1.

    Source: Ishkhanov et al., arXiv 2010.11075, and facebookresearch/tbsm: model type tsl, inner product "def" (A'A),
        one head, unit-length step vectors. There, padding is item 0 with a row that learns, and attends like any other.
    """

    def __init__(
        self,
        *,
        num_steps: int,
        num_columns: int,
        num_shared: int,
        embedding_dim: int,
        bottom_mlp: Sequence[int],
        step_mlp: Sequence[int],
        attention_mlp: Sequence[int],
        top_mlp: Sequence[int],
    ) -> None:
        super().__init__()
        if num_steps < 2 or (num_columns - num_shared) % num_steps:
            raise ValueError(
                f"expected two steps or more that divide the {num_columns - num_shared} columns of the steps, "
                f"found {num_steps}"
            )
        self._num_steps, self._num_shared = num_steps, num_shared
        width = step_mlp[-1]
        self.step = DLRM(
            num_dense=1,
            num_tables=num_shared + (num_columns - num_shared) // num_steps,
            embedding_dim=embedding_dim,
            bottom_mlp=bottom_mlp,
            top_mlp=step_mlp,
        )
        history = num_steps - 1
        self.inner = nn.Parameter(torch.randn(width, width) * width**-0.5)
        self.attention = make_mlp([history, *attention_mlp, history], relu_last=False)
        self.top = make_mlp([2 * width, *top_mlp], relu_last=False)

    def forward(self, dense: Tensor, looked_up: Tensor) -> Tensor:
        """Logits of a batch.

        Args:
            dense: One value per step. Shape (B, S), float32.
            looked_up: Shared columns, then the features of each step. Shape (B, shared + S·F, D), float32.

        Returns:
            Shape (B,), float32.
        """
        is_there = looked_up.detach().ne(0).any(dim=2)
        looked_up = looked_up * is_there.unsqueeze(2)
        batch = len(dense)
        shared_BFD, steps = looked_up[:, : self._num_shared], looked_up[:, self._num_shared :]
        steps_BSFD = steps.reshape(batch, self._num_steps, -1, looked_up.shape[2])
        shared_BSFD = shared_BFD.unsqueeze(1).expand(-1, self._num_steps, -1, -1)
        rows = torch.cat([shared_BSFD, steps_BSFD], dim=2).flatten(0, 1)
        vectors = torch.relu(self.step(dense.reshape(-1, 1), rows))
        vectors_BSM = normalize(vectors.view(batch, self._num_steps, -1), dim=2)
        is_event = is_there[:, self._num_shared :].reshape(batch, self._num_steps, -1).any(dim=2)
        history, candidate = vectors_BSM[:, :-1] * is_event[:, :-1].unsqueeze(2), vectors_BSM[:, -1]
        query_BM = candidate @ self.inner.T @ self.inner
        weights = torch.sigmoid(self.attention(torch.bmm(history, query_BM.unsqueeze(2)).squeeze(2)))
        context_BM = torch.bmm(weights.unsqueeze(1), history).squeeze(1)
        logits: Tensor = self.top(torch.cat([context_BM, candidate], dim=1))
        return logits.squeeze(1)
