"""Safetensors files, written a block at a time.

The library's own writer wants every tensor in memory, and calls a full disk by a name of its own. This one takes blocks
as they come, so that what is written can be read from where it lives, and hashes what it writes; the bytes are those
that the library would have written. Reading is left to the library.

    8 bytes   length of the header, little-endian
    header    JSON: {"__metadata__": …, name: {"dtype", "shape", "data_offsets"}, …}, padded with spaces to 8 bytes
    values    the tensors one after the other, wide types first, then by name

Source: the format as described at https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import xxhash

from slipstream.io.artifacts import write_atomically

_CODES = {
    "int64": "I64",
    "float64": "F64",
    "float32": "F32",
    "int32": "I32",
    "float16": "F16",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""Names of types in the format, in the order in which their tensors are written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor to write, whose values are asked for when it is its turn."""

    dtype: np.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[np.ndarray]]
    """Its values in C order, in any number of pieces; asked for once."""

    @staticmethod
    def of(array: np.ndarray) -> StoredTensor:
        """All of an array, which must not change until it is written."""
        return StoredTensor(dtype=array.dtype, shape=array.shape, blocks=lambda: [array])

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file that is whole or absent.

    Args:
        path: The file.
        tensors: By name.
        metadata: Text to go with them.

    Returns:
        xxh3-64 of the file, as 16 hex digits.

    Raises:
        CapacityError: The disk is full; the message says what was needed and what is free.
        ValueError: A tensor's blocks are not as long as its shape says.
    """
    ordered = in_order_of_writing(tensors)
    header = _header(ordered, metadata)
    needed_bytes = len(header) + sum(tensor.nbytes for _, tensor in ordered)
    digest = xxhash.xxh3_64(header)
    with write_atomically(path, needed_bytes=needed_bytes) as partial, partial.open("wb") as stream:
        stream.write(header)
        for name, tensor in ordered:
            written = 0
            for block in tensor.blocks():
                values = np.ascontiguousarray(block, tensor.dtype).reshape(-1).view(np.uint8).data
                stream.write(values)
                digest.update(values)
                written += len(values)
            if written != tensor.nbytes:
                raise ValueError(f"expected {tensor.nbytes} bytes of tensor {name}, found {written}")
    return digest.hexdigest()


def in_order_of_writing(tensors: Mapping[str, StoredTensor]) -> list[tuple[str, StoredTensor]]:
    """Give names and tensors in the order in which `write_tensors` asks for their blocks."""
    codes = list(_CODES)
    return sorted(tensors.items(), key=lambda item: (codes.index(item[1].dtype.name), item[0]))


def _header(ordered: Iterable[tuple[str, StoredTensor]], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    start = 0
    for name, tensor in ordered:
        stop = start + tensor.nbytes
        entries[name] = {
            "dtype": _CODES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
