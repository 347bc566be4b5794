"""Several trained models as one: the mean of their click probabilities.

Models that differ by their seed alone differ in what they got wrong, and some of that goes away in the mean.

Shape suffixes: M models, n samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from slipstream.errors import ConfigError
from slipstream.serving.encoder import Encoder
from slipstream.serving.model import ServedModel

_SAID_BY_THE_SOURCE = ("source", "max_ind_range", "history_length", "points_per_user", "layout")
"""What decides how lines become numbers, before any vocabulary is asked."""


class Ensemble:
    """Models that read the same lines; one is enough.

    Args:
        models: At least one.

    Raises:
        ConfigError: Two of them read lines of different formats.
    """

    def __init__(self, models: Sequence[ServedModel]) -> None:
        if not models:
            raise ValueError("expected at least one model, found none")
        self.models = list(models)
        first = models[0].encoder.encoding
        for model in models[1:]:
            own = model.encoder.encoding
            for name in _SAID_BY_THE_SOURCE:
                if getattr(own, name) != getattr(first, name):
                    raise ConfigError(
                        f"`{models[0].folder}` and `{model.folder}` read different lines: their `{name}` differs: "
                        f"{getattr(first, name)!r} and {getattr(own, name)!r}",
                        hint="average models that were trained on the same source with the same options of it",
                    )

    @property
    def encoder(self) -> Encoder:
        """The first model's; its source is everybody's."""
        return self.models[0].encoder

    @property
    def folders(self) -> list[Path]:
        """Where the models lie."""
        return [model.folder for model in self.models]

    def predict_each(self, parsed: pl.DataFrame) -> np.ndarray:
        """Give every model's click probabilities of parsed samples.

        Args:
            parsed: Columns `int_*` and `cat_*` as the source gives them.

        Returns:
            Shape (M, n), float32.
        """
        predicted = np.empty((len(self.models), parsed.height), np.float32)
        encoder, encoded = None, None
        for index, model in enumerate(self.models):
            if encoded is None or encoder is None or not model.encoder.encodes_like(encoder):
                encoder, encoded = model.encoder, model.encoder.encode(parsed)
            predicted[index] = model.predict(*encoded)
        return predicted

    def score(self, raw: str | Path | pl.DataFrame, *, keep: Sequence[str] = ()) -> pl.DataFrame:
        """Give every raw line the mean of the models' click probabilities; as `ServedModel.score`."""
        from slipstream.serving.scoring import score_lines

        return score_lines(self, raw if isinstance(raw, pl.DataFrame) else str(raw), keep=keep)


def average(predicted_Mn: np.ndarray) -> np.ndarray:
    """Average the models' probabilities; those of a single one stay what they are. Shape (n,), float32."""
    mean: np.ndarray = predicted_Mn[0]
    if len(predicted_Mn) > 1:
        mean = predicted_Mn.mean(axis=0, dtype=np.float64).astype(np.float32)
    return mean
