"""What a step asks of a device, seen without one: tensors without values, every option, every operation recorded."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import SYNCHRONISING
from strategies import make_tracker
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slipstream.embedding.quantized import quantize_linears
from slipstream.embedding.rules import OPTIMIZERS
from slipstream.embedding.tiers.lookahead import StagedBatch
from slipstream.embedding.tiers.rows import TieredRows
from slipstream.models.dlrm import DLRM
from slipstream.training.dense_optimizer import DenseOptimizer
from slipstream.training.representations import Representations, TableSpec
from slipstream.training.skipping.criterion import Movement
from slipstream.training.slot_layout import SlotLayout
from slipstream.training.step import FixedShapeStep

META = torch.device("meta")
BATCH, DENSE, DIM, TABLE_ROWS = 64, 4, 16, [5, 300, 30, 300, 9]
NUM_LOOKUPS = BATCH * len(TABLE_ROWS)


class Recorder(TorchDispatchMode):
    """Remembers operations and the tensors they touch."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, Tensor)]
        self.operations.append((func.overloadpacket.__name__, tensors))
        return made


def make_layout() -> SlotLayout:
    cuts = np.cumsum([0, *TABLE_ROWS])
    maps = {f"cat_{at}": np.arange(cuts[at], cuts[at + 1]) for at in range(len(TABLE_ROWS))}
    return SlotLayout(maps, num_hot=100, table_of_column=range(len(TABLE_ROWS)))


def make_representations(kind: str, optimizer: str) -> Representations:
    layout = make_layout()
    if kind == "dense":
        return Representations.plain(layout, embedding_dim=DIM, device=META)
    kinds = ["int4", "dense", "int8", "int4", "int8"] if kind == "mixed" else [kind] * len(TABLE_ROWS)
    specs = [
        TableSpec(name=f"cat_{at}", num_rows=rows, representation=kinds[at], period=3)  # type: ignore[arg-type]
        for at, rows in enumerate(TABLE_ROWS)
    ]
    options = {"layout": layout, "embedding_dim": DIM, "optimizer": optimizer, "eps": 1e-8, "seed": 0}
    return Representations(specs, device=META, **options)  # type: ignore[arg-type]


def record_step(
    optimizer: str,
    *,
    weighted: bool = False,
    precision: str = "fp32",
    movement: Movement | None = None,
    tables: str = "dense",
    linear_bits: int = 0,
) -> list[tuple[str, list[Tensor]]]:
    rows = TieredRows(
        num_rows=sum(TABLE_ROWS),
        num_hot=100,
        embedding_dim=DIM,
        num_staged=400,
        optimizer=optimizer,  # type: ignore[arg-type]
        device=META,
    )
    with META:
        model = DLRM(embedding_dim=DIM, bottom_mlp=(8, DIM), top_mlp=(8, 1)).build(
            num_dense=DENSE, num_columns=len(TABLE_ROWS)
        )
    if linear_bits:
        quantize_linears(model, linear_bits)
    step = FixedShapeStep(
        batch_size=BATCH,
        num_dense=DENSE,
        num_tables=len(TABLE_ROWS),
        model=model,
        rows=rows,
        dense_optimizer=DenseOptimizer(model.parameters(), optimizer=optimizer, eps=1e-8, weight_decay=1e-5),
        eps=1e-8,
        precision=precision,
        representations=make_representations(tables, optimizer),
        most_distinct=make_layout().most_distinct(BATCH),
    )
    if movement is not None:
        step.tracker = make_tracker(movement, rows.buffer[: rows.num_hot])
        step.tracker.open_window()
    batch = StagedBatch(
        dense=torch.empty(BATCH, DENSE, device=META),
        labels=torch.empty(BATCH, device=META),
        positions=torch.empty(NUM_LOOKUPS, dtype=torch.int32, device=META),
        is_hot=False,
        weights=torch.empty(BATCH, device=META) if weighted else None,
    )
    with Recorder() as recorder:
        step(batch, 0.1)
    return recorder.operations


@pytest.fixture(autouse=True)
def _autocast_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    autocast = torch.autocast  # knows no device `meta`; which operations run is the same
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype: autocast("cpu", dtype=dtype))


@pytest.mark.parametrize(
    ("optimizer", "tables"), [*((name, "dense") for name in OPTIMIZERS.names()), ("adam", "int4"), ("adagrad", "mixed")]
)
def test_no_step_waits_for_the_device_or_copies_from_the_host(optimizer: str, tables: str):
    options = product([False, True], ["fp32", "bf16"], [None, "net", "per-label"], [0, 8])
    for weighted, precision, movement, bits in options:
        if (weighted + (precision == "bf16") + (bits == 8)) % 2:
            continue  # half of them: any two choices of these three meet, with every movement
        operations = record_step(
            optimizer,
            weighted=weighted,
            precision=precision,
            movement=movement,  # type: ignore[arg-type]
            tables=tables,
            linear_bits=bits,
        )
        assert {name for name, _ in operations} & SYNCHRONISING == set()
        # a number may come along with a kernel; a tensor of the host is a copy that drains the stream
        assert {tensor.device.type for _, tensors in operations for tensor in tensors if tensor.dim()} == {"meta"}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.names())
def test_rows_are_updated_once_for_each_that_can_be_distinct(optimizer: str, weighted: bool):
    most_distinct = 5 + 64 + 30 + 64 + 9
    operations = record_step(optimizer, weighted=weighted)
    summed = next(
        at for at, (name, tensors) in enumerate(operations) if name == "index_add_" and tensors[-1].shape[-1] == DIM
    )
    assert operations[summed][1][-1].shape == (most_distinct, DIM)
    written = [tensors for name, tensors in operations if name == "index_copy_"]
    assert {len(tensors[1]) for tensors in written} == {most_distinct}
    wide = [
        name
        for name, tensors in operations[summed + 1 :]
        if any(tensor.dim() == 2 and tensor.shape == (NUM_LOOKUPS, DIM) for tensor in tensors)
    ]
    assert wide == []
    assert len(operations) < 260


def test_lookups_are_sorted_in_32_bits():
    sorted_types = {tensors[0].dtype for name, tensors in record_step("sgd") if name == "sort"}
    assert sorted_types == {torch.int32}
