"""Trained models on disk: safetensors and JSON, no pickles.

A model stores its tables by name in row order, whatever was hot, so it is the same file for every placement:

    model.safetensors   tables.cat_0 (N, D)                                  fp32 rows
                        tables.cat_1.packed (N, D·bits/8), .scale ()         int8, int4 and int2 tables,
                                                           or .scale (N,)    with a scale per row
                        tables.cat_1.range_0.packed, .scale, ...             ranges of a mixed table, likewise, rows of
                                                                             as many values as it stores
                        tables.cat_2.core_0 (p, r, q, r'), ...               tensor-train cores
                        dense.bottom.0.weight, ...                           fp32 layers
                        dense.bottom.0.packed, .scale, .bias                 layers on few bits
                                               .packed_bias                  where the bias is too
    model.json          architecture, table sizes, how each table is held

Tables are written a part at a time, from wherever their rows live, since they may be larger than memory. Rows on few
bits predict from the file what they predicted at the end of training, to the bit; their fp32 masters are
not kept.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import pad

from slipstream.embedding.quantized import PackedLinear, QuantizedLinear
from slipstream.embedding.quantized.abs_max import CHUNK_ROWS
from slipstream.embedding.quantized.numbers import dequantize, pack, quantize, row_scales, table_scale, unpack
from slipstream.embedding.tiers.rows import TieredRows
from slipstream.embedding.tt.bag import TTEmbeddingBag
from slipstream.errors import ArtifactError, ConfigError
from slipstream.io.artifacts import write_json
from slipstream.io.model_folder import DESCRIPTION, WEIGHTS, read_description
from slipstream.io.tensors import StoredTensor, in_order_of_writing, write_tensors
from slipstream.models.registry import read_model
from slipstream.schema import BITS, OOV_ROW, RowRange
from slipstream.training.pooling import StoredBags
from slipstream.training.representations import Representations


def save_model(
    folder: Path | None,
    *,
    model: nn.Module,
    rows: TieredRows,
    slot_maps: Mapping[str, np.ndarray],
    description: Mapping[str, Any],
    representations: Representations,
) -> None:
    """Write a model.

    Args:
        folder: Where to; None on a rank that only helps another to gather rows.
        model: The dense part.
        rows: The tiers, flushed.
        slot_maps: Slot of each row, per table.
        description: Goes to model.json.
        representations: How tables are held.
    """
    held = representations.by_table
    stored: dict[str, StoredTensor] = {}
    for spec in representations.specs:
        name = spec.name
        if held[name] == "tt":
            cores = representations.bags[name].tt_cores
            stored |= _store({f"tables.{name}.core_{at}": core.detach()[0].cpu() for at, core in enumerate(cores)})
        elif held[name] == "dense":
            gather = partial(_gather_parts, rows, torch.from_numpy(slot_maps[name]))
            shape = (len(slot_maps[name]), rows.embedding_dim)
            stored[f"tables.{name}"] = StoredTensor(dtype=_dtype_of(rows.cold), shape=shape, blocks=_as_arrays(gather))
        else:
            ranges, scales = representations.slots_by_range(spec), representations.scales_of(name)
            for at, ((part, slots), scale) in enumerate(zip(ranges, scales, strict=True)):
                gather = partial(_gather_parts, rows, slots, part.values)
                shape = (len(slots), part.values or rows.embedding_dim)
                place = f"{name}.range_{at}" if held[name] == "mixed" else name
                stored |= _store_packed(place, gather, shape, None if scale is None else scale.cpu(), part.bits)
    if folder is None:
        for _, tensor in in_order_of_writing(stored):
            collections.deque(tensor.blocks(), maxlen=0)
        return
    described = {**description, "representations": held}
    if mixed := {spec.name: [asdict(part) for part in spec.cuts] for spec in representations.specs if spec.cuts}:
        described["ranges"] = mixed
    _write(folder, stored | _store(_dense_tensors(model)), described)


def _gather_parts(rows: TieredRows, slots: Tensor, values: int | None = None) -> Iterator[Tensor]:
    """Give the rows of a table, or their last values, a part at a time: it may be larger than memory."""
    stored = slice(None if values is None else -values, None)
    return (rows.gather(part)[:, stored].cpu() for part in slots.split(CHUNK_ROWS))


def _dtype_of(tensor: Tensor) -> np.dtype:
    return tensor.new_empty(0, device="cpu").numpy().dtype


def _as_arrays(parts: Callable[[], Iterable[Tensor]]) -> Callable[[], Iterator[np.ndarray]]:
    return lambda: (part.numpy() for part in parts())


def quantize_model(source: Path, folder: Path, *, representation: str, description: Mapping[str, Any]) -> None:
    """Round the fp32 tables of a trained model, each to one exact scale, and write it packed.

    Args:
        source: Folder of the model.
        folder: Where to.
        representation: `int8`, `int4` or `int2`.
        description: Goes to model.json, but for how tables are held.

    Raises:
        ArtifactError: `source` holds no model.
        ValueError: `representation` has no bits, or the rows do not fill whole bytes.
    """
    bits = BITS.get(representation, 0)
    if not bits:
        raise ValueError(f"expected int8, int4 or int2, found {representation!r}")
    tensors, _ = read_tensors(source / WEIGHTS)
    held = dict(description["representations"])
    packed: dict[str, StoredTensor] = {}
    for name in [name for name, kind in held.items() if kind == "dense"]:
        table = tensors.pop(f"tables.{name}")
        parts = partial(table.split, CHUNK_ROWS)
        packed |= _store_packed(name, parts, table.shape, table_scale(table, bits), bits)
        held[name] = representation
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, _store(tensors) | packed, {**description, "representations": held})


class StoredTables:
    """The tables of a model file, ready to predict from.

    Args:
        columns: Each column's table: fp32 rows (N, D), or what gives rows by number, (n,) int64 -> (n, D).
        nbytes: Bytes of all tables.
        bags: Columns whose rows are pooled; None for none.
    """

    def __init__(
        self, columns: Sequence[Tensor | Callable[[Tensor], Tensor]], nbytes: int, bags: StoredBags | None = None
    ) -> None:
        self._columns, self.nbytes, self._bags = list(columns), nbytes, bags
        self._dense = [table for table in self._columns if isinstance(table, Tensor)]

    def look_up(self, rows_BC: Tensor) -> Tensor:
        """Rows that a batch looks up, by row number; those of bags pooled. Shape (B, C), int64 -> (B, F, D)."""
        if len(self._dense) == len(self._columns) > 0:
            # each table writes its own part of one block; turned, that is what stacking the parts would have to copy
            looked_up_CBD = torch.empty(len(self._dense), len(rows_BC), self._dense[0].shape[1])
            for part, table, rows in zip(looked_up_CBD, self._dense, rows_BC.unbind(1), strict=True):
                torch.index_select(table, 0, rows, out=part)
            looked_up = looked_up_CBD.transpose(0, 1)
        else:
            columns = enumerate(rows_BC.unbind(1))
            looked_up = torch.stack([self.look_up_column(column, rows) for column, rows in columns], dim=1)
        return looked_up if self._bags is None else self._bags.pool(looked_up, rows_BC)

    def look_up_column(self, column: int, rows: Tensor) -> Tensor:
        """Rows of one column's table. Shape (n,), int64 -> (n, D)."""
        table = self._columns[column]
        return table.index_select(0, rows) if isinstance(table, Tensor) else table(rows)


def load_model(folder: Path) -> tuple[nn.Module, StoredTables]:
    """Read a model to predict with: `model(dense, tables.look_up(rows))` gives logits.

    Args:
        folder: Folder of the model, for instance a train artifact.

    Returns:
        The dense part, in evaluation mode, and the tables, both on the CPU.

    Raises:
        ArtifactError: The folder holds no whole model.
    """
    description = read_description(folder)
    tensors, _ = read_tensors(folder / WEIGHTS)
    nbytes = sum(value.nbytes for name, value in tensors.items() if name.startswith("tables."))
    try:
        column_tables: list[str] = description["column_tables"]
        model = read_model(description)
        bags = StoredBags.of(description)
        num_fields = len(column_tables) if bags is None else bags.num_fields
        network = model.build(num_dense=description["num_dense"], num_columns=num_fields)
        held: dict[str, str] = description["representations"]
        ranges = read_ranges(description)
        tables = {
            name: _read_table(tensors, name, held[name], ranges.get(name, ()), num_rows, model.row_width)
            for name, num_rows in description["tables"].items()
        }
        dense = {name.removeprefix("dense."): value for name, value in tensors.items() if name.startswith("dense.")}
        if bits := description.get("quantize_linears", 0):
            _use_packed_linears(network, bits, quantize_bias=description.get("quantize_biases", False))
        network.load_state_dict(dense)
        columns = StoredTables([tables[name] for name in column_tables], nbytes, bags)
    except (ConfigError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as exc:
        # whatever a damaged description holds in the place of a name, a number or a table of them
        raise ArtifactError(
            f"expected a whole model in `{folder}`, found no sense in `{DESCRIPTION}`: {type(exc).__name__}: {exc}",
            hint="export or train it again",
        ) from exc
    return network.eval(), columns


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ArtifactError: Not a whole safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            names = stream.keys()
            return {name: stream.get_tensor(name) for name in names}, dict(stream.metadata() or {})
    except (OSError, SafetensorError) as exc:
        raise ArtifactError(f"expected a safetensors file at `{path}`: {exc}") from exc


def read_ranges(description: Mapping[str, Any]) -> dict[str, tuple[RowRange, ...]]:
    """Ranges of the rows of mixed tables, by name, as model.json says."""
    found = description.get("ranges", {})
    return {name: tuple(RowRange(**part) for part in parts) for name, parts in found.items()}


def _store_packed(
    name: str, parts: Callable[[], Iterable[Tensor]], shape: Sequence[int], scale: Tensor | None, bits: int
) -> dict[str, StoredTensor]:
    """Round a table, in parts, to its scale, or each row to its own where there is none; fill whole bytes."""

    def round_parts() -> Iterator[np.ndarray]:
        for part in parts():
            yield pack(quantize(part, row_scales(part, bits) if scale is None else scale, bits), bits).numpy()

    def scale_parts() -> Iterator[np.ndarray]:
        return (row_scales(part, bits).numpy() for part in parts())

    no_row = pack(quantize(torch.zeros(1, shape[1]), torch.ones(()), bits), bits).numpy()[:0]
    packed = StoredTensor(dtype=no_row.dtype, shape=(shape[0], no_row.shape[1]), blocks=round_parts)
    if scale is not None:
        scales = StoredTensor.of(scale.numpy())
    else:
        scales = StoredTensor(dtype=np.dtype(np.float32), shape=(shape[0],), blocks=scale_parts)
    return {f"tables.{name}.packed": packed, f"tables.{name}.scale": scales}


def _store(tensors: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    return {name: StoredTensor.of(value.contiguous().numpy()) for name, value in tensors.items()}


def _write(folder: Path, stored: Mapping[str, StoredTensor], description: Mapping[str, Any]) -> None:
    write_tensors(folder / WEIGHTS, stored)
    write_json(folder / DESCRIPTION, dict(description))


def _dense_tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors = {f"dense.{name}": value.cpu() for name, value in model.state_dict().items()}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            for parameter in ("weight", "bias"):
                tensors.pop(f"dense.{name}.{parameter}", None)
            tensors |= {f"dense.{name}.{key}": value.cpu() for key, value in layer.pack().state_dict().items()}
    return tensors


def _use_packed_linears(model: nn.Module, bits: int, *, quantize_bias: bool) -> None:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, attribute = name.rpartition(".")
            packed = PackedLinear(
                layer.in_features, layer.out_features, layer.bias is not None, bits=bits, quantize_bias=quantize_bias
            )
            setattr(model.get_submodule(parent), attribute, packed)


def _read_table(
    tensors: Mapping[str, Tensor],
    name: str,
    held: str,
    ranges: Sequence[RowRange],
    num_rows: int,
    embedding_dim: int,
) -> Tensor | Callable[[Tensor], Tensor]:
    if held == "dense":
        table = tensors[f"tables.{name}"]
        if table.shape != (num_rows, embedding_dim) or table.dtype != torch.float32:
            found = f"{tuple(table.shape)} {table.dtype}"
            raise ValueError(f"expected table {name} of shape {num_rows, embedding_dim}, fp32, found {found}")
        return table
    if held == "tt":
        bag = _read_cores(tensors, name, num_rows, embedding_dim)
        return lambda rows: bag(rows.unsqueeze(1))
    if held == "mixed":
        parts = [_read_packed(tensors, f"{name}.range_{at}", part.bits) for at, part in enumerate(ranges)]
        return _MixedTable(ranges, parts, embedding_dim)
    return _read_packed(tensors, name, BITS[held])


def _read_packed(tensors: Mapping[str, Tensor], place: str, bits: int) -> Callable[[Tensor], Tensor]:
    packed, scale = tensors[f"tables.{place}.packed"], tensors[f"tables.{place}.scale"]

    def look_up(rows: Tensor) -> Tensor:
        steps = scale if scale.dim() == 0 else scale.index_select(0, rows)
        return dequantize(unpack(packed.index_select(0, rows), bits), steps)

    return look_up


class _MixedTable:
    """Looks up rows of a table whose ranges differ in bits."""

    def __init__(
        self, ranges: Sequence[RowRange], parts: Sequence[Callable[[Tensor], Tensor]], embedding_dim: int
    ) -> None:
        self._ranges, self._parts, self._embedding_dim = list(ranges), list(parts), embedding_dim
        self._stops = torch.tensor([part.rows for part in ranges]).cumsum(0)

    def __call__(self, rows: Tensor) -> Tensor:
        rows = torch.where(rows < self._stops[-1], rows, OOV_ROW)  # the tail shares a row
        found = torch.empty(len(rows), self._embedding_dim)
        of_range = torch.bucketize(rows, self._stops, right=True)
        for at, (part, look_up) in enumerate(zip(self._ranges, self._parts, strict=True)):
            places = (of_range == at).nonzero().squeeze(1)
            values = look_up(rows.index_select(0, places) - (self._stops[at] - part.rows))
            # those that are not stored are zero
            found.index_copy_(0, places, pad(values, (self._embedding_dim - values.shape[1], 0)))
        return found


def _read_cores(tensors: Mapping[str, Tensor], name: str, num_rows: int, embedding_dim: int) -> TTEmbeddingBag:
    prefix = f"tables.{name}.core_"
    cores = [tensors[f"{prefix}{at}"] for at in range(sum(key.startswith(prefix) for key in tensors))]
    shapes = [core.shape for core in cores]
    bag = TTEmbeddingBag(
        num_rows,
        embedding_dim,
        [shape[3] for shape in shapes[:-1]],
        [shape[0] for shape in shapes],
        [shape[2] for shape in shapes],
    )
    with torch.no_grad():
        for mine, stored in zip(bag.tt_cores, cores, strict=True):
            mine.copy_(stored.unsqueeze(0))
    return bag.eval()
