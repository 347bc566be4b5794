"""Where samples are shuffled: on a GPU that reads cold rows in place and has room for them, or where asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda
from strategies import tiny_config

from slipstream.embedding.tiers.in_place import InPlace
from slipstream.embedding.tiers.sample_ring import SampleRing
from slipstream.errors import CapacityError, ConfigError
from slipstream.io.figures import TableFigures
from slipstream.training.loop import Trainer
from slipstream.training.slot_layout import SlotLayout
from slipstream.wiring import choose_tables, make_trainer, put_together

SIZES = {"cat_0": 30, "cat_1": 50}


def make(device: str, *, num_train: int = 1000, cramped: FakeCuda | None = None, **train: Any) -> Trainer:
    config = tiny_config(train__device=device, **{f"train__{name}": value for name, value in train.items()})
    slots = np.arange(80, dtype=np.int32)
    figures = TableFigures(num_dense=4, rows_per_table=SIZES, table_of_column=[0, 1])
    counts = np.arange(80)
    parts = put_together(
        config,
        layout=SlotLayout({"cat_0": slots[:30], "cat_1": slots[30:]}, num_hot=20, table_of_column=[0, 1]),
        specs=choose_tables(config, figures, counts),
        figures=figures,
        counts=counts,
        device=torch.device(device),
    )
    if cramped is not None:
        cramped.limit_bytes = 0
    return make_trainer(config, parts, num_train=num_train)


def ring_of(trainer: Trainer) -> SampleRing | None:
    return trainer.lookahead.ring if isinstance(trainer.lookahead, InPlace) else None


def test_a_gpu_that_reads_cold_rows_in_place_shuffles_samples_unless_it_is_told_otherwise(fake_cuda: FakeCuda):
    assert ring_of(make("cuda", mode="fae", cold_access="in_place")) is not None
    assert ring_of(make("cuda", mode="fae", cold_access="in_place", shuffle_on="host")) is None
    assert ring_of(make("cuda", mode="fae", cold_access="look_ahead")) is None


def test_a_cpu_shuffles_as_the_host_unless_it_is_told_otherwise():
    assert ring_of(make("cpu", mode="fae", cold_access="in_place")) is None
    assert ring_of(make("cpu", mode="fae", cold_access="in_place", shuffle_on="device")) is not None


@pytest.mark.parametrize("mode", ["fae", "cached"])
def test_samples_are_not_kept_by_a_device_whose_cold_rows_the_host_brings(mode: str):
    with pytest.raises(ConfigError, match="does not read cold rows in place") as failed:
        make("cpu", mode=mode, shuffle_on="device")
    assert "train.cold_access" in (failed.value.hint or "")


def test_without_room_for_windows_the_host_shuffles_and_says_so(fake_cuda: FakeCuda, caplog: pytest.LogCaptureFixture):
    assert ring_of(make("cuda", cramped=fake_cuda, mode="fae", cold_access="in_place")) is None
    [record] = caplog.records
    assert "the host shuffles samples: the device has no room for windows of 2,000 samples" in record.message
    fake_cuda.limit_bytes = float("inf")
    with pytest.raises(CapacityError, match="no room for windows of 2,000 samples") as failed:
        make("cuda", cramped=fake_cuda, mode="fae", cold_access="in_place", shuffle_on="device")
    assert "train.shuffle_on" in (failed.value.hint or "")


def test_room_for_windows_grows_with_the_data_up_to_two_rounds():
    def num_bytes(num_train: int) -> int:
        ring = ring_of(make("cpu", num_train=num_train, mode="fae", cold_access="in_place", shuffle_on="device"))
        assert ring is not None
        return sum(tensor.nbytes for tensor in ring.tensors())

    a_sample = 4 * (4 + 2 + 1)
    assert num_bytes(2000) - num_bytes(1000) == 1000 * (2 * a_sample + 12), "twice itself, its number and its weight"
