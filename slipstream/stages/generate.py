"""Generate: write the raw text of a synthetic click log.

Reads   nothing
Writes  generate/    clicks.tsv in Criteo's line format
Keeps   the same bytes for the same spec and seed, on every machine
Costs   about four seconds and 250 MB of text a million samples
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from slipstream.dataset_schema import DatasetConfig
from slipstream.datasets.synthetic import SyntheticSpec, write_log
from slipstream.io.artifacts import write_atomically
from slipstream.io.capacity import require_disk, require_memory
from slipstream.io.costs import COSTS, TEXT_BYTES_PER_SAMPLE
from slipstream.io.figures import GenerateFigures
from slipstream.progress import Progress
from slipstream.stage import StageJob


def run_stage(job: StageJob) -> GenerateFigures:
    """Run as a stage of a pipeline."""
    return run(job.config.dataset, seed=job.config.seed, scratch=job.scratch, progress=job.progress)


def run(config: DatasetConfig, *, seed: int, scratch: Path, progress: Progress) -> GenerateFigures:
    """Write the log; returns its size and how well its teacher predicts its labels.

    Raises:
        CapacityError: Disk or memory has no room for it.
    """
    require_memory(
        int(COSTS["generate"].memory_bytes), purpose="generate", hint="end other programs, or take a larger machine"
    )
    require_disk(
        scratch,
        config.num_samples * TEXT_BYTES_PER_SAMPLE,
        purpose="generate",
        hint="lower `dataset.num_samples`, free some disk, or choose a folder on a larger one with --runs",
    )
    spec = SyntheticSpec(num_samples=config.num_samples, num_days=config.num_days, seed=seed)
    with (
        progress.task("generate", config.num_samples, "samples") as advance,
        write_atomically(scratch / "clicks.tsv") as path,
    ):
        summary = write_log(spec, path, progress=lambda rows: advance(rows, ""))
    return GenerateFigures.from_json(asdict(summary))
