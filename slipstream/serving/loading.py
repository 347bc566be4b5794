"""Models that are read while their first lines are parsed.

Loading torch takes longer than anything else that happens before a line is scored, and a small log is scored in less.
Lines are parsed and encoded without it; the network alone has to wait.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slipstream.io.model_folder import read_description
from slipstream.serving.encoder import Encoder

if TYPE_CHECKING:
    from slipstream.serving.model import ServedModel


class PendingModel:
    """A model whose weights may still be on their way: it says at once what lines become, and predicts when it can.

    Args:
        folder: Folder of the model.
        reader: Reads it.

    Raises:
        ArtifactError: The folder has no description, or it does not say how lines are encoded.
    """

    def __init__(self, folder: Path, reader: ThreadPoolExecutor) -> None:
        self.folder = folder
        self.encoder = Encoder(folder, read_description(folder))
        """What turns parsed lines into encoded rows."""
        self._model: Future[ServedModel] = reader.submit(_read, folder)

    def predict(self, dense: np.ndarray, rows_nF: np.ndarray) -> np.ndarray:
        """Click probabilities of encoded samples, as `ServedModel.predict` gives them. Shape (n,), float32.

        Raises:
            ArtifactError: The folder holds no whole model.
        """
        return self._model.result().predict(dense, rows_nF)

    def wait(self) -> None:
        """Wait until the model is read.

        Raises:
            ArtifactError: The folder holds no whole model.
        """
        self._model.result()


@contextmanager
def read_meanwhile(folders: Sequence[Path]) -> Iterator[list[PendingModel]]:
    """Give models that are being read in a thread; inside the block every thread computes its own samples, alone."""
    reader = ThreadPoolExecutor(max_workers=1)
    with ExitStack() as threads:
        try:
            limited = reader.submit(_limit_threads, threads)
            models = [PendingModel(folder, reader) for folder in folders]
            yield models
            limited.result()
            for model in models:  # a log without a sample asks none of them
                model.wait()
        finally:
            reader.shutdown(cancel_futures=True)


def _limit_threads(threads: ExitStack) -> None:
    was_collecting = gc.isenabled()
    gc.disable()  # what modules define stays: looking for what could go takes a tenth of the time in which they load
    try:
        from slipstream.training.threads import torch_threads
    finally:
        if was_collecting:
            gc.enable()
    threads.enter_context(torch_threads(1))


def _read(folder: Path) -> ServedModel:
    from slipstream.serving.model import ServedModel

    return ServedModel(folder)
