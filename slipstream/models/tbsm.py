"""TBSM: a DLRM per time step, attention of the candidate over the history, and an MLP over both.

Shape suffixes: B batch, S time steps with the candidate last, F features of a step, D embedding_dim, M width of a
step's vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slipstream.models.dlrm import make_dlrm
from slipstream.models.model import Model, check_widths

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class TBSM(Model):
    """Click logits from a sequence of events and a candidate.

    There is one dense column per step. Looked-up rows come as one list of columns: those of the whole sequence first
    (the user), then the features of each step. A row that is all zero is padding: it stands for no event. Its step gets
    no attention, and it gets no gradient, so that a row that starts as zero stays zero, whichever optimizer updates it.

    Source: Ishkhanov et al., arXiv 2010.11075, and facebookresearch/tbsm: model type tsl, inner product "def" (A'A),
        one head, unit-length step vectors. There, padding is item 0 with a row that learns, and attends like any other.
    """

    name: str = "tbsm"
    """This model."""
    bottom_mlp: tuple[int, ...] = (512, 256, 64, 16)
    """Layer widths after the dense value of a step; the last must equal `embedding_dim`."""
    step_mlp: tuple[int, ...] = (15, 15)
    """Layer widths after the interaction of a step; the last is the width of its vector."""
    attention_mlp: tuple[int, ...] = (15, 15)
    """Hidden widths between the weights of the history's steps before and after; may be empty."""
    top_mlp: tuple[int, ...] = (512, 256, 1)
    """Layer widths after context and candidate; the last must be 1."""

    sources: ClassVar[tuple[str, ...]] = ("taobao",)

    def check(self) -> None:
        """Check widths."""
        check_widths("model.bottom_mlp", self.bottom_mlp, end=self.embedding_dim, end_is="embedding_dim = ")
        check_widths("model.step_mlp", self.step_mlp)
        if self.attention_mlp:
            check_widths("model.attention_mlp", self.attention_mlp)
        check_widths("model.top_mlp", self.top_mlp, end=1)

    def build(self, *, num_dense: int, num_columns: int) -> nn.Module:
        """Make the network: see `Model.build`.

        Args:
            num_dense: S, one column per step.
            num_columns: Those that every step has, times S, and fewer than S that the whole sequence shares.

        Raises:
            ValueError: There are fewer than two steps, or fewer columns than steps.
        """
        if num_dense < 2 or num_columns < num_dense:
            raise ValueError(
                f"expected two steps or more, with a column each, found {num_dense} steps and {num_columns} columns"
            )
        return _make_network(self, num_steps=num_dense, num_columns=num_columns)


def _make_network(options: TBSM, *, num_steps: int, num_columns: int) -> nn.Module:
    import torch
    from torch import nn
    from torch.nn.functional import normalize

    from slipstream.models.mlp import make_mlp

    num_shared, width = num_columns % num_steps, options.step_mlp[-1]

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = make_dlrm(
                num_dense=1,
                num_columns=num_shared + num_columns // num_steps,
                embedding_dim=options.embedding_dim,
                bottom_mlp=options.bottom_mlp,
                top_mlp=options.step_mlp,
            )
            history = num_steps - 1
            self.inner = nn.Parameter(torch.randn(width, width) * width**-0.5)
            self.attention = make_mlp([history, *options.attention_mlp, history], relu_last=False)
            self.top = make_mlp([2 * width, *options.top_mlp], relu_last=False)

        def forward(self, dense: Tensor, looked_up: Tensor) -> Tensor:
            is_there = looked_up.detach().ne(0).any(dim=2)
            looked_up = looked_up * is_there.unsqueeze(2)
            batch = len(dense)
            # every step sees the shared columns and its own: (B, S, shared + F, D), as B·S samples of a DLRM
            shared_BFD, steps = looked_up[:, :num_shared], looked_up[:, num_shared:]
            steps_BSFD = steps.reshape(batch, num_steps, -1, looked_up.shape[2])
            shared_BSFD = shared_BFD.unsqueeze(1).expand(-1, num_steps, -1, -1)
            rows = torch.cat([shared_BSFD, steps_BSFD], dim=2).flatten(0, 1)
            vectors = torch.relu(self.step(dense.reshape(-1, 1), rows))
            vectors_BSM = normalize(vectors.view(batch, num_steps, -1), dim=2)
            is_event = is_there[:, num_shared:].reshape(batch, num_steps, -1).any(dim=2)
            history, candidate = vectors_BSM[:, :-1] * is_event[:, :-1].unsqueeze(2), vectors_BSM[:, -1]
            query_BM = candidate @ self.inner.T @ self.inner
            weights = torch.sigmoid(self.attention(torch.bmm(history, query_BM.unsqueeze(2)).squeeze(2)))
            context_BM = torch.bmm(weights.unsqueeze(1), history).squeeze(1)
            logits: Tensor = self.top(torch.cat([context_BM, candidate], dim=1))
            return logits.squeeze(1)

    return Network()
