"""The architecture, held: who imports whom, what starts fast, what is documented."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer.main

import slipstream
from slipstream.cli import app
from slipstream.config import PipelineConfig
from slipstream.models.registry import MODELS
from slipstream.stage_list import STAGES

PACKAGE = Path(slipstream.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

MAY_IMPORT = {
    "__main__": {"cli"},
    "api": {"pipeline", "report", "serving", "options", "config", "shipped", "io", "errors", "progress"},
    "cli": {
        "cli",
        "distributed.environment",
        "init",
        "shipped",
        "forecast",
        "sizing",
        "evidence",
        "tune",
        "reproduce",
        "compare",
        "stage",
        "stage_list",
        "report",
        "pipeline",
        "config",
        "options",
        "errors",
        "io",
        "progress",
        "schema",
    },
    "report": {
        *("report", "init", "tune", "compare", "sizing", "reproduce", "stage", "pipeline", "config", "options"),
        *("io", "ops", "errors", "progress", "schema"),
    },
    "tune": {"pipeline", "config", "options", "errors", "io", "progress"},
    "compare": {"pipeline", "training", "config", "errors", "io", "progress", "schema"},
    "init": {"datasets", "io", "ops", "registry", "errors"},
    "forecast": {"pipeline", "stage", "config", "io", "errors"},
    "pipeline": {
        "distributed",
        *("stage", "stage_list", "serving", "stages", "datasets", "io", "ops"),
        *("config", "options", "errors", "progress", "schema"),
    },
    "stage_list": {"errors", "stage", "published", "training.skipping", "io", "config", "options", "progress"},
    "stages": {
        *(
            "wiring",
            "distributed",
            "engine",
            "stage",
            "serving",
            "training",
            "embedding",
            "models",
            "datasets",
            "dataset_schema",
            "preprocess_schema",
            "io",
            "ops",
            "config",
            "options",
            "errors",
            "progress",
            "schema",
        )
    },
    "reproduce": {"stage_list", "stage", "stages", "config", "io", "errors", "progress"},
    "evidence": {"pipeline", "stages", "config", "io", "errors", "progress"},
    "sizing": {
        *("sizing", "wiring", "pipeline", "stage", "training", "models", "config", "options", "io", "ops"),
        *("errors", "progress"),
    },
    "wiring": {"distributed", "training", "embedding", "models", "config", "options", "io", "ops", "errors"},
    "stage": {
        *("distributed", "training.skipping", "embedding.rules"),
        *("config", "options", "io", "ops", "errors", "progress"),
    },
    "serving": {
        *("serving", "training", "embedding", "models", "datasets", "io", "ops"),
        *("registry", "dataset_schema", "errors", "progress", "schema"),
    },
    "training": {
        *("registry", "training", "distributed", "embedding", "models"),
        *("io", "ops", "errors", "progress", "schema"),
    },
    "distributed": {"distributed", "embedding", "options", "errors"},
    "engine": {"engine", "io", "ops", "options", "errors", "progress"},
    "embedding": {"registry", "embedding", "ops", "errors", "schema"},
    "models": {"registry", "models", "options", "ops", "errors", "schema"},
    "datasets": {"registry", "datasets", "io", "ops", "dataset_schema", "errors", "progress", "schema"},
    "io": {"io", "ops", "errors", "schema"},
    "ops": {"ops", "schema"},
    "published": {"training.skipping", "errors"},
    "config": {
        "published",
        "distributed.options",
        "engine.options",
        "skip_config",
        "training.skipping",
        "embedding.rules",
        "models",
        "dataset_schema",
        "preprocess_schema",
        "options",
        "registry",
        "errors",
        "schema",
    },
    "dataset_schema": {"options", "registry", "errors", "schema"},
    "preprocess_schema": {"options"},
    "skip_config": {"training.skipping", "options", "registry", "errors"},
    "options": {"registry", "errors"},
    "registry": {"errors"},
    "shipped": {"errors"},
    "progress": set(),
    "schema": set(),
    "errors": set(),
}
"""From top to bottom; `a.b` is the room `b` of `a` alone."""

HEAVY = {"torch", "polars", "pyarrow"}
TORCH_BELONGS_TO = {"sizing", "wiring", "serving", "distributed", "embedding", "models", "training", "stages"}


def of_every_module(check: Callable[[Path], None]) -> Callable[[], None]:
    """Make one test of a check: it fails with every module that does."""

    def test() -> None:
        failed = []
        for path in MODULES:
            try:
                check(path)
            except AssertionError as error:
                failed.append(f"{name_of(path)}: {error}")
        assert not failed, "\n".join(failed)

    test.__name__ = check.__name__
    return test


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def component(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a module imports, wherever it does so."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@of_every_module
def test_imports_point_one_way(path: Path):
    if path == PACKAGE / "__init__.py":
        return  # the root loads nothing until it is asked for something: see below
    own = component(path)
    assert own in MAY_IMPORT, f"`{own}` has no place in the architecture yet: add it to MAY_IMPORT"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "slipstream":
            continue
        if name == "slipstream.__version__":
            continue
        assert len(parts) > 1 and parts[1] in MAY_IMPORT, f"{name_of(path)} imports `{name}` from the package root"
        is_above = {parts[1], ".".join(parts[1:3])} & MAY_IMPORT[own]
        assert is_above, f"{name_of(path)} must not import `{name}`: {own} stands below"


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").glob("*.py")), ids=name_of)
def test_ops_need_nothing_but_numpy_and_polars(path: Path):
    known = {"slipstream", "numpy", "polars", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imports(path)} <= known


@of_every_module
def test_torch_stays_where_models_are_trained(path: Path):
    if "torch" in {name.split(".")[0] for name in imports(path)}:
        assert component(path) in TORCH_BELONGS_TO


@of_every_module
def test_only_the_command_line_prints_or_exits(path: Path):
    if component(path) == "cli":
        return
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"print", "exit", "quit", "sys.exit", "os._exit", "typer.echo"}, called
            assert not called.startswith(("sys.stdout.", "sys.stderr.")), called
        if isinstance(node, ast.Raise) and node.exc is not None:
            assert "Exit" not in ast.unparse(node.exc), ast.unparse(node.exc)


@pytest.mark.parametrize("folder", ["slipstream", "benchmarks", "docs", "examples", "tests"])
def test_nothing_that_is_read_can_run_code(folder: str):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
                assert ast.unparse(node) == "allow_pickle=False", f"{path}:{node.lineno}"
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) != "torch.load", f"{path}:{node.lineno}"
            if folder != "tests" and isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
                assert not {"pickle", "dill", "joblib", "shelve", "marshal"} & set(names), f"{path}:{node.lineno}"


@of_every_module
def test_every_module_says_what_it_is(path: Path):
    assert ast.get_docstring(parse(path)) or path.name == "__main__.py"


# --- size ----------------------------------------------------------------------------------------------------

MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 500, 80
LONGER = {"datasets/synthetic.py"}
"""Files with one reason to change each."""


@of_every_module
def test_a_file_can_be_read_at_once(path: Path):
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    is_read_at_once = num_lines <= MOST_LINES_OF_A_FILE or name_of(path) in LONGER
    assert is_read_at_once, f"{num_lines} lines: split it by reason to change"


@of_every_module
def test_a_function_fits_a_page(path: Path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert num_lines <= MOST_LINES_OF_A_FUNCTION, f"`{node.name}` has {num_lines} lines"


# --- tests ---------------------------------------------------------------------------------------------------

ACROSS_MODULES = {
    "benchmarks/test_bench_stages.py": "the benchmarks of every stage run",
    "embedding/tiers/test_stream_order.py": "work of two streams, in lookahead, rows and pinned",
    "fuzz/test_readers.py": "every reader, on damaged input",
    "io/test_compressed.py": "every reader of compressed files",
    "io/test_durability.py": "every writer, on a pretended disk that loses power",
    "pipelines/test_kills.py": "a whole run, killed at every stage",
    "pipelines/test_real_criteo.py": "a whole run on the real log",
    "test_wheel.py": "the built wheel in an empty environment",
    "pipelines/test_real_scoring.py": "real logs, scored by models of other real logs",
    "pipelines/test_shipped.py": "the pipelines that are shipped",
    "report/test_html.py": "the HTML pages, from facts to charts",
    "stages/test_altered_inputs.py": "every stage refuses altered files",
    "stages/test_hostile_input.py": "every stage names what is wrong with a log",
    "stages/test_lists.py": "lists of values, through every stage",
    "stages/test_resume.py": "killed stages go on",
    "test_docs.py": "the documents",
    "test_gpu_marker.py": "the marker that chooses tests",
    "test_structure.py": "the architecture",
    "training/skipping/test_stale_rule.py": "the staleness rule, against a plain loop",
    "training/test_capture.py": "steps as CUDA graphs",
    "training/test_on_cuda.py": "whole trainings on a device",
}
"""Test modules that mirror no module, and what they are for."""
TESTS = sorted(path.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py"))


def test_a_test_module_mirrors_a_module():
    """`tests/io/test_raw.py` is for `slipstream/io/raw.py`; `test_raw_remote.py` would be for one side of it.

    The command line is tested as one, from outside.
    """
    alone = [name for name in TESTS if name not in ACROSS_MODULES and not mirrors_a_module(Path(name))]
    assert alone == [], "move these tests to the module they are for, or name them in ACROSS_MODULES"


def mirrors_a_module(name: Path) -> bool:
    own = name.stem.removeprefix("test_")
    # tests/benchmarks mirrors benchmarks/, tests/examples examples/, all else the package
    outside = name.parent.name in ("benchmarks", "examples")
    mirrored = (ROOT if outside else PACKAGE) / name.parent
    stems = [path.stem for path in [*mirrored.glob("*.py"), PACKAGE / "cli"]]
    return any(own == stem or own.startswith(f"{stem}_") for stem in stems)


def test_what_is_named_as_across_modules_is_there():
    assert ACROSS_MODULES.keys() <= set(TESTS)


# --- starting fast -------------------------------------------------------------------------------------------

_START = """
import json, sys
import slipstream
from slipstream.cli import app
for arguments in [None, *json.loads(sys.argv[1])]:
    try:
        if arguments is not None:
            app(arguments)
    except SystemExit as ended:
        assert not ended.code, arguments
    print("LOADED", *sorted({name.split(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def loaded_after(*commands: list[str]) -> list[set[str]]:
    """Packages that one process has loaded with the command line, and after each of several commands."""
    arguments = [sys.executable, "-c", _START, json.dumps(commands)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [set(line.split()[1:]) for line in done.stderr.splitlines() if line.startswith("LOADED ")]


def test_what_needs_no_heavy_package_loads_none():
    helped = [["--help"], ["run", "--help"], ["--version"]]
    checked = [["check"], ["check", "--json"]]
    loaded = loaded_after(*helped, *checked)
    assert len(loaded) == 6 and "typer" in loaded[0]
    assert [HEAVY & packages for packages in loaded] == [set()] * 6
    assert [packages & {"numpy"} for packages in loaded[:4]] == [set()] * 4, "no option of a command needs arrays"


def test_every_model_is_checked_and_planned_without_torch(tmp_path: Path):
    (tmp_path / "log.txt").touch()
    commands = []
    for name in MODELS.names():
        source = next(iter(MODELS.get(name).sources), "criteo")
        settings = [f'model={{name="{name}"}}', f'dataset={{source="{source}", raw="{tmp_path}/log.txt"}}']
        commands.append(["plan", "--runs", str(tmp_path), *(part for each in settings for part in ("--set", each))])
    assert [packages & {"torch"} for packages in loaded_after(*commands)] == [set()] * (1 + len(commands))


# --- the command line ----------------------------------------------------------------------------------------


def test_there_is_one_command_for_every_verb():
    assert set(COMMANDS) >= {
        "run",
        "plan",
        "check",
        "show",
        "clean",
        *(stage.name for stage in STAGES if stage.summary),
    }


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_and_option_explains_itself(name: str):
    command = COMMANDS[name]
    assert command.help
    for parameter in command.params:
        if parameter.name != "help":
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_help_ends_with_an_example_that_parses(name: str):
    command = COMMANDS[name]
    match = re.fullmatch(r"Example: slipstream (.+)", command.epilog or "")
    assert match, f"`{name}` ends with {command.epilog!r}"
    verb, *arguments = shlex.split(match[1])
    assert verb == name
    command.make_context(name, arguments)
    for argument in arguments:
        if argument.endswith(".toml"):
            assert (ROOT / argument).exists(), f"the example of `{name}` names {argument}, which is not there"


def test_golden_options_of_the_command_line(golden_path: Callable[[str], Path], renews_golden: bool):
    lines = []
    for name, command in sorted(COMMANDS.items()):
        for parameter in command.params:
            flags = " ".join([*parameter.opts, *parameter.secondary_opts])
            lines.append(f"{name} {flags} {parameter.metavar or ''}".rstrip())
    path, text = golden_path("cli_options.txt"), "\n".join(lines) + "\n"
    if renews_golden:
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, "new knobs go to TOML; if an option is meant: make golden"


# --- the configuration ---------------------------------------------------------------------------------------


def config_classes(cls: type = PipelineConfig, prefix: str = "") -> Iterator[tuple[str, type]]:
    yield prefix, cls
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from config_classes(hints[field.name], f"{prefix}{field.name}.")  # type: ignore[arg-type]


def test_the_keys_that_others_rely_on_exist():
    keys = {f"{prefix}{field.name}" for prefix, cls in config_classes() for field in dataclasses.fields(cls)}
    assert keys >= {
        *("name", "seed", "dataset.source", "dataset.raw", "segregate.hot_budget", "segregate.policy", "model.name"),
        *("train.mode", "train.device", "train.epochs", "train.batch_size", "train.optimizer", "train.lr"),
        *("skip.criterion", "skip.target_drop", "skip.alpha", "skip.threshold", "skip.refresh_steps"),
    }


def _documented_classes() -> dict[str, ast.ClassDef]:
    found = {}
    with_options = [PACKAGE / "config.py", PACKAGE / "skip_config.py", PACKAGE / "distributed" / "options.py"]
    for path in [*with_options, *(PACKAGE / "models").glob("*.py")]:
        body = parse(path).body
        found |= {node.name: node for node in body if isinstance(node, ast.ClassDef) and node.decorator_list}
    return found


@pytest.mark.parametrize("name", sorted(_documented_classes()))
def test_every_config_key_is_documented_under_its_field(name: str):
    body: list[Any] = _documented_classes()[name].body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and name != "PipelineConfig" and "ClassVar" not in ast.unparse(node):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert is_text and len(str(after.value.value)) > 5, f"{name}.{ast.unparse(node.target)}"
