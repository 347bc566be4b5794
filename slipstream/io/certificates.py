"""Certificates of exactness: what `slipstream verify` found, as it stands in a train artifact.

certificate.json   verdict, what was compared with what, by parameter; versions, seeds, hashes
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from slipstream.errors import ArtifactError
from slipstream.io.artifacts import Artifact

FILE = "certificate.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One parameter, trained twice."""

    name: str
    """`tables.cat_0`, `dense.bottom.0.weight`: as in model.safetensors."""
    shape: list[int]
    differing: int
    """Values that are not equal to the bit."""
    largest_difference: float
    """Absolute."""
    largest_ulp: int
    """In units in the last place: how many float32 values lie between the two, at most."""
    xxh3: str
    """Of the values of the pipeline's own training, in row order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """What became of a verification."""

    verdict: str
    """`equal to the bit`, `equal within tolerance` or `different`."""
    promise: str
    """What the verdict is held against: `to the bit`, or the largest difference allowed."""
    steps: int
    samples: int
    """Trained on in these steps."""
    mode: str
    model: str
    optimizer: str
    device: str
    threads: int
    skipping: str
    """Which criterion was in force, and what of it the plain loop saw."""
    not_compared: list[str]
    """What the certificate says nothing about."""
    seed: int
    batches_xxh3: str
    """Of the batches, in order: dense values, slots, labels and weights."""
    inputs: dict[str, str]
    """Fingerprints of what both were trained from."""
    parameters: list[Comparison]
    environment: dict[str, str]
    """Versions, processor and threads, as in manifests."""

    @property
    def passes(self) -> bool:
        """Whether the two are as equal as the design promises."""
        return self.verdict != "different"

    @property
    def worst(self) -> Comparison:
        """The parameter that differs most."""
        return max(self.parameters, key=lambda one: (one.largest_difference, one.differing))

    def to_json(self) -> dict[str, Any]:
        """Give it as plain values, the largest difference of all beside the verdict."""
        worst = {"largest_difference": self.worst.largest_difference, "largest_ulp": self.worst.largest_ulp}
        return {"verdict": self.verdict, **worst, **asdict(self)}


def read_certificate(trained: Artifact) -> Certificate | None:
    """Read the certificate of a train artifact; None where it has none.

    Raises:
        ArtifactError: It was altered or is of another form.
    """
    if FILE not in trained.manifest["outputs"]:
        return None
    path: Path = trained.check(trained.path / FILE)
    try:
        body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = {spec.name: body[spec.name] for spec in fields(Certificate)}
        return Certificate(**known | {"parameters": [Comparison(**one) for one in body["parameters"]]})
    except (ValueError, KeyError, TypeError) as exc:
        raise ArtifactError(f"expected a certificate in `{path}`: {exc}", hint="run `slipstream verify` again") from exc
