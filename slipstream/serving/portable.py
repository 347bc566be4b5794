"""A whole model as one module of plain operations, for programs that do not have slipstream.

Tables are read by plain indexing, one gather each: what embedding bags become elsewhere is a loop over bags (in ONNX
Runtime a hundred times slower). Rows on few bits stay packed and are unpacked after the gather, by integer arithmetic
that every runtime has; layers on few bits become float32.

Shape suffixes: B batch, F looked-up columns, D width of a row, n looked-up rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from slipstream.embedding.quantized import PackedLinear
from slipstream.schema import BITS, OOV_ROW, RowRange
from slipstream.training.pooling import StoredBags


class PortableModel(nn.Module):
    """Click probabilities from dense values and rows.

    Args:
        network: (dense (B, n), looked-up rows (B, F, D)) -> logits (B,).
        tensors: Of the tables, by the names of model.safetensors.
        representations: How each table is held.
        ranges: Of the rows of mixed tables.
        row_width: D.
        column_tables: The table each column looks up.
        bags: Columns whose rows are pooled; None for none.
    """

    def __init__(
        self,
        network: nn.Module,
        tensors: Mapping[str, Tensor],
        *,
        representations: Mapping[str, str],
        ranges: Mapping[str, Sequence[RowRange]],
        row_width: int,
        column_tables: Sequence[str],
        bags: StoredBags | None = None,
    ) -> None:
        super().__init__()
        self.network = with_float_linears(network)
        self.tables = nn.ModuleDict(
            {
                name: _make_rows(tensors, name, held, ranges.get(name, ()), row_width)
                for name, held in representations.items()
            }
        )
        self._column_tables, self._bags = list(column_tables), bags
        self.eval().requires_grad_(False)

    def forward(self, dense: Tensor, rows: Tensor) -> Tensor:
        """Probabilities of a batch.

        Args:
            dense: Transformed dense values. Shape (B, n), float32.
            rows: Row of each column in its own table. Shape (B, F), int64.

        Returns:
            Shape (B,), float32.
        """
        columns = [self.tables[name](rows[:, at]) for at, name in enumerate(self._column_tables)]
        looked_up = torch.stack(columns, dim=1)
        if self._bags is not None:
            looked_up = self._bags.pool(looked_up, rows)
        return torch.sigmoid(self.network(dense, looked_up))


class _DenseRows(nn.Module):
    """Rows of float32."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, rows: Tensor) -> Tensor:
        return self.weight[rows]


class _PackedRows(nn.Module):
    """Rows of 8-bit integers, or of several of 4 or 2 bits in a byte, the first column in the lowest bits."""

    packed: Tensor
    scale: Tensor

    def __init__(self, packed: Tensor, scale: Tensor, bits: int) -> None:
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self._bits = bits

    def forward(self, rows: Tensor) -> Tensor:
        found = self.packed[rows].to(torch.int32)
        if self._bits < 8:
            # a byte is cut into pieces, lowest bits first; each is two's complement: of 4 bits, 0 … 7 stand for
            # themselves and 8 … 15 for -8 … -1
            size = 2**self._bits
            pieces = [found // size**at % size for at in range(8 // self._bits)]
            found = (torch.stack(pieces, dim=-1).flatten(-2) + size // 2) % size - size // 2
        scale = self.scale if self.scale.dim() == 0 else self.scale[rows].unsqueeze(-1)
        return found.to(torch.float32) * scale


class _MixedRows(nn.Module):
    """Rows of ranges that differ in bits: looked up in every range, and taken from the one they are in."""

    def __init__(self, ranges: Sequence[RowRange], parts: Sequence[_PackedRows], width: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self._ranges, self._width = list(ranges), width

    def forward(self, rows: Tensor) -> Tensor:
        rows = torch.where(rows < sum(part.rows for part in self._ranges), rows, OOV_ROW)  # the tail shares a row
        found, start = None, 0
        for part, packed in zip(self._ranges, self.parts, strict=True):
            # lookups of other ranges get some row of this one, which is not taken
            here = packed((rows - start).clamp(0, part.rows - 1))
            here = pad(here, (self._width - here.shape[1], 0))  # values that are not stored are zero
            found = here if found is None else torch.where((rows >= start).unsqueeze(-1), here, found)
            start += part.rows
        assert found is not None
        return found


class _CoreRows(nn.Module):
    """Rows as products of tensor-train cores."""

    def __init__(self, cores: Sequence[Tensor]) -> None:
        super().__init__()
        for at, core in enumerate(cores):
            self.register_buffer(f"core_{at}", core)
        self._num_cores = len(cores)

    def forward(self, rows: Tensor) -> Tensor:
        cores = [self.get_buffer(f"core_{at}") for at in range(self._num_cores)]
        # a row's number is written in digits of the bases p_0, p_1, …, the last one the least significant
        digits: list[Tensor] = []
        for core in reversed(cores[1:]):
            digits.insert(0, rows % core.shape[0])
            rows = rows // core.shape[0]
        product = cores[0][rows].squeeze(1)  # (n, q_0, r)
        for core, digit in zip(cores[1:], digits, strict=True):
            _, rank, columns, rank_right = core.shape
            wider = torch.bmm(product, core[digit].reshape(-1, rank, columns * rank_right))
            product = wider.reshape(-1, product.shape[1] * columns, rank_right)
        return product.squeeze(2)


def with_float_linears(network: nn.Module) -> nn.Module:
    """Give the same network with layers on few bits as the float32 layers they compute like."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, PackedLinear):
            parent, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(parent), attribute, layer.to_float())
    return network


def _make_rows(
    tensors: Mapping[str, Tensor], name: str, held: str, ranges: Sequence[RowRange], width: int
) -> nn.Module:
    prefix = f"tables.{name}"
    if held == "dense":
        return _DenseRows(tensors[prefix])
    if held == "tt":
        numbers = range(sum(key.startswith(f"{prefix}.core_") for key in tensors))
        return _CoreRows([tensors[f"{prefix}.core_{at}"] for at in numbers])
    if held == "mixed":
        places = [f"{prefix}.range_{at}" for at in range(len(ranges))]
        parts = [
            _PackedRows(tensors[f"{place}.packed"], tensors[f"{place}.scale"], part.bits)
            for place, part in zip(places, ranges, strict=True)
        ]
        return _MixedRows(ranges, parts, width)
    return _PackedRows(tensors[f"{prefix}.packed"], tensors[f"{prefix}.scale"], BITS[held])
