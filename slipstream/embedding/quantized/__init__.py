"""Embedding bags and linear layers that are trained on the few bits they will be served with.

bag     a bag whose master copy learns while every forward sees it on the grid
packed  a bag of integers, for inference
linear  the same for linear layers
"""

from slipstream.embedding.quantized.bag import SWEEP_ROWS_PER_STEP, QuantizedEmbeddingBag
from slipstream.embedding.quantized.linear import PackedLinear, QuantizedLinear, quantize_linears
from slipstream.embedding.quantized.packed import PackedEmbeddingBag, quantize_table

__all__ = [
    "SWEEP_ROWS_PER_STEP",
    "PackedEmbeddingBag",
    "PackedLinear",
    "QuantizedEmbeddingBag",
    "QuantizedLinear",
    "quantize_linears",
    "quantize_table",
]
