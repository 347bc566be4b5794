"""A trained model, ready to predict: encoded rows, parsed samples or raw lines in, click probabilities out.

Shape suffixes: n samples, F looked-up columns, D width of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from slipstream.errors import DataError
from slipstream.io.capacity import require_memory
from slipstream.io.model_folder import FILES, WEIGHTS, read_description
from slipstream.models.registry import read_model
from slipstream.serving.encoder import Encoder
from slipstream.serving.lines import has_labels, labelled_text
from slipstream.serving.portable import PortableModel
from slipstream.training.model_file import load_model, read_ranges, read_tensors
from slipstream.training.pooling import StoredBags
from slipstream.training.predict import click_probabilities

_BATCH = 1024
"""Samples at once: their rows and the products of those fit a processor's cache, which halves the time."""


class ServedModel(nn.Module):
    """A model in evaluation mode, on the CPU.

    Args:
        folder: Folder of the model: a train artifact, or an exported model.

    Raises:
        ArtifactError: The folder holds no whole model.
        CapacityError: Memory would not do.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.description: dict[str, Any] = read_description(folder)
        """What model.json says."""
        weights = folder / WEIGHTS
        require_memory(
            weights.stat().st_size if weights.exists() else 0,
            purpose=f"model `{folder}`",
            hint="round it with `slipstream export model --quantize int8`, or take a machine with more memory",
        )
        self.network, self._tables = load_model(folder)
        self.eval().requires_grad_(False)

    @cached_property
    def encoder(self) -> Encoder:
        """What turns parsed lines into encoded rows.

        Raises:
            ArtifactError: The folder does not say how lines are encoded.
        """
        return Encoder(self.folder, self.description)

    def forward(self, dense: Tensor, rows_nF: Tensor) -> Tensor:
        """Logits of encoded samples.

        Args:
            dense: Transformed dense values. Shape (n, dense columns), float32.
            rows_nF: Row of each looked-up column, in its own table. Shape (n, F), int64.

        Returns:
            Shape (n,), float32.
        """
        logits: Tensor = self.network(dense, self._tables.look_up(rows_nF))
        return logits

    def predict(self, dense: np.ndarray, rows_nF: np.ndarray) -> np.ndarray:
        """Click probabilities of encoded samples.

        Args:
            dense: As for `forward`.
            rows_nF: As for `forward`, of any integer type.

        Returns:
            Shape (n,), float32.
        """
        probabilities = np.empty(len(dense), np.float32)
        with torch.inference_mode():
            for start in range(0, len(dense), _BATCH):
                piece = slice(start, start + _BATCH)
                looked_up = self._tables.look_up(torch.from_numpy(rows_nF[piece].astype(np.int64, copy=False)))
                given = torch.from_numpy(np.ascontiguousarray(dense[piece]))
                probabilities[piece] = click_probabilities(self.network, given, looked_up).numpy()
        return probabilities

    def encode(self, raw: pl.DataFrame | bytes | Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode raw samples as `forward` and `predict` take them.

        Args:
            raw: Lines as the raw log has them, with or without labels; or a frame with the columns that its Parquet
                files may have.

        Returns:
            (dense values (n, dense columns) float32, rows (n, F) int64).

        Raises:
            DataError: A line is no sample.
        """
        source = self.encoder.source
        if not isinstance(raw, bytes | pl.DataFrame):
            raw = "\n".join(raw).encode()
        labelled = labelled_text(source, raw, is_labelled=has_labels(source, raw))
        parsed = source.parse(labelled)
        if parsed.rejected_lines.size:
            at = int(parsed.rejected_lines[0])
            reason = source.explain(labelled.split(b"\n")[at].removesuffix(b"\r"))
            raise DataError(f"line {at + 1} is no sample: {reason}", hint="`score` gives such lines a null and goes on")
        return self.encoder.encode(parsed.samples)

    def score(self, raw: str | Path | pl.DataFrame, *, keep: Sequence[str] = ()) -> pl.DataFrame:
        """Give every raw line its click probability, in order; for files larger than memory use `slipstream score`.

        Args:
            raw: A path, glob or address, or a frame with the columns that Parquet files may have.
            keep: Columns of a line to pass on.

        Returns:
            Of files `file`, `line`, `probability`, `reason` and the columns kept; of a frame the same without the
            first two.

        Raises:
            DataError: A file cannot be read.
        """
        from slipstream.serving.ensemble import Ensemble
        from slipstream.serving.scoring import score_lines

        return score_lines(Ensemble([self]), raw if isinstance(raw, pl.DataFrame) else str(raw), keep=keep)

    def embedding(self, table: str, raw_ids: Sequence[str]) -> Tensor:
        """Look up rows by raw id.

        Args:
            table: Such as `cat_0`.
            raw_ids: Values as the source writes them; the empty string is a missing value.

        Returns:
            The row of each, that of unknown values for those the training split did not have. Shape (n, D), float32.

        Raises:
            ValueError: There is no such table.
        """
        rows = torch.from_numpy(self.encoder.find_rows(table, raw_ids)).long()
        with torch.inference_mode():
            return self._tables.look_up_column(self.description["column_tables"].index(table), rows)

    def portable(self) -> PortableModel:
        """Give the whole model as one module of plain operations, with weights of its own."""
        tensors, _ = read_tensors(self.folder / FILES[0])
        return PortableModel(
            deepcopy(self.network),
            tensors,
            representations=self.description["representations"],
            ranges=read_ranges(self.description),
            row_width=read_model(self.description).row_width,
            column_tables=self.description["column_tables"],
            bags=StoredBags.of(self.description),
        )

    def predict_parsed(self, parsed: pl.DataFrame) -> np.ndarray:
        """Click probabilities of parsed samples: columns `int_*` and `cat_*` as the source gives them. Shape (n,)."""
        return self.predict(*self.encoder.encode(parsed))
