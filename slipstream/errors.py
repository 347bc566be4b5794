"""Errors that a person can act on.

* SlipstreamError          anything we expected could happen; carries a hint
  + ConfigError    exit 2  pipeline file or option: names file and dotted key
  + DataError      exit 1  the source breaks its contract: names file, line or row, column
  + ArtifactError  exit 1  missing, incomplete, altered, or made from other inputs: names the stage to re-run
  + CapacityError  exit 1  does not fit: asked, available, and the knob that changes it
  + EngineError    exit 1  a scheduler or workers cannot be reached, or are lost: names where they were
  + TrainingError  exit 1  non-finite loss and its kin: names the step and the last good checkpoint

Misuse of a function is a ValueError or TypeError; an impossible state is an assert.
"""

import difflib
from collections.abc import Iterable


class SlipstreamError(Exception):
    """An expected failure: one sentence on what was expected, found and where, and a hint on what to do."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(SlipstreamError):
    """The pipeline file or an option is wrong."""

    exit_code = 2


class DataError(SlipstreamError):
    """The raw data breaks the contract of its source."""


class ArtifactError(SlipstreamError):
    """A stage's output is missing, incomplete, altered or made from other inputs."""


class CapacityError(SlipstreamError):
    """Something does not fit in the memory or disk it was given."""


class EngineError(SlipstreamError):
    """Those who should do the work cannot be reached, or were lost."""


class TrainingError(SlipstreamError):
    """Training cannot go on."""


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "") -> str | None:
    """Ask for the known name that is closest to a misspelt one; None where none is close.

    Args:
        name: What was found.
        known: What is allowed.
        prefix: Put before the name: the section of a key, with its dot.
    """
    close = difflib.get_close_matches(name, [*known], n=1)
    return f"did you mean `{prefix}{close[0]}`?" if close else None
