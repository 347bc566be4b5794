"""Whether a result can be trusted: verified against a plain loop."""

from __future__ import annotations

import contextlib
from pathlib import Path

from slipstream.config import PipelineConfig
from slipstream.errors import ArtifactError, TrainingError
from slipstream.io.artifacts import Artifact, add_output, open_artifact
from slipstream.io.certificates import FILE, Certificate
from slipstream.io.locks import hold_artifact
from slipstream.pipeline import Run
from slipstream.progress import Progress, Silent

_INPUTS = ("profile", "segregate")


def verify_pipeline(
    config: PipelineConfig, runs_dir: Path, *, steps: int, progress: Progress | None = None
) -> tuple[Certificate, Artifact]:
    """Train some steps as configured and by a plain loop, compare, and put the certificate into the train artifact.

    Args:
        config: The pipeline, which has run.
        runs_dir: Folder that holds run folders.
        steps: Steps to train.
        progress: Told how far it is.

    Returns:
        What was found, and the artifact that has it now.

    Raises:
        ArtifactError: Something is not published yet, or was altered.
        ConfigError: The pipeline trains what has no plain counterpart.
    """
    from slipstream.stages import verify

    progress = progress or Silent()
    published = {plan.stage: plan.artifact for plan in Run(config, runs_dir, progress).plan()}
    if missing := [name for name in (*_INPUTS, "train") if published[name] is None]:
        raise ArtifactError(
            f"stage `{missing[-1]}` has no output for this pipeline yet, and a certificate is put into a trained model",
            hint="run `slipstream run` first, with the same pipeline, --runs and --set",
        )
    with contextlib.ExitStack() as locks:
        inputs = {}
        for name in _INPUTS:
            path = _path_of(published[name])
            locks.enter_context(hold_artifact(path, shared=True))
            inputs[name] = open_artifact(path)
        trained = _path_of(published["train"])
        locks.enter_context(hold_artifact(trained))
        certificate = verify.run(
            config, segregated=inputs["segregate"], profiled=inputs["profile"], steps=steps, progress=progress
        )
        return certificate, add_output(open_artifact(trained), FILE, certificate.to_json())


def require_equal(certificate: Certificate, trained: Artifact) -> None:
    """Fail where a certificate does.

    Raises:
        TrainingError: The two trainings differ; says by how much, and where.
    """
    if not certificate.passes:
        worst = certificate.worst
        raise TrainingError(
            f"the model trained as configured is not that of a plain loop: `{worst.name}` differs by "
            f"{worst.largest_difference:.3g} ({worst.largest_ulp:,} ULP) in {worst.differing:,} values, "
            f"promised was: equal {certificate.promise}",
            hint=f"this should not happen: report it, with the pipeline file and `{trained.path / FILE}`",
        )


def _path_of(artifact: Artifact | None) -> Path:
    assert artifact is not None
    return artifact.path
