from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings

if TYPE_CHECKING:  # the process that only hands tests to workers reads this file too, and needs no torch
    import torch
    from fake_cuda import FakeCuda

# the same code gives the same verdict; SLIPSTREAM_EXPLORE=1 looks for new examples instead, and for longer
settings.register_profile("default_suite", deadline=None, max_examples=40, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=500, print_blob=True)
settings.load_profile("explore" if os.environ.get("SLIPSTREAM_EXPLORE") else "default_suite")


@functools.cache
def _choose_how_kernels_run() -> None:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # Triton looks at it when it is imported


def pytest_collectstart() -> None:
    _choose_how_kernels_run()


def pytest_collection_finish() -> None:
    # what is imported and collected stays to the end: the garbage collector need not walk through it again and again
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _quick_machine() -> Iterator[None]:
    """Leave out what costs every test time and shows nothing.

    No test cuts the power, so nothing has to wait for the disk (`io/test_durability.py` judges what is synced before
    which rename); and the command line is put together once, not for every call.
    """
    import typer.main
    import typer.testing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        patch.setattr(typer.testing, "_get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20_261_121)


@pytest.fixture(autouse=True)
def _plain_output(monkeypatch: pytest.MonkeyPatch) -> None:
    # help and tables must not depend on the terminal the tests run in
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """A pretended device, for tests of what only that can show."""
    from fake_cuda import pretend_cuda

    with pretend_cuda(monkeypatch) as fake:
        yield fake


@pytest.fixture(params=[pytest.param("real", marks=pytest.mark.gpu)])
def real_cuda() -> Iterator[torch.device]:
    """The device of the machine, for tests of what cannot be pretended. A test that puts nothing there fails."""
    yield from _real_device()


def _real_device() -> Iterator[torch.device]:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    before = torch.cuda.memory_stats().get("allocation.all.allocated", 0)
    yield torch.device("cuda")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] > before, "nothing was put on the device"


@pytest.fixture(params=["pretended", pytest.param("real", marks=pytest.mark.gpu)])
def cuda(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device of every test for CUDA: in any run a pretended one, in `make test-gpu` the one of the machine.

    The test fails if it puts nothing there; pretended, also if anything was out of order.
    """
    import torch

    if request.param == "real":
        yield from _real_device()
        return
    fake: FakeCuda = request.getfixturevalue("fake_cuda")
    yield torch.device("cuda")
    assert fake.has_been_used, "nothing was put on the device"
    assert fake.races == fake.not_handed_over() == fake.refused == fake.spins == []


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder shared by tests that only read from it, or add to it: stages done once are skipped after."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real logs; tests that need it are skipped where it is not given."""
    folder = os.environ.get("SLIPSTREAM_DATA")
    if not folder:
        pytest.skip("set SLIPSTREAM_DATA to the folder of the real logs")
    path = Path(folder)
    if not (path / "criteo_kaggle_137139.tsv.gz").exists():
        pytest.skip(f"no criteo_kaggle_137139.tsv.gz in {path}")
    return path


@pytest.fixture(scope="session")
def renews_golden() -> bool:
    """Whether files in golden/ are to be written, not compared: `make golden`."""
    return bool(os.environ.get("SLIPSTREAM_GOLDEN"))


@pytest.fixture(scope="session")
def golden_path() -> Callable[[str], Path]:
    """Where a golden file lies."""
    return lambda name: Path(__file__).parent / "golden" / name
