"""The wheel in an empty environment: every command of its guide, extracted from the guide, in one shell."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs/guides/from_a_wheel.md"
SOURCES = ["pyproject.toml", "README.md", "LICENSE", "slipstream", "pipelines", "examples"]


def blocks() -> tuple[str, list[str]]:
    """What builds the wheel, and all that follows."""
    build, *others = re.findall(r"^```sh\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.M | re.S)
    return build, others


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Nothing of the environment that tests run in but the interpreter it was made with."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return own | {"PATH": f"{sys.base_prefix}/bin:/usr/local/bin:/usr/bin:/bin", "NO_COLOR": "1"}


@pytest.fixture(scope="module")
def wheel(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    clone = tmp_path_factory.mktemp("clone")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, clone)
    python = {**environment, "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"}
    subprocess.run(["bash", "-euo", "pipefail", "-c", blocks()[0]], cwd=clone, env=python, check=True)
    [built] = (clone / "dist").glob("*.whl")
    return built


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_wheel_has_what_is_shipped_beside_the_package(wheel: Path):
    from zipfile import ZipFile

    names = set(ZipFile(wheel).namelist())
    for folder in ("pipelines", "examples"):
        shipped = {f"slipstream/{path.relative_to(ROOT)}" for path in (ROOT / folder).iterdir() if path.is_file()}
        assert shipped and shipped <= names
    assert {"slipstream/py.typed", "slipstream/report/page.css", "slipstream/report/page.js"} <= names
    assert not [name for name in names if name.startswith(("tests/", "docs/", "slipstream/tests"))]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_command_of_the_guide_works_in_an_empty_environment(
    wheel: Path, environment: dict[str, str], tmp_path: Path
):
    (tmp_path / "dist").mkdir()
    shutil.copy(wheel, tmp_path / "dist")
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    script = "\n".join(blocks()[1])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "fresh/lib").is_dir() and str(ROOT) not in done.stdout
    lines = pl.read_csv(tmp_path / "scores.csv")
    assert lines.height == 20_000 and lines["probability"].null_count() == 0
    assert (tmp_path / "report.html").stat().st_size < 2_000_000
    [answer] = re.findall(r'{"probability".*?}', done.stdout)
    scored = json.loads(answer)
    assert 0 < scored["probability"][0] < 1 and scored["reason"] == [None]
