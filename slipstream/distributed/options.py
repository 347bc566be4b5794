"""Section `distributed` of the pipeline file, and what several ranks cannot do yet.

Read without torch, as every pipeline file is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from slipstream.errors import ConfigError
from slipstream.options import require, speed_only


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedConfig:
    """What ranks exchange, where several train together; how many there are is up to whoever starts them."""

    compress_dense: Literal["none", "fp16", "int8", "int4"] = "none"
    """How gradients of the dense layers travel between ranks; what rounding takes is added to the next step's."""
    compress_rows: Literal["none", "fp16", "int8", "int4"] = "none"
    """How gradients of rows travel between ranks: a scale per row, and codes rounded up or down at random."""
    timeout_seconds: float = speed_only(600.0)
    """How long a rank waits for the others in one exchange before it ends with the reason."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.timeout_seconds > 0, "distributed.timeout_seconds", "above 0", self.timeout_seconds)

    @property
    def is_plain(self) -> bool:
        """Whether nothing here changes results."""
        return self.compress_dense == self.compress_rows == "none"


def refuse_unshared(*, faithful: bool, representations: Iterable[str], kernels: str, num_ranks: int) -> None:
    """Refuse what one process can do and several ranks cannot.

    Args:
        faithful: `train.faithful`.
        representations: That tables may have.
        kernels: `train.kernels`.
        num_ranks: R.

    Raises:
        ConfigError: One of them is asked for.
    """
    found = []
    if faithful:
        found.append(("`train.faithful`", "leave it out"))
    for name in sorted({"mixed", "tt"} & set(representations)):
        found.append((f"`tables` held as {name}", 'set representation = "dense", "int8" or "int4"'))
    if kernels not in ("auto", "torch"):
        found.append((f"`train.kernels` = '{kernels}'", "set it to 'auto' or 'torch', which are the same there"))
    if found:
        what, remedy = found[0]
        raise ConfigError(
            f"{what} does not train on {num_ranks} ranks", hint=f"{remedy}, or train in one process: without torchrun"
        )
