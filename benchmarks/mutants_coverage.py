"""Which tests run which line, and which of them to try on a change."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutants_forks import SAID, Work, in_forks, run_pytest
from mutants_places import ROOT, Mutant, project_files

NOT_OF_THE_CODE = ("tests/test_structure.py", "tests/test_docs.py", "tests/benchmarks/")
"""Tests that read the code's text, or run what is not part of it, would notice changes for the wrong reason."""
MINUTES_PER_FILE = 30


@dataclass(frozen=True)
class Covered:
    """What a run of the unchanged tests tells."""

    lines: dict[str, dict[int, set[str]]]
    """By file and line, the tests that run it, also by what they import first."""
    seconds: dict[str, float]
    """Processor seconds by test."""
    failing: list[str]
    """Tests that fail unchanged."""


def read_covered(work: Path, copies: list[Path], only: Sequence[str]) -> Covered:
    """Run the unchanged tests under coverage, file by file, or read what an earlier run of the same files found."""
    files = [name for name in project_files() if name.endswith(".py")]
    digest = hashlib.sha256(sys.version.encode())
    for name in files:
        if name.startswith(("slipstream/", "tests/")) and not _is_test(name):
            digest.update(name.encode() + (ROOT / name).read_bytes())
    kept = {
        name: work / "covered" / f"{digest.hexdigest()[:12]}-{hashlib.sha256(text).hexdigest()[:12]}.json"
        for name in files
        if _is_test(name) and not name.startswith(NOT_OF_THE_CODE) and name.startswith(tuple(only) or "tests/")
        for text in [name.encode() + (ROOT / name).read_bytes()]
    }
    missing = [name for name in kept if not kept[name].exists()]
    (work / "covered").mkdir(parents=True, exist_ok=True)
    works = [Work(name, _covering(name, kept[name]), 60.0 * MINUTES_PER_FILE) for name in missing]
    for number, done in enumerate(in_forks(works, copies), start=1):
        if not kept[done.of].exists():
            sys.exit(f"{done.of} does not run unchanged:\n{(done.copy / SAID).read_text()[-3000:]}")
        print(f"[{number}/{len(missing)}] which lines {done.of} runs ({done.seconds:.0f} s)", flush=True)
    return _merge(json.loads(path.read_text()) for path in kept.values())


def _is_test(name: str) -> bool:
    return name.startswith("tests/") and Path(name).name.startswith("test_")


def _merge(found: Iterable[dict[str, Any]]) -> Covered:
    covered = Covered(defaultdict(lambda: defaultdict(set)), {}, [])
    for one in found:
        covered.seconds.update(one["seconds"])
        covered.failing.extend(one["failing"])
        for path, by_line in one["lines"].items():
            for line, tests in by_line.items():
                covered.lines[path][int(line)].update(one["names"][test] for test in tests)
    return covered


def _covering(name: str, kept: Path) -> Any:
    return lambda copy: _cover(name, kept, copy)


def _cover(name: str, kept: Path, copy: Path) -> int:
    """Run one file's tests in this process and write which lines each of them runs."""
    import coverage
    import pytest

    measured = coverage.Coverage(data_file=None, source=[str(copy / "slipstream")], messages=False)
    measured.set_option("run:disable_warnings", ["no-data-collected", "module-not-imported"])
    seconds: dict[str, float] = {}
    failing: set[str] = set()

    class Contexts:
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
            measured.switch_context(item.nodeid)
            began = _processor_seconds()
            result = yield
            seconds[item.nodeid] = _processor_seconds() - began
            measured.switch_context("")
            return result

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                failing.add(report.nodeid)

    measured.start()
    code = run_pytest(copy, [name], plugins=[Contexts()])
    measured.stop()
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        return code
    names = [test for test in seconds if test not in failing]
    number = {test: place for place, test in enumerate(names)}
    data = measured.get_data()
    lines = {
        str(Path(path).relative_to(copy)): {
            line: [number[test] for test in running if test in number]
            for line, running in data.contexts_by_lineno(path).items()
        }
        for path in data.measured_files()
    }
    partial = kept.with_suffix(".partial")
    partial.write_text(json.dumps({"names": names, "lines": lines, "seconds": seconds, "failing": sorted(failing)}))
    partial.rename(kept)
    return 0


def _processor_seconds() -> float:
    """Of this process and those it has waited for: a busy machine makes no test longer."""
    return sum(os.times()[:4])


def choose_tests(mutant: Mutant, covered: Covered, seconds: float) -> list[str]:
    """Choose the tests that run the changed statement: those of its own module first, then the quickest."""
    lines = covered.lines.get(mutant.path, {})
    running = {
        test for line in lines_that_tell((ROOT / mutant.path).read_text(), mutant.line) for test in lines.get(line, ())
    }
    if not running:  # run where it is imported, and named in no function: whoever uses the file
        running = set().union(*lines.values())
    mirror = f"test_{Path(mutant.path).stem}.py"
    ordered = sorted(running, key=lambda test: (mirror not in test, covered.seconds[test], test))
    chosen, taken = [], 0.0
    for test in ordered:
        taken += covered.seconds[test]
        if chosen and taken > seconds:
            break
        chosen.append(test)
    return chosen


def lines_that_tell(text: str, line: int) -> set[int]:
    """Find the lines whose tests run what stands on this line.

    In a function they are those of the innermost statement, as far as it is not made of others. What runs at import
    (constants, defaults, decorators, fields) is used elsewhere: by the body of its function or class, or by the
    statements of functions that name it.
    """
    tree = ast.parse(text)
    around = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and line in _span(node)]
    around.sort(key=lambda node: len(_span(node)))
    innermost = around[0]
    definitions = [node for node in around if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    is_header = isinstance(innermost, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    enclosing = next((node for node in definitions if node is not innermost), None)
    if is_header:
        return _lines_of_functions([innermost])
    if not isinstance(enclosing, ast.ClassDef | None):
        return set(_header(innermost))
    names = {node.id for node in ast.walk(innermost) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    naming = {
        place
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
        if (isinstance(inner, ast.Name) and inner.id in names)
        or (isinstance(inner, ast.Attribute) and inner.attr in names)
        for place in [inner.lineno]
    }
    return naming or (_lines_of_functions([enclosing]) if enclosing is not None else set())


def _span(node: ast.stmt) -> range:
    first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
    return range(first, (node.end_lineno or node.lineno) + 1)


def _header(node: ast.stmt) -> range:
    """Leave out the statements in a statement."""
    body = getattr(node, "body", None)
    if isinstance(body, list) and body:
        return range(node.lineno, max(node.lineno + 1, body[0].lineno))
    return _span(node)


def _lines_of_functions(nodes: Iterable[ast.AST]) -> set[int]:
    """List the lines of all statements in the functions of these nodes."""
    return {
        place
        for node in nodes
        for function in ast.walk(node)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for statement in function.body
        for place in _span(statement)
    }
