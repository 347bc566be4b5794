"""Where rows live and how they are held; all rooms share `rules`, `row_cache` and `duplicates`.

Bags to use on their own, with the call of `nn.EmbeddingBag`; each is loaded when it is first asked for:

    CachedEmbeddingBag       a table in host memory behind a small cache of rows on the device
    TTEmbeddingBag           a table as a product of small tensors
    BatchedTTEmbeddingBags   several of those as one, computed together
    QuantizedEmbeddingBag    a table that learns on the few bits it will be served with
    PackedEmbeddingBag       the same for inference, stored on those bits

Bags that keep state outside their parameters refuse to train in several processes at once: the processes would drift
apart.

For code that calls FBTT-Embedding or ColossalAI's CachedEmbedding: `tt.fbtt` and `cached.colossal`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slipstream.embedding.cached.bag import CachedEmbeddingBag
    from slipstream.embedding.quantized import (
        PackedEmbeddingBag,
        PackedLinear,
        QuantizedEmbeddingBag,
        QuantizedLinear,
        quantize_linears,
        quantize_table,
    )
    from slipstream.embedding.tt.bag import BatchedTTEmbeddingBags, TTEmbeddingBag

_HOMES = {
    "BatchedTTEmbeddingBags": "tt.bag",
    "CachedEmbeddingBag": "cached.bag",
    "PackedEmbeddingBag": "quantized",
    "PackedLinear": "quantized",
    "QuantizedEmbeddingBag": "quantized",
    "QuantizedLinear": "quantized",
    "TTEmbeddingBag": "tt.bag",
    "quantize_linears": "quantized",
    "quantize_table": "quantized",
}
"""Module of each public name, below this package."""

__all__ = [
    "BatchedTTEmbeddingBags",
    "CachedEmbeddingBag",
    "PackedEmbeddingBag",
    "PackedLinear",
    "QuantizedEmbeddingBag",
    "QuantizedLinear",
    "TTEmbeddingBag",
    "quantize_linears",
    "quantize_table",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
