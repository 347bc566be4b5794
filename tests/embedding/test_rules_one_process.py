"""Bags that DDP would train wrongly say so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from slipstream.embedding import CachedEmbeddingBag, QuantizedEmbeddingBag, TTEmbeddingBag

IDS = torch.tensor([[1, 2], [3, 1]])


def train_cached() -> None:
    CachedEmbeddingBag(50, 4, cache_ratio=0.2, mode="sum")(IDS).sum().backward()


def train_fused_cores() -> None:
    TTEmbeddingBag(64, 8, [2, 2], sparse=True)(IDS).sum().backward()


def train_int8_master() -> None:
    bag = QuantizedEmbeddingBag(50, 4, bits=8, master_dtype="int8")
    bag(IDS).sum().backward()
    bag.apply_gradients(lr=0.1)


def train_dense_cores() -> None:
    TTEmbeddingBag(64, 8, [2, 2], sparse=False)(IDS).sum().backward()


def train_float_master() -> None:
    QuantizedEmbeddingBag(50, 4, bits=8)(IDS).sum().backward()


@pytest.fixture
def in_one_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)


@pytest.mark.parametrize("train", [train_cached, train_fused_cores, train_int8_master])
def test_a_bag_that_would_drift_apart_refuses_to_train(train: Callable[[], None], in_one_of_two: None):
    with pytest.raises(
        ValueError,
        match=r"expected one process to train .*, found a process group of 2, whose models would drift apart: .+",
    ):
        train()


@pytest.mark.parametrize("train", [train_dense_cores, train_float_master])
def test_a_bag_whose_gradients_are_averaged_trains(train: Callable[[], None], in_one_of_two: None):
    train()


def test_what_is_not_trained_is_not_refused(in_one_of_two: None):
    bag: nn.Module = CachedEmbeddingBag(50, 4, cache_ratio=0.2, mode="sum").eval()
    assert bag(IDS).shape == (2, 4)
