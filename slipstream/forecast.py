"""What the stages that would run will about take: time, disk and memory, summed up ahead."""

from __future__ import annotations

from collections.abc import Sequence

from slipstream.config import PipelineConfig
from slipstream.io.costs import COSTS, TEXT_BYTES_PER_SAMPLE, Forecast, forecast_stage
from slipstream.io.figures import PreprocessFigures
from slipstream.pipeline import StagePlan
from slipstream.stage import trained_row_bytes


def forecast_run(config: PipelineConfig, plans: Sequence[StagePlan]) -> list[Forecast]:
    """Say for every stage that would run, and was measured once, what it will about take on two cores.

    Samples and rows are counted where preprocess has run; otherwise samples are judged by the length of the text, and
    rows by that of synthetic logs.

    Raises:
        DataError: A raw file cannot be read.
    """
    published = {plan.stage: plan.artifact for plan in plans}
    encoded = published.get("preprocess")
    num_rows = None
    if encoded is not None:
        figures = PreprocessFigures.of(encoded)
        num_samples, num_rows = sum(figures.samples.values()), sum(figures.rows_per_table.values())
    elif config.dataset.source == "synthetic":
        num_samples = config.dataset.num_samples
    else:
        from slipstream.io.raw import estimate_text_bytes, find_raw_files

        text_bytes = sum(estimate_text_bytes(path) for path in find_raw_files(config.dataset.raw))
        num_samples = text_bytes // TEXT_BYTES_PER_SAMPLE
    row_bytes = trained_row_bytes(config)
    return [
        forecast_stage(
            plan.stage,
            num_samples=num_samples,
            row_bytes=row_bytes,
            epochs=config.train.epochs,
            num_rows=num_rows,
            rows_on_disk=bool(config.train.cold_path),
        )
        for plan in plans
        if plan.will_run and plan.stage in COSTS
    ]
