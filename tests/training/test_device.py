from __future__ import annotations

import pytest
import torch

from slipstream.errors import CapacityError
from slipstream.training.device import fitting_the_device, resolve_device


@pytest.mark.parametrize(("is_there", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch, is_there: bool, expected: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    assert resolve_device("auto") == torch.device(expected)


def test_a_device_that_is_full_says_what_did_not_fit_when_it_failed():
    step = 0
    with (
        pytest.raises(CapacityError, match=r"no room for step 3: .* 2\.00 GiB") as caught,
        fitting_the_device(lambda: f"step {step}", lower="`train.batch_size`"),
    ):
        step = 3
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert caught.value.hint == "lower `train.batch_size`"


def test_other_errors_of_the_block_stay_what_they_are():
    with pytest.raises(ZeroDivisionError), fitting_the_device("a division"):
        _ = 1 // 0
