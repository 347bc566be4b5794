"""What a training would hold, told without holding it: to the byte what a real one holds."""

from __future__ import annotations

import gc
import tempfile
import types
from typing import Any

import numpy as np
import pytest
import torch
from strategies import tiny_config
from trained import HELD

from slipstream.config import PipelineConfig
from slipstream.embedding.tiers.pinned import NUM_SLABS, SLAB_BYTES
from slipstream.io.figures import TableFigures
from slipstream.options import pick
from slipstream.training.assemble import Design, Settings
from slipstream.training.footprint import PeakMemory, assemble_weightless, cut_layout, stage_example, step_bytes, weigh
from slipstream.training.loop import Trainer
from slipstream.training.representations import TableSpec, lay_out
from slipstream.training.slot_layout import SlotLayout
from slipstream.wiring import choose_tables, make_trainer, put_together, put_together_weightless

SIZES = {f"cat_{at}": size for at, size in enumerate([500, 3, 900, 40, 120])}
FIGURES = TableFigures(num_dense=4, rows_per_table=SIZES, table_of_column=[0, 1, 2, 3, 4, 2])
NUM_TRAIN = 5000


def make(config: PipelineConfig, *, device: str, on_cuda: bool = False, num_hot: int = 300) -> Trainer:
    """A trainer over the tables of `SIZES`; on `meta` a weightless one."""
    counts = np.concatenate([np.arange(size)[::-1] for size in SIZES.values()])
    specs = choose_tables(config, FIGURES, counts)
    slots = np.random.default_rng(0).permutation(sum(SIZES.values())).astype(np.int32)
    pieces = np.split(slots, np.cumsum(list(SIZES.values()))[:-1])
    layout = lay_out(
        {name: part.copy() for name, part in zip(SIZES, pieces, strict=True)},
        specs,
        num_hot=num_hot,
        table_of_column=FIGURES.column_tables,
    )
    given: dict[str, Any] = {"layout": layout, "specs": specs, "figures": FIGURES, "counts": counts}
    if device == "meta":
        parts = put_together_weightless(config, **given, on_cuda=on_cuda)
    else:
        parts = put_together(config, **given, device=torch.device(device))
    trainer = make_trainer(config, parts, num_train=NUM_TRAIN)
    if trainer.step.tracker is not None:
        trainer.step.tracker.open_window()
    return trainer


def held_by(root: object) -> int:
    """Bytes of every tensor and array that can be reached from an object, found by the garbage collector."""
    beyond = (types.ModuleType, type, types.FunctionType, types.BuiltinFunctionType, types.FrameType)
    seen: set[int] = set()
    memory: dict[tuple[str, int], int] = {}
    waiting = [root]
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, beyond):
            continue
        seen.add(id(found))
        if isinstance(found, torch.Tensor):
            storage = found.untyped_storage()
            memory["storage", storage.data_ptr()] = storage.nbytes()
        elif isinstance(found, np.ndarray):
            owner = found
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            memory["array", id(owner)] = owner.nbytes
        else:
            waiting += gc.get_referents(found)
    return sum(memory.values())


CASES: dict[str, dict[str, Any]] = {
    "resident": {"train__mode": "resident"},
    "baseline, sgd": {"train__mode": "baseline", "train__optimizer": "sgd"},
    "fae, adam": {"train__mode": "fae", "train__optimizer": "adam"},
    "fae, adagrad": {"train__mode": "fae", "train__optimizer": "adagrad", "train__staging_rows": 70},
    "stale": {"train__mode": "slipstream"},
    "stale by net movement": {"train__mode": "slipstream", "skip__movement": "net"},
    "importance": {"train__mode": "slipstream", "skip__criterion": "importance"},
    "cached": {"train__mode": "cached", "train__cache_ratio": 0.4},
    "cached, lfu": {"train__mode": "cached", "train__cache_ratio": 0.4, "train__cache_policy": "lfu"},
    "averaged": {"train__mode": "fae", "train__average": 0.2},
    "in a file": {"train__mode": "fae", "train__average": 0.2, "train__cold_path": tempfile.gettempdir()},
    "samples there": {"train__mode": "fae", "train__cold_access": "in_place", "train__shuffle_on": "device"},
    "int4": {"train__mode": "fae", "tables": HELD["int4"]},
    "mixed": {"train__mode": "fae", "tables": {**HELD["mixed"], "overrides": {}}},
    "by rank": {"train__mode": "fae", "tables": HELD["by rank"]},
    "dcnv2": {"train__mode": "fae", "model": {"name": "dcnv2", "embedding_dim": 4}},
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_to_the_byte_what_a_trainer_holds(name: str):
    config = tiny_config(**CASES[name])
    real = make(config, device="cpu")
    told = weigh(make(config, device="meta"))
    assert told == weigh(real), "part by part"
    assert told.device_bytes + told.host_bytes + sum(told.disk.values()) == held_by(real), "and nothing was left out"
    assert bool(told.disk) == (name == "in a file") == ("cold rows" not in told.host)


@pytest.mark.parametrize("cold_access", ["look_ahead", "in_place"])
def test_it_is_to_the_byte_what_a_trainer_holds_on_a_gpu(cold_access: str, cuda: torch.device):
    config = tiny_config(train__mode="slipstream", train__device="cuda", train__cold_access=cold_access)
    real = make(config, device=cuda.type)
    told = weigh(make(config, device="meta", on_cuda=True), on_cuda=True)
    found = weigh(real)
    assert told.device == found.device
    assert told.host == found.host
    if cold_access == "in_place":  # the windows of two rounds: here all samples twice, and what goes along
        assert told.device["samples"] > 2 * NUM_TRAIN * 4 * (4 + 6 + 1)
        assert told.host["moving rows"] >= 2 * NUM_SLABS * SLAB_BYTES


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["fae, adam", "stale", "stale by net movement", "int4", "by rank", "dcnv2"])
def test_a_step_takes_to_the_byte_what_a_real_one_takes(name: str, weighted: bool):
    config = tiny_config(**CASES[name])
    found = {}
    for device in ("cpu", "meta"):
        trainer = make(config, device=device)
        layout, ranges = cut_layout(trainer.step.representations.layout, 16), trainer.step.representations.range_of_slot
        batch = stage_example(
            layout,
            batch_size=16,
            num_dense=4,
            device=torch.device(device),
            on_cuda=False,
            weighted=weighted,
            range_of_slot=None if ranges is None else np.zeros_like(ranges),
        )
        found[device] = step_bytes(trainer, batch)
    assert found["meta"] == found["cpu"] > 16 * 6 * 4 * 4, "at least the rows that are looked up"


def test_a_larger_batch_takes_more():
    config = tiny_config(train__mode="fae")
    taken = []
    for size in (16, 32):
        trainer = make(config, device="meta")
        layout = cut_layout(trainer.step.representations.layout, size)
        batch = stage_example(
            layout, batch_size=size, num_dense=4, device=torch.device("meta"), on_cuda=False, weighted=False
        )
        taken.append(step_bytes(trainer, batch))
    assert taken[1] > 1.3 * taken[0]


def test_an_example_looks_up_as_many_rows_as_there_can_be():
    trainer = make(tiny_config(train__mode="fae"), device="meta")
    whole = trainer.step.representations.layout
    for size in (2, 16, 600):
        layout = cut_layout(whole, size)
        batch = stage_example(
            layout, batch_size=size, num_dense=4, device=torch.device("cpu"), on_cuda=False, weighted=False
        )
        assert batch.distinct is not None
        assert len(batch.distinct.rows) == whole.most_distinct(size) == layout.most_distinct(size)


def test_memory_is_followed_until_it_is_given_back():
    with PeakMemory() as memory:
        first = torch.zeros(100)
        second = first + 1
        view = second[:10]
        assert memory.bytes == memory.peak == 800
        del first
        assert memory.bytes == 400
        del second
        assert memory.bytes == 400, "a view keeps it"
        third = torch.zeros(300)
        assert memory.peak == 1600
    del view, third


def test_nothing_is_made_for_a_forecast_of_tables_larger_than_memory():
    config = tiny_config(train__mode="fae")
    size = 10**10
    layout = SlotLayout({"cat_0": np.broadcast_to(np.int64(0), (size,))}, num_hot=size, table_of_column=[0])
    parts = assemble_weightless(
        Design(
            settings=pick(Settings, config.train),
            layout=layout,
            specs=[TableSpec(name="cat_0", num_rows=size)],
            padding_rows={},
            counts=np.empty(0),
            network=config.model,
            linear_bits=0,
            num_dense=4,
        ),
        on_cuda=True,
    )
    told = weigh(make_trainer(config, parts, num_train=NUM_TRAIN))
    assert told.device["hot rows"] == size * 4 * 4
    assert told.device["optimizer state"] == size * 4
