"""What a pipeline's training would hold, on the device and on the host, for any hot set."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from slipstream.config import PipelineConfig
from slipstream.io.costs import train_memory_bytes
from slipstream.io.figures import PreprocessFigures
from slipstream.ops.hot_set import table_offsets
from slipstream.training.footprint import (
    META,
    Footprint,
    cut_layout,
    evaluation_bytes,
    stage_example,
    step_bytes,
    weigh,
)
from slipstream.training.loop import Trainer
from slipstream.training.representations import lay_out
from slipstream.training.skipping.registry import CRITERIA
from slipstream.training.slot_layout import SlotLayout
from slipstream.wiring import choose_tables, make_trainer, put_together, put_together_weightless


class Memory:
    """Weighs trainings of one pipeline.

    Args:
        config: The pipeline.
        figures: What preprocess says of its tables and samples.
        counts: Access counts per global row. Shape (V,), int64.
        on_cuda: Whether the device is a GPU.
    """

    def __init__(
        self, config: PipelineConfig, figures: PreprocessFigures, counts: np.ndarray, *, on_cuda: bool
    ) -> None:
        self._specs = choose_tables(config, figures, counts)
        # which row is padding weighs nothing, and of tables cut to what a batch looks up there is always a first one
        padding_rows = None if figures.padding_rows is None else dict.fromkeys(figures.padding_rows, 0)
        figures = replace(figures, padding_rows=padding_rows)
        self._config, self._figures, self._counts, self._on_cuda = config, figures, counts, on_cuda
        are_all_held = all(spec.num_held == spec.num_rows for spec in self._specs)
        self._layout = lay_out(
            _slot_maps(figures.rows_per_table, are_read=not are_all_held),
            self._specs,
            num_hot=sum(figures.rows_per_table.values()),
            table_of_column=figures.column_tables,
        )
        self.has_rows = np.array([spec.representation != "tt" for spec in self._specs])
        """Of each table, whether it has rows; the others are cores. Shape (T,)."""

    def weigh(self, config: PipelineConfig, num_hot: int) -> Footprint:
        """Give bytes by part.

        Args:
            config: The pipeline, in the mode that is asked about.
            num_hot: Hot rows of the tables that have rows.
        """
        footprint = weigh(self._make_trainer(config, num_hot, on_cuda=self._on_cuda), on_cuda=self._on_cuda)
        in_flight = train_memory_bytes(0, self._figures.samples["train"], sample_bytes=self._sample_bytes)
        return replace(
            footprint,
            device=footprint.device | self._transient,
            host=footprint.host | {"samples in flight": in_flight},
        )

    def staging_room(self, config: PipelineConfig, num_hot: int, *, on_cuda: bool) -> int:
        """Count the cold rows that a half of the staging area holds.

        Args:
            config: As in `weigh`.
            num_hot: As there.
            on_cuda: Whether a GPU trains, whatever the device is that memory is asked of.
        """
        return self._make_trainer(config, num_hot, on_cuda=on_cuda).step.rows.num_staged // 2

    def _make_trainer(self, config: PipelineConfig, num_hot: int, *, on_cuda: bool) -> Trainer:
        layout = copy.copy(self._layout)
        layout.num_hot = min(num_hot, layout.num_rows)
        return self._weightless(config, layout, on_cuda=on_cuda)

    def _weightless(self, config: PipelineConfig, layout: SlotLayout, *, on_cuda: bool) -> Trainer:
        parts = put_together_weightless(
            config,
            layout=layout,
            specs=self._specs,
            figures=self._figures,
            counts=self._counts,
            on_cuda=on_cuda,
        )
        trainer = make_trainer(config, parts, num_train=self._figures.samples["train"])
        if trainer.step.tracker is not None:
            trainer.step.tracker.open_window()
        return trainer

    @cached_property
    def _transient(self) -> dict[str, int]:
        """Bytes that come and go, the same for every hot set.

        A step is run over tables that have no more rows than it looks up. Tables of cores have to be looked up for
        real, for what that takes depends on their values.
        """
        config, train = self._config, self._config.train
        layout = cut_layout(self._layout, train.batch_size)
        if layout.is_whole:
            trainer, place = self._weightless(config, layout, on_cuda=self._on_cuda), META
        else:
            place = torch.device("cpu")
            parts = put_together(
                config,
                layout=layout,
                specs=self._specs,
                figures=self._figures,
                counts=_count_all(layout),
                device=place,
            )
            trainer = make_trainer(config, parts, num_train=self._figures.samples["train"])
        batch = stage_example(
            layout,
            batch_size=train.batch_size,
            num_dense=self._figures.num_dense,
            device=place,
            on_cuda=self._on_cuda and layout.is_whole,
            weighted=config.skip.reweight and CRITERIA.get(config.criterion).drops,
            padding=trainer.step.representations.padded,
            range_of_slot=trainer.step.representations.range_of_slot,
        )
        in_step = step_bytes(trainer, batch)
        in_evaluation = evaluation_bytes(
            trainer.step.model.to(META),
            batch_size=train.eval_batch_size,
            num_dense=self._figures.num_dense,
            num_fields=trainer.step.representations.pooling.num_fields,
            row_width=config.model.row_width,
        )
        # those of the chunk at work, and of the next
        ahead = 2 * train.chunk_batches * sum(tensor.nbytes for tensor in batch.tensors())
        beyond = {"evaluation beyond it": in_evaluation - in_step} if in_evaluation > in_step else {}
        return {"batches ahead": ahead, "step": in_step} | beyond

    @property
    def _sample_bytes(self) -> int:
        return 4 * (len(self._figures.column_tables) + self._figures.num_dense + 1)


def _slot_maps(rows_per_table: Mapping[str, int], *, are_read: bool) -> dict[str, np.ndarray]:
    """Give slots of every table; where nobody reads them they are zeros, which take no memory until then."""
    total = sum(rows_per_table.values())
    dtype = np.int32 if total < 2**31 else np.int64
    if not are_read:
        return {name: np.zeros(size, dtype) for name, size in rows_per_table.items()}
    slots = np.arange(total, dtype=dtype)
    starts = table_offsets(list(rows_per_table.values()))
    return {
        name: slots[start:stop].copy() for name, (start, stop) in zip(rows_per_table, pairwise(starts), strict=True)
    }


def _count_all(layout: SlotLayout) -> np.ndarray:
    return np.zeros(layout.num_slots, np.int64)
