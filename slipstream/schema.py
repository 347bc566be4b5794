"""Names, dtypes and the id contract, as data.

A sample moves through three id spaces; every module says which one it speaks:

    raw_id   the value as the source wrote it: hex token, integer or string
    row      dense integer per table, ranked by use in the training split: row 0 is OOV (unknown and rare
             values), row 1 the most frequent value, ties by raw id; so counts fall with the row number
    slot     one integer over all tables, hot rows first (0..H-1), cold rows after (H..V-1), each part in
             table then row order; a sample is hot iff all of its slots are < H

Column names of processed samples are TorchRec's: `label`, `int_0`…, `cat_0`….
"""

from dataclasses import dataclass
from typing import Final, Literal

LABEL: Final = "label"
SPLITS: Final = ("train", "val", "test")
SHARD_GROUPS: Final = ("hot", "cold", "val", "test")
STAGES: Final = ("preprocess", "profile", "segregate", "train")

MISSING_ID: Final = -(2**63)
"""The raw id of an empty field: a value like any other, and the first in raw-id order."""
OOV_ROW: Final = 0
"""The row of unknown and rare values, in every table; always hot."""


Representation = Literal["dense", "int8", "int4", "int2", "mixed", "tt"]
"""How a table is held: fp32 rows, rows on few bits, the fewer the rarer their use, or tensor-train cores."""
BITS: Final[dict[str, int]] = {"dense": 0, "int8": 8, "int4": 4, "int2": 2}
"""Bits of a row's values, 0 for fp32."""
TableScale = Literal["table", "row"]
"""What shares the step between two levels of a table on few bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFormat:
    """What is stored of a row."""

    bits: int
    """Of each value; 0 for fp32."""
    values: int | None = None
    """How many values are stored, the last ones; the others are zero. None for all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRange(RowFormat):
    """Rows of one table, one after the other, that are stored in one format."""

    rows: int
    """How many."""


Pooling = Literal["sum", "mean"]
"""How the rows of a bag become one vector."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bag:
    """Looked-up columns of one table that a model sees as one: a list of values, its rows pooled.

    Lists shorter than there are columns end with padding, which counts for nothing; an empty one is a zero vector.
    """

    columns: tuple[int, ...]
    """Numbers of the columns, in the order of the values."""
    pooling: Pooling
    """Sum of the values' rows, or their mean."""


def dense_name(index: int) -> str:
    """Name of the `index`-th dense column."""
    return f"int_{index}"


def table_name(index: int) -> str:
    """Name of the `index`-th sparse column, and of the table it looks up."""
    return f"cat_{index}"
