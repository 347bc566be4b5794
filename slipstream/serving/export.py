"""Trained models in the formats of other programs: written, opened again and compared before they get their name."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from slipstream.errors import ArtifactError, ConfigError
from slipstream.io.artifacts import hash_file, sync, wrap_write_errors
from slipstream.io.model_folder import WEIGHTS
from slipstream.registry import Registry
from slipstream.serving.examples import Examples, read_examples
from slipstream.serving.model import ServedModel

_MOST_DIFFERENCE = 1e-5
"""Between probabilities; what is larger is no rounding."""
_LARGEST_FILE = 1_800_000_000
"""Bytes of weights up to which they stand in the ONNX file: protobuf ends at 2 GB."""

FORMATS: Registry[Callable[[ServedModel, Path, Examples], np.ndarray]] = Registry("format")
"""What writes a model to a path and predicts the examples from what it wrote."""


def write_portable(model: ServedModel, out: Path, *, name: str) -> dict[str, Any]:
    """Write a model in another program's format.

    Args:
        model: The model.
        out: File to write.
        name: `onnx` or `torch`.

    Returns:
        `output`, `bytes` and `largest_difference` between its probabilities and the model's own, on the examples.

    Raises:
        ArtifactError: What was written predicts something else.
        ConfigError: A package is missing, or there is a file already.
    """
    if out.exists():
        raise ConfigError(f"there is a file `{out}` already", hint="name another one, or remove it")
    examples = read_examples(model.folder)
    expected = model.predict(examples.dense, examples.rows)
    with wrap_write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            # a file may have a second one beside it that it knows by name; so both are written under their names
            found = FORMATS.get(name)(model, Path(folder) / out.name, examples)
            difference = float(np.abs(found - expected).max())
            if not difference <= _MOST_DIFFERENCE:
                raise ArtifactError(
                    f"the {name} model predicts otherwise than the model itself: by {difference:.2g} on "
                    f"{len(expected):,} samples, expected at most {_MOST_DIFFERENCE:g}; nothing was written",
                    hint="report it with the versions of torch, onnx and onnxruntime",
                )
            # the file itself comes last: until then nobody takes what is there for a model
            written = sorted(Path(folder).iterdir(), key=lambda file: file.name == out.name)
            for file in written:
                sync(file)
                file.replace(out.parent / file.name)
    nbytes = sum((out.parent / file.name).stat().st_size for file in written)
    return {"output": str(out), "bytes": nbytes, "largest_difference": difference}


def _write_onnx(model: ServedModel, path: Path, examples: Examples) -> np.ndarray:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise ConfigError(f"export to ONNX needs the package `{package}`", hint="pip install 'slipstream[onnx]'")
    import onnxruntime

    portable = model.portable()
    batch = torch.export.Dim("batch", min=1)
    with _quietly():
        program = torch.onnx.export(
            portable,
            _inputs(examples, 2),
            dynamo=True,
            input_names=["dense", "rows"],
            output_names=["probability"],
            dynamic_shapes=({0: batch}, {0: batch}),
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props["slipstream.weights"] = hash_file(model.folder / WEIGHTS)
        nbytes = sum(buffer.nbytes for buffer in portable.buffers())
        program.save(str(path), external_data=nbytes > _LARGEST_FILE)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = {"dense": examples.dense, "rows": examples.rows.astype(np.int64)}
    (probabilities,) = session.run(["probability"], inputs)
    return np.asarray(probabilities)


def _write_torch(model: ServedModel, path: Path, examples: Examples) -> np.ndarray:
    batch = torch.export.Dim("batch", min=1)
    with _quietly():
        program = torch.export.export(
            model.portable(), _inputs(examples, 2), dynamic_shapes=({0: batch}, {0: batch}), strict=False
        )
        with path.open("wb") as stream:
            torch.export.save(program, stream)
        with path.open("rb") as stream:
            opened = torch.export.load(stream).module()
    with torch.inference_mode():
        probabilities: np.ndarray = opened(*_inputs(examples, len(examples.dense))).numpy()
    return probabilities


FORMATS.register("onnx", _write_onnx, summary="ONNX, for ONNX Runtime and others")
FORMATS.register("torch", _write_torch, summary="a program of torch.export, for PyTorch without slipstream")


def _inputs(examples: Examples, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(examples.dense[:count]), torch.from_numpy(examples.rows[:count].astype(np.int64))


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep what exporters have to say about themselves out of the way."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
