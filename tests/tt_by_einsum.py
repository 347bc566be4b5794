"""Tensor-train bags of the sizes that tests use, and their tables computed by numpy and einsum."""

import math

import numpy as np
import torch
from hypothesis import settings

from slipstream.embedding.tt.bag import TTEmbeddingBag

P, Q, RANKS = [7, 9, 11, 5], [3, 4, 5, 7], [13, 12, 7]  # the shapes FBTT-Embedding tests with


few = settings(max_examples=20, deadline=None)


def make_bag(num_cores=3, *, rows_short=2, seed=0, **options):
    p, q = P[:num_cores], Q[:num_cores]
    options = {"dtype": torch.float64, **options}
    generator = torch.Generator().manual_seed(seed)
    return TTEmbeddingBag(
        math.prod(p) - rows_short, math.prod(q), RANKS[: num_cores - 1], p, q, generator=generator, **options
    )


def reference_table(cores, num_embeddings):
    """The table, one core slice per row: digits by numpy, products by einsum."""
    digits = np.unravel_index(np.arange(num_embeddings), [core.shape[0] for core in cores])
    table = cores[0][torch.from_numpy(digits[0])]
    for core, digit in zip(cores[1:], digits[1:], strict=True):
        left = table.reshape(num_embeddings, 1, -1, core.shape[1])
        table = torch.einsum("nalr,nrqs->nalqs", left, core[torch.from_numpy(digit)])
        table = table.reshape(num_embeddings, 1, -1, core.shape[3])
    return table.reshape(num_embeddings, -1)


def table_of(bag):
    return reference_table([core[0] for core in bag.tt_cores], bag.num_embeddings)


def ragged(rng, num_embeddings, num_bags=9, longest=8):
    lengths = rng.integers(0, longest, num_bags)
    ids = torch.from_numpy(rng.integers(0, num_embeddings, lengths.sum()) // rng.integers(1, 4))
    return ids, torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))


def train(bag, batches):
    for ids, offsets in batches:
        bag(ids, offsets[:-1]).square().sum().backward()
