"""Host memory that a CUDA device reads and writes in place.

A table is page-locked where it lies, which neither copies it nor rounds its size up, and seen from the device as a
tensor of its own over the same bytes. A kernel that reads such a row brings it over the bus; nothing else moves.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class CannotMapError(RuntimeError):
    """The device cannot be given a view of host memory: too much of it, not allowed, or not known to the driver."""


def zeros_in_own_pages(shape: Sequence[int]) -> Tensor:
    """Make zeros on the host that share no page of memory with anything else; of torch's default type, at least one.

    Pages are locked as a whole, and one that two tensors share could be locked by one of them only.
    """
    num_bytes = torch.get_default_dtype().itemsize
    for length in shape:
        num_bytes *= length
    if torch.get_default_device().type != "cpu":  # a forecast, on `meta`: no memory at all
        return torch.zeros(*shape)
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.get_default_dtype()).view(*shape)


def map_to_device(host: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Give tensors on a device that are the same memory as tensors on the host.

    On a CPU they are the tensors themselves. On CUDA pages are locked until the views are gone.

    Args:
        host: Each in pages of its own.
        device: Who is to read and write them.

    Raises:
        CannotMapError: It is not possible; nothing stays locked.
    """
    if device.type != "cuda":
        return list(host)
    views: list[Tensor] = []
    for tensor in host:
        try:
            views.append(_map(tensor, device))
        except (RuntimeError, TypeError, ValueError) as exc:
            raise CannotMapError(
                f"{tensor.nbytes:,} bytes of host memory cannot be mapped for the device: {exc}"
            ) from exc
    return views


def _map(tensor: Tensor, device: torch.device) -> Tensor:
    runtime: Any = torch.cuda.cudart()
    error = int(runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
    if error:
        _forget_error(device)
        raise RuntimeError(f"cudaHostRegister answers {error}")
    region = _Region(tensor)
    # torch keeps what it was given for as long as the view's memory is used
    weakref.finalize(region, _unlock, runtime, tensor)
    view = torch.as_tensor(region, device=device)
    if view.data_ptr() != tensor.data_ptr():
        raise RuntimeError("the device sees other memory than the host")
    return view


def _forget_error(device: torch.device) -> None:
    """Ask for the error that the runtime remembers: the next kernel would be blamed for it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device).add_(1)


def _unlock(runtime: Any, tensor: Tensor) -> None:
    """Unlock pages; holding the tensor until then, so that they are not given back while they are locked."""
    runtime.cudaHostUnregister(tensor.data_ptr())


class _Region:
    """Page-locked memory as libraries for CUDA describe memory to each other: they look up whose it is."""

    def __init__(self, host: Tensor) -> None:
        self.host = host
        self.__cuda_array_interface__ = {
            "shape": tuple(host.shape),
            "typestr": f"<f{host.element_size()}",
            "data": (host.data_ptr(), False),
            "version": 3,
        }
