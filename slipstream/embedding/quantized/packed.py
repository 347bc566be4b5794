"""Tables for inference, stored on the bits they have: what training on a grid, or rounding afterwards, leaves.

Shape suffixes: N rows of a table, D embedding_dim, U unique rows of a lookup.
"""

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from slipstream.embedding.quantized.base import Bag, BagOptions, LookupOptions, check_table, row_chunks
from slipstream.embedding.quantized.numbers import (
    check_divides,
    check_stored_dtype,
    dequantize,
    pack,
    quantize,
    row_scales,
    storage_dtype,
    table_scale,
    unpack,
    values_per_byte,
)
from slipstream.schema import TableScale


class PackedEmbeddingBag(Bag):
    """A table for inference, stored on the bits it has.

    `packed` takes exactly N * D * bits / 8 bytes (uint8 at 4 and 2 bits, int8, int16) and `scale` 4 bytes per
    table or per row. Only looked-up rows are unpacked. To load one, construct it with the same arguments and
    call `load_state_dict`, for instance on what `safetensors.torch.load_file` returned.

    Args:
        num_embeddings: N.
        embedding_dim: D. Even at 4 bits, a multiple of 4 at 2 bits.
        device: Where to put the table.
        **options: Those of every bag of quantised rows: see `Bag`.

    Raises:
        ValueError: An option is not in its set, or D does not fill whole bytes.
    """

    packed: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        device: torch.device | str | None = None,
        **options: Unpack[BagOptions],
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, **options)
        check_divides(embedding_dim, self.bits)
        shape = (num_embeddings, embedding_dim // values_per_byte(self.bits))
        scales = (num_embeddings,) if self.scale_per == "row" else ()
        self.register_buffer("packed", torch.zeros(shape, dtype=storage_dtype(self.bits), device=device))
        self.register_buffer("scale", torch.ones(scales, dtype=torch.float32, device=device))

    @torch.no_grad()
    def write_rows(self, rows: slice, values: Tensor, table_scale: Tensor | None = None) -> None:
        """Quantise and store rows.

        Args:
            rows: Which rows.
            values: Their weights, shape (U, D), float.
            table_scale: Scale of the whole table, scalar; None computes a scale for each row.

        Raises:
            ValueError: A weight is not finite.
        """
        scale = row_scales(values, self.bits) if table_scale is None else table_scale
        self.packed[rows] = pack(quantize(values, scale, self.bits), self.bits)
        if self.scale_per == "row":
            self.scale[rows] = scale
        else:
            self.scale.copy_(scale)

    def _rows_on_grid(self, rows: Tensor, *, is_unique: bool) -> Tensor:
        scale = self.scale.to(torch.float32)
        scale = scale.index_select(0, rows) if self.scale_per == "row" else scale
        return dequantize(unpack(self.packed.index_select(0, rows), self.bits), scale, self.dtype)

    def memory_bytes(self) -> int:
        """Count the bytes of the integers and the scales.

        Returns:
            N * D * bits / 8 + 4 per table or per row.
        """
        return self.packed.numel() * self.packed.element_size() + self.scale.numel() * 4

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        check_stored_dtype(state_dict, prefix, self.bits, args)
        super()._load_from_state_dict(state_dict, prefix, *args)


def quantize_table(
    weight: Tensor,
    bits: int,
    scale_per: TableScale = "row",
    **options: Unpack[LookupOptions],
) -> PackedEmbeddingBag:
    """Quantise a trained table after the fact, to compare with training on the grid.

    Args:
        weight: Shape (N, D), float32 or float64.
        bits: 16, 8, 4 or 2.
        scale_per: One exact scale per "table" or per "row".
        **options: mode, padding_idx, include_last_offset and dtype as for `Bag`; the dtype of the weight unless given.

    Returns:
        A bag on the device of `weight`.

    Raises:
        ValueError: An option is not in its set, D does not fill whole bytes, or a weight is not finite.

    Source: post-training quantisation as in the DLRM reference (`--quantize-emb-with-bit`), but symmetric.
    """
    check_table(weight, tuple(weight.shape))
    weight = weight.detach()
    options = {"dtype": weight.dtype, **options}
    packed = PackedEmbeddingBag(*weight.shape, bits=bits, scale_per=scale_per, device=weight.device, **options)
    scale = table_scale(weight, bits) if scale_per == "table" else None
    for part in row_chunks(weight.shape[0]):
        packed.write_rows(part, weight[part], scale)
    return packed
