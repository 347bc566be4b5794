"""The HTML pages: their figures are the artifacts', they load nothing, and a browser draws every chart."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from raw_logs import make_lines, write_pipeline, write_raw
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

import slipstream
from slipstream.api import Result
from slipstream.cli import app
from slipstream.compare import ComparedVariant, Spread
from slipstream.config import PipelineConfig
from slipstream.errors import ArtifactError, ConfigError
from slipstream.io.capacity import show_bytes
from slipstream.progress import Silent
from slipstream.report import page as page_module
from slipstream.report.compare_page import write_comparison_page
from slipstream.report.facts import RunFacts, open_run
from slipstream.report.page import Figure, Grid, Page, render_page
from slipstream.report.run_page import run_page
from slipstream.stage import row_bytes_of

MOST_BYTES = 2_000_000
OPTIONS: dict[str, Any] = {
    "train.batch_size": 32,
    "train.log_every": 4,
    "train.lr_warmup": 0.25,
    "train.mode": "slipstream",
    "train.validate_steps": 8,
    "skip.criterion": "stale",
    "skip.refresh_steps": 8,
    "segregate.hot_budget": "80%",
    "profile.curve": [0.1, 0.5, 0.8],
    "preprocess.max_reject_ratio": 0.1,
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run whose log has bad lines, and that skips samples."""
    folder = tmp_path_factory.mktemp("html")
    lines = [*make_lines(1200), b"too\tshort", b"0\tbad", b"x" * 9]
    pipeline = write_pipeline(folder / "run.toml", write_raw(folder / "log.tsv", lines))
    return slipstream.run(pipeline, OPTIONS, runs=folder / "runs")


@pytest.fixture(scope="module")
def facts(result: Result) -> Iterator[RunFacts]:
    with open_run(result.run.config, result.run.run_dir.parent, Silent()) as found:
        yield found


@pytest.fixture(scope="module")
def page(facts: RunFacts) -> Page:
    return run_page(facts, ["slipstream", "run", "it's"])


def _grid(page: Page, title: str) -> list[list[str]]:
    [grid] = [part for one in page.sections for part in one.parts if isinstance(part, Grid) and part.title == title]
    return [list(row) for row in grid.rows]


def _numbers(cells: list[str]) -> list[float]:
    return [float(cell.replace(",", "")) for cell in cells]


# --- figures -------------------------------------------------------------------------------------------------


def test_samples_and_rejects_are_those_of_preprocess(page: Page, facts: RunFacts, result: Result):
    counts = result.figures["preprocess"]
    rows = {row[0]: row[1:] for row in _grid(page, "Samples")}
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        assert _numbers(rows[name][:2]) == [counts["samples"][split], counts["positives"][split]]
    assert sum(int(row[1]) for row in _grid(page, "Rejected lines")) == counts["rejected"] == 3
    assert facts.rejects()["lines"].sum() == 3


def test_tables_add_up_to_what_profile_and_segregate_say(page: Page, facts: RunFacts, result: Result):
    tables, segregated = facts.tables(), result.figures["segregate"]
    assert tables["lookups"].sum() == result.figures["profile"]["lookups"]
    assert tables["hot_rows"].sum() == segregated["hot_rows"]
    assert tables["hits"].sum() / tables["lookups"].sum() == pytest.approx(segregated["hit_ratio"])
    assert dict(tables.select("table", "rows").iter_rows()) == segregated["tables"]
    assert [row[0] for row in _grid(page, "Tables")] == tables["table"].to_list()
    top = facts.frequencies().group_by("table").agg(pl.col("lookups").max())
    assert dict(top.iter_rows()) == dict(tables.select("table", "top").iter_rows())


def test_the_curve_is_profiles_and_the_chosen_budget_lies_on_it(page: Page, result: Result):
    assert len(_grid(page, "Hot-set curve")) == len(result.figures["profile"]["curve"])
    [figure] = [
        part for one in page.sections for part in one.parts if getattr(part, "title", "") == "What a budget buys"
    ]
    assert isinstance(figure, Figure)
    lines = [line for lines in figure.spec["datasets"].values() for line in lines]
    chosen = {line["measure"]: line["share"] for line in lines if line.get("label") == "chosen"}
    segregated = result.figures["segregate"]
    assert chosen == {"hit ratio": segregated["hit_ratio"], "hot samples": segregated["hot_sample_share"]}


def test_losses_rounds_and_checks_are_those_of_training(page: Page, facts: RunFacts, result: Result):
    trained = result.figures["train"]
    assert _numbers([row[1] for row in _grid(page, "Training loss")]) == pytest.approx(
        result.losses()["loss"].to_list(), abs=1e-5
    )
    assert facts.dropped()["dropped"].sum() == trained["samples_dropped"] > 0
    checks = json.loads((result.model / "staleness.json").read_text())
    assert [_numbers(row[2:]) for row in _grid(page, "Checks")] == [
        [check["stale_rows"], check["untouched_rows"]] for check in checks
    ]
    rates = facts.learning_rates()
    assert rates["lr"][0] == 0 and rates["lr"].max() == pytest.approx(result.run.config.train.lr)


def test_quality_is_that_of_the_predictions(page: Page, facts: RunFacts, result: Result):
    rows = {row[0]: row[1:] for row in _grid(page, "Quality")}
    for split, name in (("test", "test"), ("val", "validation")):
        predicted = result.predictions(split)
        assert float(rows[name][0]) == pytest.approx(
            roc_auc_score(predicted["label"], predicted["probability"]), abs=1e-4
        )
        curve = facts.roc().filter(split=name)
        area = np.trapezoid(curve["true_positive_rate"], curve["false_positive_rate"])
        assert area == pytest.approx(result.figures["train"][split]["auc"], abs=1e-3)
        assert facts.reliability().filter(split=name)["samples"].sum() == predicted.height
        assert facts.histogram().filter(split=name)["samples"].sum() == predicted.height


def test_bytes_and_seconds_are_those_of_the_manifests(page: Page, facts: RunFacts, result: Result):
    trained = result.figures["train"]
    assert {row[0]: int(row[1].replace(",", "")) for row in _grid(page, "Bytes per tier")} == trained["bytes_per_tier"]
    assert [int(row[1].replace(",", "")) for row in _grid(page, "Bytes moved")] == [
        trained["bytes_to_device"],
        trained["bytes_to_host"],
    ]
    assert [row[0] for row in _grid(page, "Stages")] == list(facts.artifacts)


def test_measurements_on_the_way_are_those_of_training(page: Page, result: Result):
    trained = result.figures["train"]
    assert len(trained["validations"]) > 2
    rows = _grid(page, "Validation")
    assert [int(row[0].removesuffix(" (kept)")) for row in rows] == [one["step"] for one in trained["validations"]]
    assert [float(row[3]) for row in rows] == pytest.approx(
        [one["quality"]["logloss"] for one in trained["validations"]], abs=1e-4
    )
    assert [row[0] for row in rows if "kept" in row[0]] == [f"{trained['best_step']} (kept)"]
    [figure] = [part for one in page.sections for part in one.parts if getattr(part, "title", "") == "Validation AUC"]
    assert isinstance(figure, Figure)
    lines = [line for lines in figure.spec["datasets"].values() for line in lines]
    assert [line["step"] for line in lines if line.get("label") == "kept"] == [trained["best_step"]]


def test_a_steps_time_is_that_of_training_in_parts(page: Page, result: Result):
    trained = result.figures["train"]
    parts = [trained[f"{name}_seconds"] for name in ("input", "move", "compute")]
    assert min(parts) > 0 and sum(parts) <= trained["train_seconds"]
    [figure] = [
        part for one in page.sections for part in one.parts if getattr(part, "title", "") == "Where a step's time went"
    ]
    assert isinstance(figure, Figure)
    [bars] = figure.spec["datasets"].values()
    milliseconds = [bar["ms"] for bar in bars]
    assert milliseconds[:3] == pytest.approx([1000 * seconds / trained["steps"] for seconds in parts])
    assert sum(milliseconds) == pytest.approx(1000 * trained["train_seconds"] / trained["steps"])


def test_bytes_of_tables_are_those_of_their_rows(page: Page, facts: RunFacts):
    row_bytes = row_bytes_of(facts.config)
    for row, table in zip(_grid(page, "Tables"), facts.tables().iter_rows(named=True), strict=True):
        assert (row[2], row[6]) == (show_bytes(table["rows"] * row_bytes), show_bytes(table["hot_rows"] * row_bytes))


def test_seeds_and_versions_say_how_it_was_made(page: Page, result: Result):
    assert [row[1] for row in _grid(page, "Seeds")] == [str(result.run.config.seed), str(result.run.config.train_seed)]


def test_the_command_can_be_pasted_into_a_shell(page: Page):
    text = render_page(page)
    assert html.escape("slipstream run 'it'\"'\"'s'") in text
    assert result_versions(page)["torch"] != "not installed"


def result_versions(page: Page) -> dict[str, str]:
    return dict(_grid(page, "Versions where this page was written"))  # type: ignore[arg-type]


# --- runs that lack something --------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [["preprocess"], ["preprocess", "segregate"]])
def test_stages_that_did_not_run_have_no_section(result: Result, tmp_path: Path, stages: list[str]):
    config = result.run.config
    slipstream.run(write_pipeline(tmp_path / "run.toml", config.dataset.raw[0]), OPTIONS, runs=tmp_path, stages=stages)
    found = _page(config, tmp_path)
    titles = [section.title for section in found.sections]
    assert "Data" in titles and "Training" not in titles
    assert ("Hot set" in titles) == ("segregate" in stages)
    assert "train" in str(found.sections[0].parts[-1])
    render_page(found)


def test_a_split_of_one_class_has_no_roc_curve_and_breaks_nothing(tmp_path: Path):
    lines = make_lines(700)
    lines[600:] = [b"0" + line[1:] for line in lines[600:]]  # what is held out
    pipeline = write_pipeline(tmp_path / "run.toml", write_raw(tmp_path / "log.tsv", lines))
    run = slipstream.run(pipeline, {"train.batch_size": 64}, runs=tmp_path / "runs")
    found = _page(run.run.config, tmp_path / "runs")
    [quality] = [section for section in found.sections if section.title == "Quality"]
    assert "one class only" in str(quality.parts) and "undefined" in str(quality.parts)
    assert found.sections[0].title == "Warnings"
    render_page(found)


def _page(config: PipelineConfig, runs_dir: Path) -> Page:
    with open_run(config, runs_dir, Silent()) as facts:
        return run_page(facts, ["slipstream"])


def test_an_empty_run_folder_is_an_error(result: Result, tmp_path: Path):
    with pytest.raises(ArtifactError, match="nothing is published"), open_run(result.run.config, tmp_path, Silent()):
        pass


def test_altered_predictions_are_refused(result: Result, tmp_path: Path):
    runs = tmp_path / "runs"
    shutil.copytree(result.run.run_dir.parent, runs)
    file = runs / result.run.config.name / "train" / result.model.name / "predictions_test.npy"
    np.save(file, np.zeros_like(np.load(file)))
    with pytest.raises(ArtifactError, match="altered"):
        _page(result.run.config, runs)


def test_without_the_extra_the_error_says_what_to_install(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(page_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="`altair` and `vl_convert`") as raised:
        result.report(tmp_path / "report.html")
    assert raised.value.hint == "pip install 'slipstream[report]'"
    assert not list(tmp_path.iterdir())


# --- in a browser --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return found or pytest.skip("needs Chromium")


def _dump(chromium: str, path: Path, profile: Path) -> tuple[str, str]:
    """The page as a browser has it after its scripts ran, and what went to the console."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--enable-logging=stderr"]
    flags += ["--virtual-time-budget=20000", "--window-size=1200,4000", "--dump-dom"]
    done = subprocess.run([chromium, *flags, path.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, "\n".join(said)


def _marks(dom: str) -> list[int]:
    """Marks of every chart."""
    charts = dom.split('data-chart="')[1:]
    return [len(re.findall(r"<path[^>]* d=", chart.partition("</figure>")[0])) for chart in charts]


def _assert_is_whole(path: Path, chromium: str, profile: Path) -> str:
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < MOST_BYTES
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)[^"']*["']""", text.partition("<script>")[0])
    num_charts = text.count('data-chart="')
    dom, said = _dump(chromium, path, profile)
    assert said == ""
    assert f'data-drawn="{num_charts}"' in dom and ">This chart could not be drawn" not in dom
    assert len(_marks(dom)) == num_charts and min(_marks(dom)) > 2
    return text


def test_a_browser_draws_every_chart_of_a_run_and_has_nothing_to_say(result: Result, chromium: str, tmp_path: Path):
    size = result.report(tmp_path / "report.html")
    text = _assert_is_whole(tmp_path / "report.html", chromium, tmp_path / "profile")
    assert size == len(text.encode())
    assert text.count('data-chart="') == 18
    for label in re.findall(r'<div class="chart" role="img"[^>]*aria-label="([^"]*)"', text):
        assert len(label) > 20
    assert len(re.findall(r'<div class="chart" role="img"', text)) == 18
    assert set(re.findall(r'href="#(section-\d+)"', text)) == set(re.findall(r'<section id="(section-\d+)"', text))


def test_a_browser_draws_every_chart_of_a_comparison(chromium: str, tmp_path: Path):
    names = ["auc", "auc_change", "skipped_share", "hit_ratio", "seconds", "cpu_seconds", "samples_per_second"]
    names += ["device_bytes", "host_bytes", "moved_bytes", "test_logloss", "test_ne", "test_calibration"]
    variants = [
        ComparedVariant(
            name=name,
            overrides=(f"train.mode={name}",),
            figures={figure: Spread(mean=0.25 * (at + 1), error=0.0625) for figure in names},
            seeds=3,
        )
        for at, name in enumerate(["resident", "</script><b>fae"])
    ]
    path = tmp_path / "compare.html"
    write_comparison_page(variants, path, name="tiny", command=["slipstream", "compare"])
    text = _assert_is_whole(path, chromium, tmp_path / "profile")
    assert "<td>0.5000</td><td>0.0625</td>" in text
    specs = json.loads(text.partition('id="charts">')[2].partition("</script>")[0])["specs"]
    [line] = [
        one for spec in specs[:1] for data in spec["datasets"].values() for one in data if "fae" in one["variant"]
    ]
    assert (line["low"], line["mean"], line["high"]) == (0.4375, 0.5, 0.5625)


# --- the command line ----------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_says_where(result: Result, tmp_path: Path):
    pipeline = write_pipeline(tmp_path / "run.toml", result.run.config.dataset.raw[0])
    options = [part for name, value in OPTIONS.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    out, runs = tmp_path / "report.html", str(result.run.run_dir.parent)
    done = CliRunner().invoke(app, ["report", str(pipeline), "--runs", runs, "--out", str(out), *options])
    assert done.exit_code == 0, done.output
    assert f"report written to {out}" in done.output
    assert html.escape("--set 'train.mode=\"slipstream\"'") in out.read_text(encoding="utf-8")
