"""Optimizers of rows: what an update keeps of a row, and which way it moves it.

    w -= lr · direction(g, state)

A rule changes only rows that a batch looks up, and their state with them (*lazily*): every other row, its moments
included, stays as it is. Whoever holds rows (tiers, caches, quantised masters, tensor-train cores) asks the rule for
the shapes of its state, lets state travel with its row, and takes the step itself; dense layers follow.

A new rule is one class here and its line in `OPTIMIZERS`. This module loads no torch: `slipstream check` reads it.

Shape suffixes: N rows, U distinct rows of a batch, D embedding_dim; "…" stands for the dimensions of one row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from slipstream.errors import ConfigError
from slipstream.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

Per = Literal["row", "element"]


class RowOptimizer(ABC):
    """How a row answers to its gradient.

    Args:
        eps: Added to the root of what squares leave; None: `default_eps`.
        betas: Decay of first and second moments, where a rule keeps them.
    """

    state: ClassVar[Mapping[str, Per]] = {}
    """What is kept: by name, one number per row or one per element. All start as zero."""
    counts_steps: ClassVar[bool] = False
    """Whether `direction` depends on how many steps were taken."""
    has_kernel: ClassVar[bool] = False
    """Whether `slipstream.embedding.tiers.kernels` has the rule in Triton."""
    default_eps: ClassVar[float] = 0.0

    def __init__(self, *, eps: float | None = None, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.eps = self.default_eps if eps is None else eps
        self.betas = betas

    @abstractmethod
    def direction(
        self,
        gradients: Tensor,
        state: Sequence[Tensor],
        *,
        num_steps: Tensor | None = None,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Find which way rows move, and advance their state in place.

        Args:
            gradients: Summed over duplicates; used up. Shape (U, …).
            state: In the order of `state`. Shape (U,) per row, (U, …) per element.
            num_steps: Steps of the whole training, this one included: shape (), float64, on the device of the rows,
                so that a captured graph counts on. Needed by rules that `counts_steps`.
            sample_weights: m, the weight of the samples behind each gradient; None is 1. A sample of weight m stands
                for m samples: their gradients are in g already, and their squares are to count as m squares, not as
                one of m times the size, so rules that keep squares take g² / m. Shape (U,), or () for all.

        Returns:
            What to take `lr` times from the weights; may be `gradients` itself. Shape (U, …).
        """

    @classmethod
    def elementwise(cls) -> type[RowOptimizer]:
        """Give the rule for what has no rows: dense layers, tensor-train cores.

        Raises:
            TypeError: The rule keeps state per row and names none that does not.
        """
        if "row" in cls.state.values():
            raise TypeError(
                f"expected {cls.__name__}.elementwise to name a rule without state per row, found none: dense layers "
                "have no rows; override it"
            )
        return cls

    @classmethod
    def state_shapes(cls, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Shapes of the state of a table of shape (N, …), by name."""
        return {name: tuple(shape) if per == "element" else tuple(shape[:1]) for name, per in cls.state.items()}

    @classmethod
    def state_bytes(cls, embedding_dim: int) -> int:
        """Bytes of the fp32 state of one row."""
        return sum(4 * (embedding_dim if per == "element" else 1) for per in cls.state.values())

    def row_directions(
        self,
        state: Sequence[Tensor],
        rows: Tensor,
        gradients: Tensor,
        *,
        num_steps: Tensor | None = None,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Find which way some rows of a table move, and advance their state where the table keeps it.

        Args:
            state: Of the whole table. Shapes (N,) or (N, …).
            rows: Distinct rows. Shape (U,), int64.
            gradients: As in `direction`. Shape (U, …).
            num_steps: As there.
            sample_weights: As there.

        Returns:
            Shape (U, …).
        """
        gathered = [tensor.index_select(0, rows) for tensor in state]
        directions = self.direction(gradients, gathered, num_steps=num_steps, sample_weights=sample_weights)
        for tensor, advanced in zip(state, gathered, strict=True):
            tensor.index_copy_(0, rows, advanced)
        return directions


class SGD(RowOptimizer):
    """g: no state, and the weight of samples is in the gradient."""

    has_kernel = True

    def direction(
        self,
        gradients: Tensor,
        state: Sequence[Tensor],
        *,
        num_steps: Tensor | None = None,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Give the gradients back."""
        return gradients


class Adagrad(RowOptimizer):
    """s += g² / m, then g / (√s + eps), each element for itself.

    Source: Duchi et al., JMLR 12 (2011); without m, `torch.optim.Adagrad` on sparse gradients.
    """

    state: ClassVar[Mapping[str, Per]] = {"sum_of_squares": "element"}
    default_eps = 1e-10

    def direction(
        self,
        gradients: Tensor,
        state: Sequence[Tensor],
        *,
        num_steps: Tensor | None = None,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Divide by the root of all squares so far."""
        (sums,) = state
        counted = gradients if sample_weights is None else gradients / _like(gradients, sample_weights).sqrt()
        sums.addcmul_(counted, counted)
        return gradients.div_(sums.sqrt().add_(self.eps))


class RowwiseAdagrad(RowOptimizer):
    """s += mean(g²) / m, then g / (√s + eps), with one s per row.

    Source: EXACT_ROWWISE_ADAGRAD of FBGEMM.
    """

    state: ClassVar[Mapping[str, Per]] = {"sum_of_squares": "row"}
    has_kernel = True
    default_eps = 1e-10

    @classmethod
    def elementwise(cls) -> type[RowOptimizer]:
        """Element-wise Adagrad."""
        return Adagrad

    def direction(
        self,
        gradients: Tensor,
        state: Sequence[Tensor],
        *,
        num_steps: Tensor | None = None,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Divide by the root of all mean squares so far."""
        (sums,) = state
        squares = gradients.square().mean(dim=1)
        sums.add_(squares if sample_weights is None else squares.div_(sample_weights))
        return gradients.div_(sums.sqrt().add_(self.eps).unsqueeze(1))


class Adam(RowOptimizer):
    """a ← β₁a + (1 - β₁)g, b ← β₂b + (1 - β₂)g² / m, then √(1 - β₂ᵗ) / (1 - β₁ᵗ) · a / (√b + eps).

    Moments of a row move only when it is looked up, and t counts all steps of training, not those of the row. A sample
    that was kept with probability 1/m and counts m times leaves, on average, what all samples would have left in both
    moments: g in the first, g² / m in the second.

    Source: Kingma and Ba, arXiv 1412.6980, in the order of computation of its section 2; without m,
    `torch.optim.SparseAdam`.
    """

    state: ClassVar[Mapping[str, Per]] = {"exp_avg": "element", "exp_avg_sq": "element"}
    counts_steps = True
    default_eps = 1e-8

    def direction(
        self,
        gradients: Tensor,
        state: Sequence[Tensor],
        *,
        num_steps: Tensor | None = None,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Advance both moments, and divide one by the root of the other."""
        assert num_steps is not None
        first, second = state
        first.lerp_(gradients, 1 - self.betas[0])
        squares = gradients.square()
        if sample_weights is not None:
            squares.div_(_like(squares, sample_weights))
        second.lerp_(squares, 1 - self.betas[1])
        return (first * self.correction(num_steps)).div_(second.sqrt().add_(self.eps))

    def correction(self, num_steps: Tensor) -> Tensor:
        """Give √(1 - β₂ᵗ) / (1 - β₁ᵗ). Shape (), float64: 1 - β₂ᵗ in float32 has four good digits at the first step."""
        return (1 - self.betas[1] ** num_steps).sqrt_() / (1 - self.betas[0] ** num_steps)


def _like(gradients: Tensor, sample_weights: Tensor) -> Tensor:
    """Give m, one for all or one per row, as many dimensions as gradients have."""
    return sample_weights.reshape(-1, *[1] * (gradients.dim() - 1)) if sample_weights.dim() else sample_weights


OPTIMIZERS: Final[Registry[type[RowOptimizer]]] = Registry("optimizer")
"""What updates rows, by `train.optimizer`."""
OPTIMIZERS.register("sgd", SGD, summary="no state")
OPTIMIZERS.register("adagrad", Adagrad, summary="one sum of squares per element")
OPTIMIZERS.register("rowwise_adagrad", RowwiseAdagrad, summary="one sum of squares per row")
OPTIMIZERS.register("adam", Adam, summary="two moments per element, which move when their row is looked up")


def check_kernels(optimizer: str, kernels: str) -> None:
    """Refuse Triton kernels for a rule that has none.

    Args:
        optimizer: `train.optimizer`.
        kernels: `train.kernels`.

    Raises:
        ConfigError: They do not go together.
    """
    if kernels == "triton" and not OPTIMIZERS.get(optimizer).has_kernel:
        known = [name for name in OPTIMIZERS.names() if OPTIMIZERS.get(name).has_kernel]
        raise ConfigError(
            f"`train.optimizer` = '{optimizer}' has no Triton kernel; {' and '.join(known)} have one",
            hint="set train.kernels to 'torch', or choose another train.optimizer",
        )


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
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and (size := dist.get_world_size()) > 1:
        raise ValueError(
            f"expected one process to train {what}, found a process group of {size}, whose models would drift apart: "
            f"{remedy}"
        )
