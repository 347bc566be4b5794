"""Names, dtypes and the id contract, as data.

A sample moves through three id spaces; every module says which one it speaks:

    raw_id   the value as the source wrote it: hex token, integer or string
    row      dense integer per table, ranked by use in the training split: row 0 is OOV (unknown and rare
             values), row 1 the most frequent value, ties by raw id; so counts fall with the row number
    slot     one integer over all tables, hot rows first (0..H-1), cold rows after (H..V-1), each part in
             table then row order; a sample is hot iff all of its slots are < H

Column names of processed samples are TorchRec's: `label`, `int_0`…, `cat_0`….
"""

from typing import Final

LABEL: Final = "label"
SPLITS: Final = ("train", "val", "test")
SHARD_GROUPS: Final = ("hot", "cold", "val", "test")
STAGES: Final = ("preprocess", "profile", "segregate", "train")

MISSING_ID: Final = -(2**63)
"""The raw id of an empty field: a value like any other, and the first in raw-id order."""
OOV_ROW: Final = 0
"""The row of unknown and rare values, in every table; always hot."""


def dense_name(index: int) -> str:
    """Name of the `index`-th dense column."""
    return f"int_{index}"


def table_name(index: int) -> str:
    """Name of the `index`-th sparse column, and of the table it looks up."""
    return f"cat_{index}"
