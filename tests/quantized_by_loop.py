"""The reference of quantised bags and layers: a table quantised number by number, and what tests draw."""

import numpy as np
import torch
from torch import Tensor

from slipstream.embedding.quantized import PackedEmbeddingBag, QuantizedEmbeddingBag

BITS = (16, 8, 4, 2)


def loop_scale(weight: np.ndarray, bits: int) -> np.float32:
    return np.float32(max(np.abs(weight).max(), weight.dtype.type(1e-8)) / (2 ** (bits - 1) - 1))


def loop_quantized(weight: Tensor, bits: int, scale_per: str, scale: float | None = None) -> Tensor:
    """The fake-quantised table, number by number."""
    w = weight.detach().numpy()
    n = 2 ** (bits - 1) - 1
    out = np.empty_like(w)
    table = loop_scale(w, bits) if scale is None else np.float32(scale)
    for i in range(w.shape[0]):
        step = w.dtype.type(table if scale_per == "table" else loop_scale(w[i], bits))
        for j in range(w.shape[1]):
            q = min(max(int(np.round(w[i, j] / step)), -n - 1), n)
            out[i, j] = w.dtype.type(q) * step
    return torch.from_numpy(out)


def jagged(seed: int, num_rows: int, lengths: list[int], *, include_last: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, num_rows, (sum(lengths),), generator=generator)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return values, ends if include_last else ends[:-1]


def weights_like(seed: int, num_rows: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_rows, dim, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def settings_of(bag: QuantizedEmbeddingBag | PackedEmbeddingBag) -> dict[str, object]:
    return {
        "mode": bag.mode,
        "padding_idx": bag.padding_idx,
        "include_last_offset": bag.include_last_offset,
    }


LENGTHS = [3, 0, 1, 5, 2, 0, 7, 1, 0]
