"""The commands that say what a run would take, and whether it can be trusted, as they are typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from strategies import tiny_tree, write_toml
from test_cli import call, call_json


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A pipeline that ran once, and its folder of runs."""
    path = tmp_path_factory.mktemp("checks")
    pipeline = write_toml(path / "tiny.toml", tiny_tree())
    call("run", pipeline, "--runs", path / "runs", "--quiet")
    return [pipeline, "--runs", path / "runs"]


# --- size ----------------------------------------------------------------------------------------------------


def test_size_shows_what_is_asked_and_memory_by_part(arguments: list[object]):
    text = call("size", *arguments, "--hit-ratio", "50%,60%", "--budget", "10%").stdout
    for shown in ("50% of lookups", "60% of lookups", "budget 10%", "resident", "baseline", "sample-aware", "staging"):
        assert shown in text
    assert max(map(len, text.splitlines())) <= 120
    document = call_json("size", *arguments, "--hit-ratio", "50%")
    assert [answer["policy"] for answer in document["answers"]] == ["frequency", "sample-aware", "", ""]
    assert document["answers"][0]["served"]["hit_ratio"] >= 0.5
    assert set(document["answers"][0]["device"]) >= {"hot rows", "optimizer state", "staging", "layers", "step"}


def test_size_without_a_profile_says_what_to_run(arguments: list[object], tmp_path: Path):
    error = call("size", arguments[0], "--runs", tmp_path, expect=1).stderr
    assert "expected a profile" in error and "--profile" in error
    asked = call("size", arguments[0], "--runs", tmp_path, "--profile", "--set", "dataset.num_samples=2000")
    assert "✓ profile" in asked.stderr and "budget 20%" in asked.stdout


def test_size_names_the_option_that_is_wrong(arguments: list[object]):
    error = call("size", *arguments, "--hit-ratio", "95", expect=2).stderr
    assert "`--hit-ratio` must be a share such as 95% or 0.95, found '95'" in error
