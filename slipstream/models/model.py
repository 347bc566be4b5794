"""What every model is: options that check themselves, what it asks of rows and data, and a network to build.

A model is one file: a subclass of `Model`, which its registry finds, and the network that it builds. A pipeline file is
checked, and a run is planned, without torch, which takes seconds to load. So a model's file imports torch where the
network is made and not at its top; that is why the network's class stands inside a function.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from slipstream.options import require
from slipstream.registry import ChoiceOf

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Model(ABC):
    """The network around the tables. Which keys there are beside these two depends on `name`."""

    name: Annotated[str, ChoiceOf("slipstream.models.registry:MODELS")] = "dlrm"
    """Architecture."""
    embedding_dim: int = 16
    """Width of the vector that a looked-up row stands for."""

    sources: ClassVar[tuple[str, ...]] = ()
    """Sources that the model is made for; empty for any."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.embedding_dim >= 1, "model.embedding_dim", "at least 1", self.embedding_dim)
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Check the model's own options.

        Raises:
            ConfigError: One is out of range; names the key.
        """

    @property
    def row_width(self) -> int:
        """Values in a row of a table: the vector, and what the model keeps beside it."""
        return self.embedding_dim

    def initial_bound(self, num_rows: int) -> float:
        """Give the bound of a table's initial values, which are drawn evenly below it and above its negative.

        Args:
            num_rows: Rows of the table.

        Source: 1/sqrt(rows), as in DLRM's reference.
        """
        return float(num_rows**-0.5)

    @abstractmethod
    def build(self, *, num_dense: int, num_columns: int) -> nn.Module:
        """Make the network, with initial weights from torch's global generator.

        Args:
            num_dense: Dense columns.
            num_columns: Looked-up columns F.

        Returns:
            A module that is called with dense values (B, num_dense) and looked-up rows (B, F, row_width), both float32,
            and gives logits (B,). It reads nothing else, and a sample does not depend on the others of its batch.
        """


def check_widths(key: str, widths: tuple[int, ...], *, end: int | None = None, end_is: str = "") -> None:
    """Check the widths of a stack of layers.

    Args:
        key: Dotted key, for the message.
        widths: Width of each layer; at least one layer.
        end: Width that the last layer must have; None for any.
        end_is: What that width is, for the message.

    Raises:
        ConfigError: A width is below 1, there is no layer, or the last one is of another width.
    """
    require(bool(widths) and all(width >= 1 for width in widths), key, "a list of positive widths", list(widths))
    require(end is None or widths[-1] == end, key, f"a list that ends in {end_is}{end}", list(widths))
