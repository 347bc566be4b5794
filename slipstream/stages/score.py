"""Score: raw lines to click probabilities, by a trained model, or by the mean of several.

Reads   a model's folder    weights, vocabularies, transforms: all it takes; of each model where there are several
        raw files           what preprocess reads, and standard input as `-`; with or without labels
Writes  one file            Parquet, CSV or JSON lines by its suffix: one row for every line, in order
Keeps   the probabilities that training predicted for the same lines, to the bit on a CPU
Costs   one pass over the text, two where a sample takes several lines, with 40 bytes of disk a line meanwhile, and
        standard input compressed; memory for the stored tables and the blocks in flight, 4 bytes a line for metrics
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from slipstream.datasets.source import GroupingSource
from slipstream.io.artifacts import hash_file
from slipstream.io.capacity import require_disk, written_bytes
from slipstream.io.model_folder import FILES
from slipstream.io.processors import usable_cores
from slipstream.io.raw import (
    STDIN,
    RawBlock,
    estimate_text_bytes,
    find_raw_files,
    fingerprint_raw,
    raw_size,
    read_blocks,
)
from slipstream.ops.metrics import QualityCounter
from slipstream.ops.parallel import in_order
from slipstream.progress import Progress
from slipstream.serving.ensemble import Ensemble
from slipstream.serving.group_scorer import GroupScorer
from slipstream.serving.line_scorer import LineScorer, ScoredLines, own_column
from slipstream.serving.model import ServedModel
from slipstream.serving.score_file import ScoredBlock, ScoreFile
from slipstream.serving.scoring import BLOCK_BYTES, make_scorer
from slipstream.serving.spool import spooled
from slipstream.training.threads import torch_threads

_BLOCK_BYTES = BLOCK_BYTES

_LOOK_BYTES = 1 << 16
"""Text that the length of lines is judged by."""
# Of disk: of a column in Parquet, in the parts and again in the file; of a line of text beyond its file's name, and of
# one whose sample takes several lines.
_BYTES_PER_VALUE, _BYTES_PER_TEXT_LINE, _BYTES_PER_GROUPED_LINE = 8, 64, 40


def run(
    models: Sequence[ServedModel],
    *,
    raw: Sequence[str],
    out: Path,
    keep: Sequence[str] = (),
    progress: Progress,
) -> dict[str, Any]:
    """Score the lines of raw files; goes on where a killed run of the same files and models stopped.

    Args:
        models: One, or several whose probabilities are averaged.
        raw: Paths, globs, addresses, or `-` for standard input.
        out: File to write; its suffix decides the format.
        keep: Columns of a line to pass on, by the names of the source.
        progress: Told how far it is.

    Returns:
        `output`, `lines`, `samples`, `rejected`; with labels also `quality`: `auc`, `logloss`, `ne`, `calibration`,
        `accuracy`. Of several models also `models`, a list: `folder` of each, and with labels its own `quality`.

    Raises:
        CapacityError: Disk has no room for it; of standard input nobody knows how much it will be.
        ConfigError: A column to keep is not there, the suffix of `out` names no format, or two models read lines of
            different formats.
        DataError: A file cannot be read.
    """
    named = find_raw_files(raw, named_by="--raw", stdin=True)
    ensemble = Ensemble(models)
    with ExitStack() as spool, torch_threads(1):
        files = named
        if STDIN not in files:
            _check_disk(ensemble, files, out, num_kept=len(keep))
        if isinstance(ensemble.encoder.source, GroupingSource):
            files = spool.enter_context(spooled(named, beside=out, progress=progress))
        scores = ScoreFile(out, key=_key(ensemble, files, keep), files=named)
        scorer = make_scorer(
            ensemble, files=files, folder=scores.work, keep=keep, block_bytes=_BLOCK_BYTES, progress=progress
        )
        # without a size nobody knows how much of standard input is left
        total = None if STDIN in files else sum(map(raw_size, files))
        with progress.task("write" if isinstance(scorer, GroupScorer) else "score", total, "B") as advance:
            blocks = [
                block
                for index, file in enumerate(files)
                for block in _score_file(scorer, scores, file, file_index=index, advance=advance)
            ]
    lines, samples = sum(block.num_lines for block in blocks), sum(block.num_samples for block in blocks)
    counts: dict[str, Any] = {"output": str(out), "lines": lines, "samples": samples, "rejected": lines - samples}
    is_measured = samples > 0 and all(block.is_labelled for block in blocks)
    if is_measured:
        counts["quality"] = _measure(scores, "probability")
    if len(models) > 1:
        own = [{"quality": _measure(scores, own_column(at))} if is_measured else {} for at in range(len(models))]
        counts["models"] = [{"folder": str(folder)} | of for folder, of in zip(ensemble.folders, own, strict=True)]
    scores.finish()
    return counts


def _check_disk(models: Ensemble, files: Sequence[str], out: Path, *, num_kept: int) -> None:
    """Refuse what has no room, judged by the first lines of the first file."""
    first = next(read_blocks(files[0], file_index=0, block_bytes=_LOOK_BYTES), None)
    if first is None:
        return
    if isinstance(first.data, bytes):
        num_lines = sum(map(estimate_text_bytes, files)) * max(first.data.count(b"\n"), 1) // len(first.data)
    else:
        num_lines = sum(map(raw_size, files)) * first.end // first.stored
    num_models = len(models.folders)
    values = _BYTES_PER_VALUE * (2 + num_kept + (num_models if num_models > 1 else 0))
    text = 0 if out.suffix == ".parquet" else _BYTES_PER_TEXT_LINE + max(map(len, files))
    grouped = _BYTES_PER_GROUPED_LINE if isinstance(models.encoder.source, GroupingSource) else 0
    written = written_bytes(out.with_name(f".{out.name}.partial"))
    require_disk(
        out.parent,
        num_lines * (2 * values + text + grouped) - written,
        purpose=f"score of about {num_lines:,.0f} lines",
        hint="free some disk, or name a file on a larger one with --out",
    )


def _score_file(
    scorer: LineScorer | GroupScorer, scores: ScoreFile, file: str, *, file_index: int, advance: Any
) -> Iterator[ScoredBlock]:
    finished = [] if file == STDIN else scores.finished(file_index)
    yield from finished
    is_labelled = finished[0].is_labelled if finished else None
    num_lines = sum(block.num_lines for block in finished)
    skip = finished[-1].end if finished else 0
    blocks = read_blocks(file, file_index=file_index, block_bytes=_BLOCK_BYTES, skip=skip, skip_blocks=len(finished))
    first = next(blocks, None)
    if first is None:
        return
    if is_labelled is None:
        is_labelled = scorer.is_labelled(first)

    def score(block: RawBlock) -> tuple[RawBlock, ScoredLines]:
        return block, scorer.score(block, is_labelled=is_labelled)

    read = 0
    # one more than cores: there is always one that waits for the disk or for its turn in Python
    for block, found in in_order(score, chain([first], blocks), usable_cores() + 1):
        scored = scorer.number(found, file_index=file_index, first_line=num_lines + 1)
        whole = ScoredBlock(
            file_index=file_index,
            block_index=block.block_index,
            num_lines=scored.lines.height,
            num_samples=scored.num_samples,
            is_labelled=is_labelled,
            end=block.end,
        )
        scores.add(whole, scored.lines)
        num_lines += whole.num_lines
        advance(block.stored - read, f"{num_lines:,} lines")
        read = block.stored
        yield whole


def _key(models: Ensemble, files: Sequence[str], keep: Sequence[str]) -> dict[str, Any]:
    """Say what the parts of a killed run must have been made from to be of use."""
    return {
        "model": [hash_file(folder / name) for folder in models.folders for name in FILES],
        "raw": [file if file == STDIN else fingerprint_raw(file) for file in files],
        "names": list(files),
        "keep": list(keep),
        "block_bytes": _BLOCK_BYTES,
    }


def _measure(scores: ScoreFile, column: str) -> dict[str, float]:
    """Quality over all samples: probabilities and labels are read back part by part, and 4 bytes a line stay."""
    counter = QualityCounter()
    for part in scores.read([column, "_label"]):
        scored = part.drop_nulls()
        counter.add(scored.get_column("_label").to_numpy(), scored.get_column(column).to_numpy())
    return asdict(counter.result())
