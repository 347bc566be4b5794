"""From raw click logs to a trained model, with only the rows that matter next to the accelerator.

    result = slipstream.run("tiny", {"train.mode": "resident"})    what `slipstream run` does
    model = slipstream.load(result.model)                          a trained model, ready to predict
    encoder = slipstream.load_encoder(result.model)                what turns raw samples into its inputs, without torch

Importing this loads nothing else; what they need is loaded when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from slipstream.api import load, load_encoder, run

__all__ = ["__version__", "load", "load_encoder", "run"]


def __getattr__(name: str) -> Any:
    if name in ("load", "load_encoder", "run"):
        from slipstream import api

        return getattr(api, name)
    raise AttributeError(f"module 'slipstream' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
