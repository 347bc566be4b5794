"""From a table to a model: `slipstream init` guesses, and the guide's commands lead from a CSV file to scores."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from slipstream.cli import app
from slipstream.config import load_pipeline
from slipstream.dataset_schema import ListColumn
from slipstream.errors import ConfigError, DataError
from slipstream.init import write_pipeline

GUIDE = Path(__file__).parent.parent / "docs/guides/from_my_csv.md"


def write_ratings(path: Path, *, num_ratings: int = 6000) -> None:
    """Ratings like MovieLens 1M's: users and films have tastes and qualities, time goes on, films have genres."""
    rng = np.random.default_rng(7)
    users, films = rng.integers(1, 201, num_ratings), rng.integers(1, 151, num_ratings)
    quality, mood = rng.normal(0, 1.2, 151), rng.normal(0, 0.8, 201)
    ratings = np.clip(np.rint(3.4 + quality[films] + mood[users] + rng.normal(0, 0.4, num_ratings)), 1, 5).astype(int)
    times = 956_703_932 + np.cumsum(rng.integers(1, 2_000, num_ratings))
    genres = ["Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Drama", "Romance", "Sci-Fi", "War"]
    genres_of = ["|".join(rng.choice(genres, rng.integers(1, 5), replace=False)) for _ in range(151)]
    pl.DataFrame(
        {
            "user_id": users,
            "movie_id": films,
            "rating": ratings,
            "timestamp": times,
            "genres": [genres_of[film] for film in films],
        }
    ).write_csv(path)


def shell_words(word: str) -> list[str]:
    """A word as a shell expands it: `*` stands for no hidden file."""
    return [str(path) for path in Path().glob(word) if path.name[0] != "."] if "*" in word else [word]


def guess_kinds(path: Path, text: str, **options: str) -> dict[str, str]:
    path.write_text(text, encoding="utf-8")
    guess = write_pipeline(str(path), out=path.with_suffix(".toml"), **options)
    load_pipeline(guess.path)
    return {column.name: column.kind for column in guess.columns}


def test_the_guide_leads_from_a_csv_file_to_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_ratings(tmp_path / "ratings.csv")
    page = GUIDE.read_text(encoding="utf-8")
    commands = [line for block in re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S) for line in block.splitlines()]
    verbs = []
    for command in commands:
        program, verb, *arguments = shlex.split(command)
        assert program == "slipstream"
        found = [name for word in arguments for name in shell_words(word)]
        done = CliRunner().invoke(app, [verb, *found])
        assert done.exit_code == 0, (command, done.output)
        verbs.append(verb)
    assert verbs == ["init", "run", "score"]
    (shown,) = re.findall(r"^```toml\n(.*?)^```", page, re.M | re.S)
    assert shown == (tmp_path / "ratings.toml").read_text(encoding="utf-8")
    scores = pl.read_parquet("scores.parquet")
    assert scores.height == 6001
    assert scores.row(0, named=True)["reason"] == "header line"
    ratings = pl.read_csv("ratings.csv")
    assert scores["movie_id"][1:].to_list() == ratings["movie_id"].cast(pl.String).to_list()
    is_liked = ratings["rating"] >= 4
    liked, others = (scores["probability"][1:].filter(mask).mean() for mask in (is_liked, ~is_liked))
    assert isinstance(liked, float) and isinstance(others, float)
    assert liked > others + 0.1


def test_ratings_are_scored_without_their_label_as_with_it(tmp_path: Path):
    write_ratings(tmp_path / "ratings.csv", num_ratings=1500)
    guess = write_pipeline(str(tmp_path / "ratings.csv"), out=tmp_path / "p.toml")
    run = CliRunner().invoke(app, ["run", str(guess.path), "--runs", str(tmp_path / "runs"), "--quiet"])
    assert run.exit_code == 0, run.output
    ratings = pl.read_csv(tmp_path / "ratings.csv")
    ratings.drop("rating").write_csv(tmp_path / "bare.csv")
    ratings.drop("rating").write_parquet(tmp_path / "bare.parquet")
    (model,) = (tmp_path / "runs/ratings/train").glob("[0-9a-f]*")
    found = []
    for name in ("ratings.csv", "bare.csv", "bare.parquet"):
        out = tmp_path / "out.csv"
        arguments = ["--raw", str(tmp_path / name), "--out", str(out), "--keep", "genres", "--quiet"]
        done = CliRunner().invoke(app, ["score", str(model), *arguments])
        assert done.exit_code == 0, done.output
        found.append(pl.read_csv(out).select("probability", "genres").filter(pl.col("probability").is_not_null()))
    assert found[0].height == 1500
    assert found[0].equals(found[1])
    assert found[0].equals(found[2])


def test_kinds_follow_names_and_values(tmp_path: Path):
    rng = np.random.default_rng(0)
    header = "request;clicked;ad_id;price;age;country;when;constant"
    lines = [
        f"r{at:05d};{at % 3 == 0:d};{rng.integers(50)};{rng.random():.4f};{rng.integers(100)};"
        f"{['CH', 'FR'][at % 2]};2024-05-{1 + at // 10:02d} 10:00:00;x"
        for at in range(200)
    ]
    kinds = guess_kinds(tmp_path / "log.csv", "\n".join([header, *lines]) + "\n")
    assert kinds == {
        "request": "keep",
        "clicked": "label",
        "ad_id": "sparse",
        "price": "dense",
        "age": "dense",
        "country": "sparse",
        "when": "time",
        "constant": "left out",
    }
    config = load_pipeline(tmp_path / "log.toml")
    assert config.dataset.separator == ";"
    assert (config.preprocess.split, config.dataset.columns.period) == ("by_time", "day")


def test_lists_are_known_by_their_separator_and_by_values_that_come_back(tmp_path: Path):
    rng = np.random.default_rng(0)
    topics = [f"t{at}" for at in range(12)]
    lines = ["clicked\tgenres\ttopics\ttags\tcity\ttitle"]
    for at in range(300):
        genres = "|".join(["Drama", "Comedy", "War"][: at % 4])
        drawn = [rng.choice(topics, rng.integers(1, 6), replace=False) for _ in range(2)]
        city = ["Paris, FR", "Bern, CH", "Bonn, DE", "Bern"][at % 4]
        lines.append(f"{at % 2}\t{genres}\t{', '.join(drawn[0])}\t{' '.join(drawn[1])}\t{city}\tThe film {at % 90}")
    kinds = guess_kinds(tmp_path / "log.tsv", "\n".join(lines) + "\n")
    assert kinds == {
        "clicked": "label",
        "genres": "list",
        "topics": "list",
        "tags": "list",
        "city": "sparse",
        "title": "sparse",
    }
    assert load_pipeline(tmp_path / "log.toml").dataset.columns.lists == {
        "genres": ListColumn(separator="|", length=3),
        "topics": ListColumn(separator=", ", length=5),
        "tags": ListColumn(separator=" ", length=5),
    }


def test_a_file_without_header_gets_names(tmp_path: Path):
    kinds = guess_kinds(tmp_path / "log.tsv", "1\ta\t2.5\n0\tb\t3.5\n1\ta\t4.5\n")
    assert kinds == {"column_0": "label", "column_1": "sparse", "column_2": "dense"}
    assert load_pipeline(tmp_path / "log.toml").dataset.names == ("column_0", "column_1", "column_2")


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        ("", {}, DataError, "has no lines"),
        ("a,b\n", {}, DataError, "a header and no lines"),
        ("one\ntwo\n", {}, DataError, "one field a line"),
        ("a,b\nx,y\n", {}, ConfigError, "no column shows that it is the label"),
        ("a,b\nx,y\n", {"label": "c"}, ConfigError, "expected --label to name a column, found `c`"),
        ("a,b\nx,y\n", {"label": "b"}, ConfigError, "column `b` cannot be the label"),
    ],
)
def test_what_cannot_be_guessed_is_asked_for(
    tmp_path: Path, text: str, options: dict[str, str], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        guess_kinds(tmp_path / "x.csv", text, **options)


def test_a_pipeline_file_is_never_overwritten(tmp_path: Path):
    (tmp_path / "p.toml").write_text("mine")
    (tmp_path / "x.csv").write_text("label,b\n1,y\n0,z\n")
    with pytest.raises(ConfigError, match="is there already"):
        write_pipeline(str(tmp_path / "x.csv"), out=tmp_path / "p.toml")
    assert (tmp_path / "p.toml").read_text() == "mine"
