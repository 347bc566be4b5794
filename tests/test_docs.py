"""What the documents show works: commands parse, pipelines load, examples run, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main

from slipstream.cli import app
from slipstream.config import build_pipeline, load_pipeline
from slipstream.pipeline import run_pipeline

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "slipstream/io/README.md"]
)
SHELL = {"sh", "bash", "console"}


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "docs/generate_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_blocks(page: str, *languages: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [body for kind, body in re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S) if kind in languages]


def shell_words(program: str) -> list[Any]:
    found = []
    for page in PAGES:
        for block in code_blocks(page, *SHELL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words and words[0].removeprefix(".venv/bin/") == program:
                    found.append(pytest.param(words[1:], id=f"{page}: {' '.join(words)}"))
    return found


def shown_pipelines() -> Iterator[tuple[str, str]]:
    """(page, text) of every TOML block; one that begins with `# name.toml` is a whole file of that name."""
    for page in PAGES:
        for block in code_blocks(page, "toml"):
            yield page, block


@pytest.fixture
def folder_with_shown_pipelines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    for _, text in shown_pipelines():
        if named := re.match(r"# ([\w./-]+\.toml)\n", text):
            (tmp_path / named[1]).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_reference_is_what_make_docs_writes() -> None:
    pages = load_generator().pages()
    assert len(pages) == 3
    for name, text in pages.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, f"docs/{name}: run `make docs`"


def test_every_config_key_is_in_the_reference() -> None:
    page = (ROOT / "docs/reference/config.md").read_text(encoding="utf-8")
    keys = load_generator().config_keys()
    assert len(keys) > 40
    assert [key for key in keys if f"`{key}`" not in page] == []


@pytest.mark.parametrize("words", shell_words("slipstream"))
def test_every_slipstream_command_shown_parses(words: list[str], folder_with_shown_pipelines: Path) -> None:
    group = typer.main.get_group(app)
    name, *arguments = words
    if name.startswith("--"):
        assert name in {"--help", "--version", "--install-completion"}
        return
    context = group.commands[name].make_context(name, arguments)
    if "pipeline" in context.params:
        # the same look-up as the command line's, which accepts names of shipped pipelines
        given = context.params["pipeline"]
        path = Path(given) if given.endswith(".toml") else ROOT / "pipelines" / f"{given}.toml"
        load_pipeline(path, context.params["overrides"])


@pytest.mark.parametrize("words", shell_words("make"))
def test_every_make_verb_shown_exists(words: list[str]) -> None:
    verbs = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert {word for word in words if "=" not in word} <= set(verbs)


@pytest.mark.parametrize(("page", "text"), [pytest.param(*item, id=item[0]) for item in shown_pipelines()])
def test_every_toml_block_shown_is_valid(page: str, text: str) -> None:
    tree = tomllib.loads(text)
    if "name" in tree:
        build_pipeline(tree)
        return
    dataset = {"source": "synthetic"} | tree.pop("dataset", {})
    build_pipeline({"name": "shown", "dataset": dataset, **tree})


@pytest.mark.parametrize("page", [page for page in PAGES if code_blocks(page, "python")])
def test_the_python_examples_of_a_page_run_one_after_another(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for text in code_blocks(page, "python"):
        exec(compile(text, page, "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link.split("#")[0]).exists()]
    assert missing == []


def test_every_test_that_holds_a_fault_exists() -> None:
    page = (ROOT / "docs/faults.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    lines = [
        line for line in page.splitlines() if line.startswith("| ") and not line.startswith(("| fault", "| change"))
    ]
    assert len(named) == len(lines), "a test beside every fault"
    for file, name in named:
        assert re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.M), f"{file}::{name}"


def test_every_file_that_a_run_publishes_is_described(tmp_path: Path) -> None:
    page = (ROOT / "slipstream/io/README.md").read_text(encoding="utf-8")
    overrides = ["dataset.num_samples=2000", "segregate.hot_budget=50%", "train.log_every=1"]
    result = run_pipeline(load_pipeline(ROOT / "pipelines/tiny.toml", overrides), tmp_path)
    described = set(re.findall(r"`([\w.*/{},<>-]+)`", page))
    for name, stage in result.stages.items():
        for field in stage.artifact.manifest:
            assert f"`{field}`" in page, f"field {field} of manifest.json"
        for file in stage.artifact.manifest["outputs"]:
            pattern = re.sub(r"cat_\d+", "<table>", re.sub(r"part-\d+", "part-*", file))
            pattern = "events/*" if pattern.startswith("events/") else pattern
            assert f"{name}/{pattern}" in described, f"{file} of stage {name}"


def test_lines_of_the_log_fit_120_columns():
    lines = (ROOT / "docs/log.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120] == []
