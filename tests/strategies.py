"""What tests draw from and build with: hypothesis strategies, and small pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import strategies as st

from slipstream.config import PipelineConfig, build_pipeline
from slipstream.io.samples import Samples
from slipstream.ops.hot_set import table_offsets
from slipstream.training.skipping.criterion import Movement, SkipRule
from slipstream.training.skipping.registry import make_criterion

if TYPE_CHECKING:
    from torch import Tensor

    from slipstream.embedding.tiers.rows import TieredRows
    from slipstream.training.skipping.trackers import RowTracker

TINY: dict[str, Any] = {
    "name": "tiny_test",
    "dataset": {"source": "synthetic", "num_samples": 2400},
    "preprocess": {"freq_threshold": 2, "samples_per_part": 900},
    "profile": {"curve": [0.05, 0.2]},
    "segregate": {"hot_budget": "20%", "samples_per_shard": 500},
    "model": {"embedding_dim": 4, "bottom_mlp": [8, 4], "top_mlp": [8, 1]},
    "train": {"batch_size": 64, "chunk_batches": 3, "device": "cpu"},
}
"""A whole pipeline of half a second: 2,400 samples, several parts and shards of everything."""


def tiny_tree(**overrides: Any) -> dict[str, Any]:
    """`TINY` with single keys replaced: `tiny_tree(train__mode="fae")`."""
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
    for key, value in overrides.items():
        *sections, last = key.split("__")
        target = tree
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
    return tree


def tiny_config(**overrides: Any) -> PipelineConfig:
    """The checked config of `tiny_tree`."""
    return build_pipeline(tiny_tree(**overrides))


def write_toml(path: Path, tree: dict[str, Any]) -> Path:
    """Write a pipeline tree as TOML: scalars first, then sections."""
    lines = [f"{key} = {_literal(value)}" for key, value in tree.items() if not isinstance(value, dict)]
    for name, section in tree.items():
        if isinstance(section, dict):
            lines += [f"\n[{name}]", *(f"{key} = {_literal(value)}" for key, value in section.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def make_samples(slots: np.ndarray, *, num_dense: int = 3, start: int = 0) -> Samples:
    """Samples that can be told apart: the first dense value is the sample's number."""
    rng = np.random.default_rng([len(slots), start])
    dense = rng.normal(size=(len(slots), num_dense)).astype(np.float32)
    dense[:, 0] = np.arange(start, start + len(slots))
    return Samples(X_int=dense, X_cat=slots.astype(np.int32), y=rng.integers(0, 2, len(slots)).astype(np.float32))


def sample_numbers(samples: Samples) -> list[int]:
    """The numbers that `make_samples` gave."""
    return samples.X_int[:, 0].astype(int).tolist()


@st.composite
def lookups(draw: st.DrawFn, *, max_tables: int = 4, max_rows: int = 7, max_samples: int = 30):
    """(rows of each table, global rows of each sample (n, T)); lookups lean to low rows, as real ones do."""
    rows_per_table = draw(st.lists(st.integers(1, max_rows), min_size=1, max_size=max_tables))
    num_samples = draw(st.integers(0, max_samples))
    columns = [
        draw(st.lists(st.integers(0, size - 1), min_size=num_samples, max_size=num_samples)) for size in rows_per_table
    ]
    rows = np.array(columns, np.int64).reshape(len(rows_per_table), num_samples).T
    return rows_per_table, rows + table_offsets(rows_per_table)[:-1]


@st.composite
def count_tables(draw: st.DrawFn):
    """(rows of each table, access count of every global row), with many ties and zeros."""
    rows_per_table = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    total = sum(rows_per_table)
    counts = draw(st.lists(st.integers(0, 5), min_size=total, max_size=total))
    return rows_per_table, np.array(counts, np.int64)


@st.composite
def slot_batches(draw: st.DrawFn):
    """(V, batches of slots, each (B, T)): any sizes, any duplicates."""
    num_rows = draw(st.integers(1, 24))
    num_tables = draw(st.integers(1, 3))
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=12))
    batches = []
    for size in sizes:
        flat = draw(st.lists(st.integers(0, num_rows - 1), min_size=size * num_tables, max_size=size * num_tables))
        batches.append(np.array(flat, np.int32).reshape(size, num_tables))
    return num_rows, batches


def make_tracker(movement: Movement, hot_rows: Tensor) -> RowTracker:
    """What criterion `stale` watches the hot tier with, a view of shape (H, D)."""
    return make_criterion(SkipRule(criterion="stale", target_drop=0.3, movement=movement)).make_tracker(hot_rows)


def state_of(rows: TieredRows, slots: Tensor) -> list[Tensor]:
    """What the rule keeps of some slots, wherever they live, on the host. Shapes (n,) per row, (n, D) per element."""
    is_hot = slots < rows.num_hot
    found = []
    for buffer, host in rows.pairs[1:]:
        state = host.new_empty(len(slots), *host.shape[1:])
        state[is_hot] = buffer[slots[is_hot].to(rows.device)].cpu()
        state[~is_hot] = rows.read_cold(host, slots[~is_hot] - rows.num_hot)
        found.append(state)
    return found
