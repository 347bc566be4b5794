"""The device that trains: which one, what it can run, and what to say when it has no room."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from slipstream.errors import CapacityError, ConfigError


def resolve_device(name: str) -> torch.device:
    """Pick the accelerator to use; `auto` takes CUDA where there is one.

    Raises:
        ConfigError: CUDA was asked for and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("`train.device` is cuda, and torch finds no CUDA device", hint="use auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def has_triton() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("triton") is not None


def check_kernels(name: str, device: torch.device) -> None:
    """Check that what looks up and updates rows can run.

    Raises:
        ConfigError: `triton` without a GPU, or without the package.
    """
    if name == "triton" and device.type != "cuda":
        raise ConfigError("`train.kernels` is triton, and training runs on the CPU", hint="use torch, or a GPU")
    if name == "triton" and not has_triton():
        raise ConfigError(
            "`train.kernels` is triton, and the package is not installed", hint="use torch, or pip install triton"
        )


@contextmanager
def fitting_the_device(
    what: str | Callable[[], str],
    *,
    lower: str = "`segregate.hot_budget`, `train.batch_size`, `train.cache_ratio` or `train.staging_rows`",
) -> Iterator[None]:
    """Say what the device had no room for, and what to lower.

    Args:
        what: What the block does; a function where that is known only when it fails.
        lower: Keys of the pipeline file that make it smaller.
    """
    try:
        yield
    except torch.OutOfMemoryError as exc:
        named = what if isinstance(what, str) else what()
        raise CapacityError(f"the device has no room for {named}: {exc}", hint=f"lower {lower}") from exc
