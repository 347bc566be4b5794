from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda
from strategies import tiny_config

from slipstream.embedding.tiers.in_place import InPlace
from slipstream.embedding.tiers.placement import CachedRows, StagingHalves
from slipstream.errors import CapacityError, ConfigError
from slipstream.options import pick
from slipstream.training import assemble as assemble_module
from slipstream.training.assemble import Assembly, Design, Settings, assemble
from slipstream.training.representations import TableSpec
from slipstream.training.slot_layout import SlotLayout

SIZES = {"cat_0": 40, "cat_1": 3, "cat_2": 77}
NUM_ROWS = sum(SIZES.values())
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def put_together(
    *, num_hot: int, seed: int = 0, slots_seed: int = 0, device: torch.device = CPU, **train: Any
) -> Assembly:
    """Three tables, whose slots are drawn by `slots_seed`."""
    config = tiny_config(**{f"train__{name}": value for name, value in ({"batch_size": 2} | train).items()})
    slots = np.random.default_rng(slots_seed).permutation(NUM_ROWS).astype(np.int32)
    cuts = np.cumsum([0, *SIZES.values()])
    slot_maps = {name: slots[cuts[at] : cuts[at + 1]] for at, name in enumerate(SIZES)}
    return assemble(
        Design(
            settings=pick(Settings, config.train),
            layout=SlotLayout(slot_maps, num_hot=num_hot, table_of_column=range(3)),
            specs=[TableSpec(name=name, num_rows=size) for name, size in SIZES.items()],
            padding_rows={"cat_1": 2},
            counts=np.arange(NUM_ROWS),
            network=config.model,
            linear_bits=0,
            num_dense=2,
        ),
        seed=seed,
        device=device,
    )


def weights_of(parts: Assembly) -> list[torch.Tensor]:
    """Rows of each table in row order, then the dense layers."""
    tables = [parts.rows.gather(torch.from_numpy(slots)) for slots in parts.layout.slot_maps.values()]
    return [*tables, *(parameter.detach() for parameter in parts.model.parameters())]


@pytest.mark.parametrize("mode", ["resident", "baseline", "fae", "cached"])
def test_initial_weights_depend_on_the_seed_and_not_on_where_rows_live(mode: str):
    expected = weights_of(put_together(num_hot=7, mode="slipstream"))
    found = weights_of(put_together(num_hot=50, slots_seed=1, mode=mode))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    other = weights_of(put_together(num_hot=7, seed=1))
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(other[:3], expected[:3], strict=True))


def test_a_padding_row_starts_at_zero_and_no_other_does():
    tables = weights_of(put_together(num_hot=7))[:3]
    assert [(table == 0).all(dim=1).nonzero().flatten().tolist() for table in tables] == [[], [2], []]


def test_padding_is_found_where_it_is_hot():
    parts = put_together(num_hot=NUM_ROWS)
    assert parts.padding_slots is not None
    assert parts.padding_slots.tolist() == [parts.layout.slot_maps["cat_1"][2]]
    assert put_together(num_hot=int(parts.padding_slots[0])).padding_slots is None


@pytest.mark.parametrize(
    ("train", "num_hot", "num_staged"),
    [
        ({"mode": "resident"}, NUM_ROWS, 0),
        ({"mode": "fae", "chunk_batches": 3}, 7, 2 * 3 * 6),
        ({"mode": "fae", "chunk_batches": 100}, 7, 2 * ((NUM_ROWS - 7) // 4)),  # a quarter of the cold rows
        ({"mode": "fae", "chunk_batches": 1}, 7, 2 * 6),  # 2 samples of 3 lookups
        ({"mode": "fae", "staging_rows": 10}, 7, 2 * 10),
        ({"mode": "fae", "staging_rows": 500}, 7, 2 * (NUM_ROWS - 7)),  # no more than there are
        ({"mode": "fae", "faithful": True, "chunk_batches": 16}, 0, 2 * (NUM_ROWS // 4)),
        ({"mode": "baseline", "chunk_batches": 1}, 0, 2 * 6),
        ({"mode": "cached", "cache_ratio": 0.5}, 0, NUM_ROWS // 2),
        ({"mode": "cached", "cache_ratio": 0.01}, 0, 2 * 6),  # two batches
        ({"mode": "fae", "cold_access": "in_place"}, 7, 2 * 6),  # two halves of what a batch can look up
    ],
)
def test_each_mode_has_rows_where_it_wants_them(train: dict[str, Any], num_hot: int, num_staged: int):
    rows = put_together(num_hot=7, **train).rows
    assert (rows.num_hot, rows.num_staged) == (num_hot, num_staged)


# --- who brings cold rows ------------------------------------------------------------------------------------


@pytest.fixture
def triton_cuda(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A device for which there are kernels; none is launched."""
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    monkeypatch.setattr(assemble_module, "has_triton", lambda: True)
    return fake_cuda


@pytest.mark.parametrize(
    ("train", "placement"),
    [
        ({"mode": "fae"}, InPlace),
        ({"mode": "baseline", "optimizer": "adam"}, InPlace),
        ({"mode": "cached", "cache_ratio": 0.5}, CachedRows),
        ({"mode": "fae", "faithful": True, "chunk_batches": 16}, StagingHalves),
        ({"mode": "fae", "kernels": "torch"}, StagingHalves),
        ({"mode": "fae", "cold_access": "look_ahead"}, StagingHalves),
        ({"mode": "fae", "cold_path": tempfile.gettempdir()}, StagingHalves),
        ({"mode": "fae", "kernels": "torch", "cold_access": "in_place"}, InPlace),
    ],
)
def test_a_gpu_reads_cold_rows_in_place_unless_something_speaks_against_it(
    train: dict[str, Any], placement: type, triton_cuda: FakeCuda
):
    assert type(put_together(num_hot=7, device=CUDA, **train).placement) is placement


@pytest.mark.parametrize("mode", ["resident", "baseline", "fae", "slipstream", "cached"])
def test_a_cpu_looks_ahead_unless_told_otherwise(mode: str):
    assert type(put_together(num_hot=7, mode=mode).placement) is (CachedRows if mode == "cached" else StagingHalves)
    if mode != "cached":
        assert type(put_together(num_hot=7, mode=mode, cold_access="in_place").placement) is InPlace


def test_where_memory_cannot_be_locked_the_host_looks_ahead_and_says_so_once(
    triton_cuda: FakeCuda, caplog: pytest.LogCaptureFixture
):
    triton_cuda.lock_error = 2
    parts = put_together(num_hot=7, mode="fae", device=CUDA)
    assert isinstance(parts.placement, StagingHalves)
    assert parts.rows.num_staged == put_together(num_hot=7, mode="fae").rows.num_staged
    [record] = caplog.records
    assert "the host gathers cold rows" in record.message and "cannot be mapped" in record.message
    with pytest.raises(ConfigError, match=r"`train.cold_access` is in_place, and .* cannot be mapped") as failed:
        put_together(num_hot=7, mode="fae", device=CUDA, cold_access="in_place")
    assert "look_ahead" in (failed.value.hint or "")


def test_a_folder_that_cannot_hold_cold_rows_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"`train.cold_path` must be a folder that can be written, found '.*file'"):
        put_together(num_hot=7, mode="fae", cold_path=str(tmp_path / "file"))

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(CapacityError, match=rf"`train.cold_path` = '{tmp_path}' has no room for the cold tier") as full:
        put_together(num_hot=7, mode="fae", cold_path=str(tmp_path))
    assert "train.cold_path" in (full.value.hint or "")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_cold_rows_that_several_ranks_share_are_in_memory(tmp_path: Path):
    train = pick(Settings, tiny_config(train__mode="fae", train__cold_path=str(tmp_path / "disk")).train)
    layout = SlotLayout({"cat_0": np.arange(5)}, num_hot=2, table_of_column=[0])
    with pytest.raises(ConfigError, match=r"`train.cold_path` does not go with several ranks"):
        assemble_module.make_rows(train, layout, row_width=4, device=CPU, sums=object())  # type: ignore[arg-type]
    assert not (tmp_path / "disk").exists()


def test_a_cache_that_the_host_keeps_is_not_read_in_place():
    with pytest.raises(ConfigError, match="'in_place' does not go with mode `cached`"):
        tiny_config(train__mode="cached", train__cold_access="in_place")


def test_matrix_products_are_tf32_on_a_gpu_unless_told_otherwise():
    settings = pick(Settings, tiny_config().train)
    assert (settings.precision_on(on_cuda=True), settings.precision_on(on_cuda=False)) == ("tf32", "fp32")
    assert pick(Settings, tiny_config(train__precision="fp32").train).precision_on(on_cuda=True) == "fp32"
