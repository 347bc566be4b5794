"""Questions about hardware, answered from a profile: against the hot sets that the pipeline then chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from strategies import tiny_config

from slipstream.errors import ArtifactError, CapacityError, ConfigError
from slipstream.io.figures import CurveFigures
from slipstream.pipeline import run_pipeline
from slipstream.report.sizes import sizes_table
from slipstream.sizing.answers import Answer, Asked, Sizes, read_questions, size_pipeline

CURVE = [0.05, 0.1, 0.2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes")
    run_pipeline(config(), folder, stages=["preprocess", "profile"])
    return folder


def config(**overrides: Any) -> Any:
    return tiny_config(profile__curve=CURVE, **overrides)


def ask(runs: Path, *, overrides: dict[str, Any] | None = None, **questions: list[str]) -> Sizes:
    return size_pipeline(config(**(overrides or {})), runs, read_questions(**questions))


def by_policy(sizes: Sizes) -> dict[str, Answer]:
    return {answer.policy: answer for answer in sizes.answers if answer.asked.kind != "mode"}


@pytest.mark.parametrize("policy", ["frequency", "sample-aware"])
def test_a_budget_serves_what_the_hot_set_of_that_budget_does(runs: Path, policy: str):
    told = by_policy(ask(runs, budgets=["20%"]))[policy]
    chosen_by = config(segregate__policy=policy, segregate__hot_budget="20%")
    result = run_pipeline(chosen_by, runs, stages=["profile", "segregate"])
    chosen = result.counts("segregate")
    assert told.served.hot_rows == chosen["hot_rows"]
    assert told.served.hit_ratio == pytest.approx(chosen["hit_ratio"], abs=1e-9)
    assert told.served.hot_sample_share == pytest.approx(chosen["hot_sample_share"], abs=1e-9)
    assert told.budget_bytes == chosen["hot_rows"] * (4 * 4 + 4 + 16)
    if policy == "frequency":
        assert told.served.access_threshold == chosen["lambda"]


def test_the_budget_that_answers_a_hit_ratio_has_it_when_it_is_chosen(runs: Path):
    told = by_policy(ask(runs, hit_ratios=["60%"]))["frequency"]
    result = run_pipeline(config(segregate__hot_budget=told.budget_bytes), runs, stages=["segregate"])
    assert 0.6 <= result.counts("segregate")["hit_ratio"] < 0.6017


def test_the_rows_that_fit_a_device_are_all_that_fit(runs: Path):
    least = ask(runs, budgets=["5%"]).answers[0]
    memory = least.device_bytes + 3000
    told = by_policy(ask(runs, device_memories=[str(memory)]))["frequency"]
    assert told.device_bytes <= memory < told.device_bytes + 40, "not one row more"
    assert told.served.hot_rows > least.served.hot_rows


def test_a_device_that_holds_everything_makes_every_row_hot(runs: Path):
    sizes = ask(runs, device_memories=["80GB"])
    answer = by_policy(sizes)["frequency"]
    assert (answer.served.hot_rows, answer.served.hot_sample_share) == (sizes.num_rows, 1.0)


def test_a_device_too_small_for_anything_is_refused_with_what_it_takes(runs: Path):
    with pytest.raises(CapacityError, match=r"with the OOV rows alone hot, training takes .* there") as caught:
        ask(runs, device_memories=["1MB"])
    assert "train.batch_size" in str(caught.value.hint)


def test_several_questions_are_answered_in_order_and_bounded_by_all_and_nothing(runs: Path):
    sizes = ask(runs, hit_ratios=["50%, 60%"], hot_samples=["0.05"], budgets=["10%"])
    asked = [(answer.asked.kind, answer.asked.text) for answer in sizes.answers[::2]]
    assert asked == [
        *(("hit ratio", "50%"), ("hit ratio", "60%"), ("hot samples", "0.05"), ("budget", "10%")),
        ("mode", "resident"),
    ]
    resident, baseline = sizes.answers[-2:]
    assert resident.served.hit_ratio == 1 and resident.host["cold rows"] < 100, "spare ones alone"
    assert baseline.served.hit_ratio == 0 and "hot rows" not in baseline.device
    plain = sizes.to_json()
    assert plain["answers"][0]["device_bytes"] == sum(plain["answers"][0]["device"].values())


def test_cold_rows_in_a_file_are_disk_and_leave_the_memory_of_the_host(runs: Path):
    in_memory, in_file = (ask(runs, overrides=o) for o in ({}, {"train__cold_path": "a folder never made"}))
    for before, after in zip(in_memory.answers, in_file.answers, strict=True):
        assert before.device == after.device and before.disk == {}
        if after.asked.text == "resident":
            assert after.host == before.host and after.disk == {}
        else:
            assert after.disk == {name: before.host[name] for name in ("cold rows", "optimizer state")}
            assert before.host_bytes - after.host_bytes == after.disk_bytes
    assert in_file.to_json()["answers"][0]["disk_bytes"] == in_file.answers[0].disk_bytes
    shown = Console(width=200)
    with shown.capture() as captured:
        shown.print(sizes_table(in_file))
    assert "disk's file" in captured.get()
    assert not Path("a folder never made").exists()


def test_nothing_asked_asks_about_the_budget_of_the_pipeline(runs: Path):
    sizes = ask(runs, overrides={"segregate__hot_budget": "15%"})
    assert {answer.asked.text for answer in sizes.answers[:2]} == {"15%"}


def test_other_modes_are_sized_as_if_they_had_a_hot_set(runs: Path):
    assert ask(runs, overrides={"train__mode": "resident"}, budgets=["10%"]).mode == "fae"


def test_without_a_profile_it_says_what_to_run_or_runs_it(tmp_path: Path):
    with pytest.raises(ArtifactError, match="expected a profile of `tiny_test`") as caught:
        size_pipeline(config(), tmp_path, [])
    assert "add --profile, or run `slipstream preprocess` and `slipstream profile`" in str(caught.value.hint)
    assert not list(tmp_path.glob("*/*/*"))
    ran = []
    size_pipeline(config(), tmp_path, [], profiles=True, on_stage=lambda stage: ran.append(stage.stage))
    assert ran == ["generate", "preprocess", "profile"]


def test_the_published_order_is_refused_by_name(runs: Path):
    with pytest.raises(ConfigError, match=r"train\.faithful"):
        ask(runs, overrides={"train__mode": "fae", "train__faithful": True})


@pytest.mark.parametrize(
    ("questions", "expected"),
    [
        ({"hit_ratios": ["95"]}, "`--hit-ratio` must be a share such as 95% or 0.95, found '95'"),
        ({"hot_samples": ["most"]}, "`--hot-samples` must be a share"),
        ({"hit_ratios": ["nan"]}, "`--hit-ratio` must be a share"),
        ({"budgets": ["0%"]}, "`--budget`: expected a share above 0%"),
        ({"budgets": ["16 pounds"]}, "`--budget`: expected a size"),
        ({"device_memories": ["80 GB,"]}, "`--device-memory`: expected a size"),
    ],
)
def test_a_question_that_is_none_names_the_option(questions: dict[str, list[str]], expected: str):
    with pytest.raises(ConfigError, match=expected.replace("(", r"\(")):
        read_questions(**questions)


def test_one_text_may_hold_several_questions():
    assert read_questions(hit_ratios=["90%,0.95"], device_memories=["1KB", "2KB"]) == [
        Asked(kind="hit ratio", text="90%", value=0.9),
        Asked(kind="hit ratio", text="0.95", value=0.95),
        Asked(kind="device memory", text="1KB", value=1000),
        Asked(kind="device memory", text="2KB", value=2000),
    ]


def test_what_was_measured_beyond_the_curve_is_told_apart(runs: Path):
    points = [CurveFigures(**point) for point in run_pipeline(config(), runs, stages=[]).counts("profile")["curve"]]
    largest = max(point.hot_rows for point in points)
    for answer in ask(runs, budgets=["10%", "50%"]).answers[:4]:
        assert answer.served.is_within_curve == (answer.served.hot_rows <= largest)
