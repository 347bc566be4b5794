from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from raw_logs import make_lines, write_pipeline, write_raw
from strategies import tiny_tree, write_toml
from typer.testing import CliRunner

from slipstream import __version__
from slipstream.cli import app

STAGES = ["generate", "preprocess", "profile", "segregate", "train"]


def call(*arguments: object, expect: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == expect, result.stderr
    assert "Traceback" not in result.stderr
    return result


def call_json(*arguments: object) -> Any:
    return json.loads(call(*arguments, "--json").stdout, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline file, run once."""
    path = tmp_path_factory.mktemp("cli")
    write_toml(path / "tiny.toml", tiny_tree())
    call("run", path / "tiny.toml", "--runs", path / "runs", "--quiet")
    return path


@pytest.fixture
def run_arguments(folder: Path) -> list[object]:
    return [folder / "tiny.toml", "--runs", folder / "runs"]


# --- run -----------------------------------------------------------------------------------------------------


def test_the_json_of_a_run_has_what_others_read(tmp_path: Path):
    pipeline = write_toml(tmp_path / "tiny.toml", tiny_tree())
    document = call_json("run", pipeline, "--runs", tmp_path / "runs")
    stages = document["stages"]
    assert list(stages) == STAGES
    for stage in stages.values():
        assert stage["status"] == "ran"
        assert stage["reason"] == "no output yet"
        assert stage["seconds"] > 0
        assert (Path(stage["output"]) / "manifest.json").exists()
    assert set(stages["preprocess"]) >= {"samples", "rejected"}
    assert sum(stages["preprocess"]["samples"].values()) + stages["preprocess"]["rejected"] == 2400
    segregate = stages["segregate"]
    assert set(segregate) >= {"hot_samples", "cold_samples", "hot_rows", "bytes", "lambda"}
    assert segregate["hot_samples"] + segregate["cold_samples"] == stages["preprocess"]["samples"]["train"]
    assert segregate["bytes"] == segregate["hot_rows"] * (4 * 4 + 4 + 16)
    train = stages["train"]
    for split in ("test", "val"):
        assert set(train[split]) >= {"auc", "logloss", "ne", "calibration", "accuracy"}
        assert all(math.isfinite(value) for value in train[split].values())
    assert set(train) >= {
        *("samples_seen", "samples_dropped", "drop_asked", "drop_achieved", "threshold"),
        *("samples_per_second", "bytes_per_tier"),
    }
    assert train["samples_seen"] + train["samples_dropped"] == stages["preprocess"]["samples"]["train"]
    assert train["drop_asked"] == 0.3


def test_a_second_run_skips_everything_and_says_why(run_arguments: list[object]):
    stages = call_json("run", *run_arguments)["stages"]
    assert {stage["status"] for stage in stages.values()} == {"skipped"}
    assert {stage["reason"] for stage in stages.values()} == {"up to date: same config, inputs and seed"}
    assert {stage["seconds"] for stage in stages.values()} == {0}


def test_stdout_is_the_answer_and_the_rest_goes_to_stderr(run_arguments: list[object]):
    result = call("run", *run_arguments)
    assert "AUC" in result.stdout and "hot rows" in result.stdout
    assert "skipped" not in result.stdout
    for stage in STAGES:
        assert f"· {stage}" in result.stderr
    assert "\x1b[" not in result.stdout + result.stderr
    quiet = call("run", *run_arguments, "--quiet")
    assert (quiet.stdout, quiet.stderr) == ("", "")


def test_one_override_runs_what_depends_on_it(run_arguments: list[object]):
    stages = call_json("run", *run_arguments, "--set", "train.lr=0.03")["stages"]
    assert [name for name, stage in stages.items() if stage["status"] == "ran"] == ["train"]
    assert "train.lr" in stages["train"]["reason"]


def test_the_stages_can_be_called_one_by_one(tmp_path: Path):
    arguments = [write_toml(tmp_path / "tiny.toml", tiny_tree()), "--runs", tmp_path / "runs"]
    assert "no output for this pipeline yet" in call("train", *arguments, expect=1).stderr
    assert list(call_json("preprocess", *arguments)["stages"]) == ["generate", "preprocess"]
    error = call("train", *arguments, expect=1).stderr
    assert "hint: run `slipstream segregate` first" in error
    assert [s["status"] for s in call_json("segregate", *arguments)["stages"].values()][-2:] == ["ran", "ran"]
    assert call_json("train", *arguments)["stages"]["train"]["status"] == "ran"
    table = call("profile", *arguments).stdout
    assert "hot-set curve" in table and "sample-aware" in table


def test_force_runs_one_stage_again(run_arguments: list[object]):
    stages = call_json("profile", *run_arguments, "--force")["stages"]
    assert stages["profile"]["status"] == "ran"
    assert stages["profile"]["reason"] == "forced"
    assert stages["preprocess"]["status"] == "skipped"


# --- plan, check, show, clean --------------------------------------------------------------------------------


def test_plan_says_what_would_run_and_changes_nothing(folder: Path, run_arguments: list[object]):
    before = sorted(folder.rglob("*"))
    plans = call_json("plan", *run_arguments, "--set", "segregate.hot_budget=40%")
    assert [(plan["stage"], plan["run"]) for plan in plans] == [(name, name in STAGES[3:]) for name in STAGES]
    assert plans[3]["reason"] == "config changed: hot_budget 20% -> 40%"
    table = call("plan", *run_arguments).stdout
    assert table.count("skip") == 5
    assert sorted(folder.rglob("*")) == before


def test_plan_tells_long_runs_in_minutes_and_hours(tmp_path: Path):
    for samples, shown in [(200_000, " s "), (100_000_000, " min "), (10**10, " h ")]:
        plan = call("plan", "tiny", "--runs", tmp_path, "--set", f"dataset.num_samples={samples}").stdout
        assert shown in plan.splitlines()[-1]


def test_check_prints_the_pipeline_with_every_default(folder: Path):
    assert call("check", folder / "tiny.toml").stdout.endswith("ok, run `tiny_test`\n")
    document = call_json("check", folder / "tiny.toml", "--set", "train.epochs=3")
    assert document["train"]["epochs"] == 3
    assert document["train"]["eps"] == 1e-8
    assert document["dataset"]["source"] == "synthetic"


@pytest.mark.parametrize("stage", STAGES)
def test_show_prints_an_artifact(run_arguments: list[object], stage: str):
    output = call_json("run", *run_arguments)["stages"][stage]["output"]
    manifest = call_json("show", output)
    assert manifest["stage"] == stage
    assert manifest["slipstream"] == __version__
    text = call("show", output).stdout
    assert stage in text and "outputs" in text


@pytest.mark.parametrize("columns", [None, "60", "80"])
def test_piped_tables_fit_columns_and_end_without_blanks(
    run_arguments: list[object], monkeypatch: pytest.MonkeyPatch, columns: str | None
):
    output = call_json("run", *run_arguments)["stages"]
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    shown = [call("show", *(stage["output"] for stage in output.values())).stdout, call("plan", *run_arguments).stdout]
    shown.append(call("profile", *run_arguments).stdout)
    lines = "".join(shown).splitlines()
    assert all(line == line.rstrip() for line in lines)
    assert "…" not in "".join(lines), "nothing is cut"
    paths = [line for line in lines if str(run_arguments[-1]) in line]  # a path is never broken
    assert columns is None or max(len(line) for line in lines if line not in paths) <= int(columns)


def test_show_is_written_for_people(run_arguments: list[object]):
    output = call_json("run", *run_arguments)["stages"]
    text = " ".join(call("show", *(stage["output"] for stage in output.values())).stdout.split())
    assert "samples train 2,058; val 171; test 171" in text
    assert re.search(r"bytes per tier hot [0-9.]+ (B|[KM]iB);", text)
    assert re.search(r"test AUC 0\.[0-9]{4}, logloss", text)
    assert not re.search(r"[{}\[\]']|None|[0-9]\.[0-9]{6}", text), "no Python in it, no more digits than anybody reads"


def test_a_shipped_pipeline_wins_over_what_is_called_like_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "avazu").mkdir()
    arguments = ["--set", "dataset.raw=log.csv"]
    assert call_json("check", "avazu", *arguments)["name"] == "avazu"
    write_toml(tmp_path / "avazu.toml", tiny_tree())
    assert call_json("check", "avazu.toml")["name"] == "tiny_test", "a file is named by its file name"


def complete(*words: str) -> list[str]:
    """What a bash shell is offered for the last word."""
    environment = {
        "_SLIPSTREAM_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    done = CliRunner().invoke(app, [], prog_name="slipstream", env=environment)
    return done.stdout.split()


def test_the_shell_completes_commands_options_and_pipelines():
    assert complete("slipstream", "pre") == ["preprocess"]
    assert "--runs" in complete("slipstream", "run", "--r")
    assert complete("slipstream", "run", "criteo") == ["criteo_kaggle", "criteo_terabyte"]


def test_clean_removes_what_a_killed_process_left(folder: Path, run_arguments: list[object]):
    left = folder / "runs" / "tiny_test" / "train" / ".0123456789abcdef.partial"
    left.mkdir()
    result = call("clean", *run_arguments)
    assert result.stdout == "2 folders removed\n", "of the killed process, and of parsed numbers"
    assert call("clean", *run_arguments).stdout == "0 folders removed\n"
    assert str(left) in result.stderr
    assert not left.exists()


def test_the_version_is_one_line():
    assert call("--version").stdout == f"slipstream {__version__}\n"


def test_no_command_shows_help():
    result = CliRunner().invoke(app, [])
    assert "Usage:" in result.stdout + result.stderr
    assert "preprocess" in result.stdout + result.stderr


def test_warnings_stand_in_the_report_and_in_json(tmp_path: Path):
    lines = make_lines(2100)
    # what clicks in training does not click in the days held out
    flipped = [(b"1" if line.startswith(b"0") else b"0") + line[1:] for line in lines[1800:]]
    raw = write_raw(tmp_path / "log", [*lines[:1800], *flipped])
    arguments = [write_pipeline(tmp_path / "run.toml", raw), "--runs", tmp_path / "runs"]
    arguments += ["--set", "train.epochs=4", "--set", "train.batch_size=64", "--set", "train.lr=0.1"]
    [*warnings] = call_json("run", *arguments)["warnings"]
    assert [text.partition(" is ")[0] for text in warnings] == ["train: NE of split test", "train: NE of split val"]
    shown = " ".join(call("run", *arguments).stdout.split())
    assert all(f"warning: {text}" in shown for text in warnings)
    assert warnings[0] in call("run", *arguments, "--quiet").stderr


@pytest.mark.parametrize(
    ("criterion", "scope", "shown"),
    [
        ("random", "all", "samples classified"),
        ("random", "hot", "hot samples classified"),
        ("stale", "all", "hot samples classified"),
    ],
)
def test_the_report_says_which_samples_were_classified(
    run_arguments: list[object], criterion: str, scope: str, shown: str
):
    chosen = ["--set", f"skip.criterion={criterion}", "--set", f"skip.scope={scope}"]
    text = " ".join(call("run", *run_arguments, *chosen).stdout.split())
    assert re.search(rf"asked 30\.0% of [\d,]+ {shown}", text), text


def test_what_is_undefined_is_called_so(tmp_path: Path):
    lines = make_lines(2100)
    raw = write_raw(tmp_path / "log", [*lines[:1800], *(b"1" + line[1:] for line in lines[1800:])])
    arguments = [write_pipeline(tmp_path / "run.toml", raw), "--runs", tmp_path / "runs"]
    assert "AUC undefined" in call("run", *arguments).stdout
    assert call_json("run", *arguments)["stages"]["train"]["test"]["auc"] is None


# --- exit codes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "no/such.toml"], 2, "expected a pipeline file"),
        (["run", "nosuch"], 2, "hint: shipped pipelines: "),
        (["run", "{pipeline}", "--set", "train.epoch=2"], 2, "did you mean `train.epochs`?"),
        (["run", "{pipeline}", "--set", "train.epochs"], 2, "expected `--set key=value`"),
        (["run", "{pipeline}", "--set", "train.epochs=true"], 2, "`train.epochs` must be int"),
        (["check", "{pipeline}", "--set", "segregate.hot_budget=0"], 2, "expected a budget above 0 bytes"),
        (["run", "{pipeline}", "--no-such-option"], 2, "No such option"),
        (["nosuch"], 2, "No such command"),
        (["run", "{pipeline}", "--runs", "{runs}", "--set", "segregate.hot_budget=100"], 1, "OOV rows"),
        (["run", "{pipeline}", "--set", "dataset.source=criteo", "--set", "dataset.raw=/no/file"], 1, "/no/file"),
        (["train", "{pipeline}", "--runs", "{empty}"], 1, "hint: run `slipstream preprocess` first"),
        (["show", "{empty}"], 1, "expected a published artifact"),
    ],
)
def test_expected_failures_are_two_lines_and_a_code(
    folder: Path, tmp_path: Path, arguments: list[str], code: int, message: str
):
    places = {"pipeline": folder / "tiny.toml", "runs": folder / "runs", "empty": tmp_path}
    result = call(*(argument.format(**places) for argument in arguments), expect=code)
    assert message in result.stderr
    assert result.stdout == ""


def test_an_interruption_is_130(run_arguments: list[object], monkeypatch: pytest.MonkeyPatch):
    import slipstream.pipeline

    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(slipstream.pipeline, "run_pipeline", interrupt)
    assert "the same command goes on from them" in call("run", *run_arguments, expect=130).stderr


def test_the_unexpected_keeps_its_traceback(run_arguments: list[object], monkeypatch: pytest.MonkeyPatch):
    import slipstream.pipeline

    def fail(*args: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(slipstream.pipeline, "run_pipeline", fail)
    with pytest.raises(ZeroDivisionError):
        call("run", *run_arguments)


def test_an_altered_artifact_is_named_with_the_stage_to_run(tmp_path: Path):
    arguments = [write_toml(tmp_path / "tiny.toml", tiny_tree()), "--runs", tmp_path / "runs"]
    output = Path(
        call_json("segregate", *arguments[:1], "--runs", _preprocessed(arguments))["stages"]["segregate"]["output"]
    )
    shard = next((output / "cold").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    error = call("train", *arguments, expect=1).stderr
    assert f"cold/{shard.name}" in error
    assert str(output) in error
    assert "slipstream segregate --force" in error


@pytest.fixture
def altered_model(folder: Path, tmp_path: Path) -> tuple[list[object], Path]:
    """Arguments of a finished run whose model was altered, and the model."""
    runs = Path(shutil.copytree(folder / "runs", tmp_path / "runs"))
    arguments = [folder / "tiny.toml", "--runs", runs]
    model = Path(call_json("run", *arguments)["stages"]["train"]["output"]) / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    return arguments, model


def test_run_show_and_plan_tell_an_altered_model(altered_model: tuple[list[object], Path]):
    arguments, model = altered_model
    for error in (
        call("run", *arguments, expect=1).stderr,
        call("show", model.parent, expect=1).stderr,
        call("check", *arguments, "--files", expect=1).stderr,
    ):
        assert "model.safetensors" in error
        assert "--force" in error
    assert "altered or removed" in call("plan", *arguments).stdout
    call("train", *arguments, "--force", "--quiet")
    call("run", *arguments)
    call("show", model.parent)


def test_check_with_files_finds_what_size_and_time_hide(altered_model: tuple[list[object], Path]):
    arguments, model = altered_model
    os.utime(model, ns=(0, 0))
    call("run", *arguments)
    error = call("check", *arguments, "--files", expect=1).stderr
    assert "train: `model.safetensors` altered" in error
    assert "segregate: unaltered" in error


def test_check_with_files_is_content_with_what_was_published(folder: Path, run_arguments: list[object], tmp_path: Path):
    assert "train: unaltered" in call("check", *run_arguments, "--files").stderr
    assert "nothing is published" in call("check", run_arguments[0], "--runs", tmp_path, "--files").stderr


def _preprocessed(arguments: list[object]) -> object:
    call("preprocess", *arguments, "--quiet")
    return arguments[-1]


def test_the_module_runs_like_the_console_script():
    done = subprocess.run(
        [sys.executable, "-m", "slipstream", "check", "--set", "nosuch=1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown key `nosuch`\n\nhint: ")


# --- several ranks -------------------------------------------------------------------------------------------


def test_what_every_rank_would_do_again_is_refused(monkeypatch: pytest.MonkeyPatch):
    world = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    result = call("plan", "tiny", expect=2)
    assert "`slipstream plan` is for one process, and WORLD_SIZE says that there are 2" in result.stderr
    monkeypatch.delenv("MASTER_PORT")  # some clusters set one or two of them for everything
    call("check", "tiny")
