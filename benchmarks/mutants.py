"""Change the code on purpose, one place at a time, and see whether a test notices.

    python benchmarks/mutants.py                         400 changes, drawn by seed 0
    python benchmarks/mutants.py --count 50 --seed 3 --under slipstream/training

Places and changes are those of cosmic-ray (operators, comparisons, numbers, `not`, `and`/`or`, `break`, loops without
rounds, other exceptions, missing decorators). One place is drawn after the other, each as likely as any, then one of
its changes. Tests are chosen by coverage: those that run the changed line, its module's own first, then the quickest,
until their time is `--seconds`. Each change runs in a fork of a process that has torch loaded, in a copy of the
project.

A change is noticed when a test fails, collection fails, or the tests take far longer than they do unchanged. Survivors
go to a file with their difference; those that `mutants_equivalent.toml` lists with a reason count as equivalent.
A table for people first, one JSON line last.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).parent.parent
ROOMS = ("training", "embedding", "ops", "stages", "io/artifacts.py")
EQUIVALENT = Path(__file__).with_name("mutants_equivalent.toml")
NOT_OF_THE_CODE = ("tests/test_structure.py", "tests/test_docs.py", "tests/benchmarks")
"""Tests that read the code's text, or run what is not part of it, would notice changes for the wrong reason."""
MEMORY = 12 << 30
"""Bytes of address space that a changed program may take; above it, an allocation fails."""


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    definition: str
    line: int
    operator: str
    occurrence: int
    changed: str
    """The file's text after the change."""
    before: str
    after: str
    """The line, without its indentation."""

    @property
    def key(self) -> str:
        """A name that survives changes elsewhere in the file."""
        return f"{self.path}::{self.definition}: {self.before} -> {self.after}"


@dataclass(frozen=True)
class Covered:
    """What a run of the unchanged tests tells."""

    lines: dict[str, dict[int, list[str]]]
    """By file and line, the tests that run it."""
    seconds: dict[str, float]
    """By test."""
    failing: list[str]
    """Tests that fail unchanged."""


@dataclass(frozen=True)
class Verdict:
    """What became of a change."""

    mutant: Mutant
    outcome: str
    """noticed, too slow, survived, or not run by any test."""
    tests: int
    seconds: float


def main() -> None:
    """Draw, try, count."""
    options = parse()
    work = Path(options.work) if options.work else Path(tempfile.mkdtemp(prefix="mutants-"))
    work.mkdir(parents=True, exist_ok=True)
    covered = read_covered(work, options.under, options.tests)
    mutants = draw(options.count, options.seed, options.under)
    print(f"{len(mutants)} changes, {len(covered.seconds)} tests, seed {options.seed}", flush=True)
    if covered.failing:
        print(f"left out, because they fail unchanged: {', '.join(covered.failing)}", flush=True)
    load_what_is_slow_to_load()
    verdicts = list(try_all(mutants, covered, work, options))
    report(verdicts, work, options)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400, help="changes to try")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--under", action="append", default=[], help="only files whose path starts so")
    parser.add_argument("--tests", action="append", default=[], help="only these tests; by default all")
    parser.add_argument("--seconds", type=float, default=60.0, help="of tests for one change, at most")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", help="keeps coverage and survivors; by default a new temporary folder")
    return parser.parse_args()


# which tests run which line -------------------------------------------------------------------------------------------


def read_covered(work: Path, under: Sequence[str], tests: Sequence[str]) -> Covered:
    """Run the unchanged tests under coverage, or read what an earlier run over the same files found."""
    digest = hashlib.sha256(repr(tests).encode())
    for name in sorted(project_files()):
        if name.endswith(".py"):
            digest.update(name.encode() + (ROOT / name).read_bytes())
    kept = work / f"covered-{digest.hexdigest()[:16]}.json"
    if not kept.exists():
        print("running the unchanged tests under coverage", flush=True)
        command = [sys.executable, __file__, "--cover", str(kept), *tests]
        subprocess.run(command, cwd=ROOT, check=True, env=environment(ROOT))
    found = json.loads(kept.read_text())
    lines = {
        path: {int(line): tests for line, tests in by_line.items()}
        for path, by_line in found["lines"].items()
        if path.startswith(tuple(under) or "slipstream/")
    }
    return Covered(lines, found["seconds"], found["failing"])


def cover(kept: Path, tests: Sequence[str]) -> None:
    """Run tests once in this process and write which lines each of them runs."""
    import coverage
    import pytest

    measured = coverage.Coverage(data_file=None, source=["slipstream"])
    seconds: dict[str, float] = {}
    failing: set[str] = set()

    class Contexts:
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
            measured.switch_context(item.nodeid)
            began = time.perf_counter()
            result = yield
            seconds[item.nodeid] = time.perf_counter() - began
            return result

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                failing.add(report.nodeid)

    ignored = [f"--ignore={name}" for name in NOT_OF_THE_CODE]
    measured.start()
    code = pytest.main(["-q", "-p", "no:cacheprovider", *ignored, *tests], plugins=[Contexts()])
    measured.stop()
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(f"the unchanged tests do not run (pytest ended with {code})")
    data = measured.get_data()
    lines = {
        str(Path(path).relative_to(ROOT)): {
            line: [test for test in running if test and test not in failing]
            for line, running in data.contexts_by_lineno(path).items()
        }
        for path in data.measured_files()
    }
    kept.write_text(json.dumps({"lines": lines, "seconds": seconds, "failing": sorted(failing)}))


def choose_tests(mutant: Mutant, covered: Covered, seconds: float) -> list[str]:
    """Choose the tests that run the changed line: those of its own module first, then the quickest."""
    running = covered.lines.get(mutant.path, {}).get(mutant.line, [])
    mirror = f"test_{Path(mutant.path).stem}.py"
    ordered = sorted(set(running), key=lambda test: (mirror not in test, covered.seconds.get(test, 0.0), test))
    chosen, taken = [], 0.0
    for test in ordered:
        taken += covered.seconds.get(test, 0.0)
        if chosen and taken > seconds:
            break
        chosen.append(test)
    return chosen


# changes --------------------------------------------------------------------------------------------------------------


def draw(count: int, seed: int, under: Sequence[str]) -> list[Mutant]:
    """Draw places without repetition, then one change for each."""
    generator = random.Random(seed)
    places = [place for path in sources(under) for place in places_of(path)]
    drawn = generator.sample(places, min(count, len(places)))
    return [change(path, *generator.choice(changes)) for path, changes in drawn]


def sources(under: Sequence[str]) -> list[str]:
    """List the files to change."""
    rooms = tuple(f"slipstream/{room}" for room in ROOMS)
    return [
        name
        for name in sorted(project_files())
        if name.endswith(".py") and name.startswith(rooms) and name.startswith(tuple(under) or "slipstream/")
    ]


_Change = tuple[str, int, int, str]
"""Operator's name, which of its places in the file, line, definition."""


def places_of(path: str) -> list[tuple[str, list[_Change]]]:
    """List the places of a file that can be changed, each with its changes; annotations mean nothing at run time."""
    import cosmic_ray.plugins
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.ast.ast_query import ASTQuery

    tree = get_ast((ROOT / path).read_text())
    places: dict[tuple[int, int], list[_Change]] = defaultdict(list)
    for name in cosmic_ray.plugins.operator_names():
        kind = cosmic_ray.plugins.get_operator(name)
        if kind.arguments():
            continue
        operator = kind()
        occurrence = 0
        for node in ast_nodes(tree):
            for start, _ in operator.mutation_positions(node):
                if not in_annotation(node):
                    definition = ASTQuery(node).get_definition_name() or "module"
                    places[start].append((name, occurrence, start[0], definition))
                occurrence += 1
    return [(path, changes) for _, changes in sorted(places.items())]


def in_annotation(node: Any) -> bool:
    """Whether the node is part of a type annotation."""
    while node.parent is not None:
        parent = node.parent
        if parent.type == "annassign" and node is parent.children[1]:
            return True
        if parent.type in ("param", "funcdef", "tfpdef") and node is getattr(parent, "annotation", None):
            return True
        node = parent
    return False


def change(path: str, operator: str, occurrence: int, line: int, definition: str) -> Mutant:
    """Make the change in the file's text."""
    import cosmic_ray.plugins
    from cosmic_ray.mutating import mutate_code

    text = (ROOT / path).read_text()
    changed = mutate_code(text, cosmic_ray.plugins.get_operator(operator)(), occurrence)
    assert changed is not None
    before, after = (source.splitlines()[line - 1 : line] or [""] for source in (text, changed))
    name = operator.partition("/")[2]
    return Mutant(path, definition, line, name, occurrence, changed, before[0].strip(), after[0].strip())


# trying ---------------------------------------------------------------------------------------------------------------


def load_what_is_slow_to_load() -> None:
    """Import what every test needs, so that a fork need not; nothing of slipstream, which each fork loads changed."""
    os.environ.update(environment(ROOT))
    import altair  # noqa: F401
    import hypothesis  # noqa: F401
    import polars  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import pytest  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch
    import triton  # noqa: F401

    torch.set_num_threads(1)  # a pool of threads does not survive a fork


def environment(root: Path) -> dict[str, str]:
    """Make the environment for the project in that folder, also for processes that tests start."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}


def try_all(mutants: Sequence[Mutant], covered: Covered, work: Path, options: argparse.Namespace) -> Iterator[Verdict]:
    """Try every change, as many at once as there are jobs, each job in its own copy of the project."""
    copies: SimpleQueue[Path] = SimpleQueue()
    for job in range(options.jobs):
        copies.put(copy_project(work / f"copy{job}"))

    def one(mutant: Mutant) -> Verdict:
        tests = choose_tests(mutant, covered, options.seconds)
        if not tests:
            return Verdict(mutant, "not run by any test", 0, 0.0)
        expected = sum(covered.seconds[test] for test in tests)
        copy = copies.get()
        try:
            return try_one(mutant, tests, expected, copy)
        finally:
            copies.put(copy)

    with ThreadPoolExecutor(options.jobs) as pool:
        for number, verdict in enumerate(pool.map(one, mutants), start=1):
            said = f"[{number}/{len(mutants)}] {verdict.outcome} ({verdict.tests} tests, {verdict.seconds:.0f} s)"
            print(f"{said} {verdict.mutant.key}", flush=True)
            yield verdict


def copy_project(copy: Path) -> Path:
    """Copy what git lists."""
    shutil.rmtree(copy, ignore_errors=True)
    for name in project_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    return copy


def project_files() -> list[str]:
    """List the project's files."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


def try_one(mutant: Mutant, tests: list[str], expected: float, copy: Path) -> Verdict:
    """Run the tests over the changed file in a fork."""
    file = copy / mutant.path
    file.write_text(mutant.changed)
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        run_tests(tests, copy)
    outcome = wait_for(child, at_most=60 + 10 * expected)
    file.write_text((ROOT / mutant.path).read_text())
    shutil.rmtree(copy / ".tmp", ignore_errors=True)
    return Verdict(mutant, outcome, len(tests), time.perf_counter() - began)


def run_tests(tests: list[str], copy: Path) -> None:
    """Run the tests in this fork, and end it with pytest's code."""
    code = 1
    try:
        os.setsid()
        said = os.open(copy / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        os.environ.update(environment(copy))
        sys.dont_write_bytecode = True
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={copy / '.tmp'}", "--timeout=240"]
        code = int(pytest.main([*options, *tests]))
    finally:
        os._exit(code)


def wait_for(child: int, *, at_most: float) -> str:
    """Wait for a fork, and end it with all it started when it takes too long."""
    ends = time.monotonic() + at_most
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "survived" if status == 0 else "noticed"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "too slow"


# saying ---------------------------------------------------------------------------------------------------------------


def report(verdicts: list[Verdict], work: Path, options: argparse.Namespace) -> None:
    """Print the counts by room, and write the survivors."""
    known = tomllib.loads(EQUIVALENT.read_text()) if EQUIVALENT.exists() else {}
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    survivors = []
    for verdict in verdicts:
        outcome = verdict.outcome
        if outcome in ("survived", "not run by any test"):
            if verdict.mutant.key in known:
                outcome = "equivalent"
            else:
                survivors.append(verdict)
        rows[verdict.mutant.path.split("/")[1]][outcome] += 1
    kept = work / "survivors.txt"
    kept.write_text("\n".join(describe(verdict) for verdict in survivors))
    total = sum(rows.values(), Counter())
    names = ["noticed", "too slow", "survived", "not run by any test", "equivalent"]
    print(f"\n{'room':<12}" + "".join(f"{name:>21}" for name in names) + f"{'noticed of all':>16}")
    for room, counts in [*sorted(rows.items()), ("all", total)]:
        print(f"{room:<12}" + "".join(f"{counts[name]:>21}" for name in names) + f"{share(counts):>15.1%}")
    print(f"survivors: {kept}")
    print(json.dumps({"seed": options.seed, "share": round(share(total), 4), **{name: total[name] for name in names}}))


def share(counts: Counter[str]) -> float:
    """Divide what tests notice by what makes a difference."""
    noticed = counts["noticed"] + counts["too slow"]
    return noticed / max(1, counts.total() - counts["equivalent"])


def describe(verdict: Verdict) -> str:
    """Show a survivor as a difference."""
    mutant = verdict.mutant
    text = (ROOT / mutant.path).read_text().splitlines()
    difference = difflib.unified_diff(text, mutant.changed.splitlines(), mutant.path, mutant.operator, lineterm="", n=3)
    return f"== {verdict.outcome} after {verdict.tests} tests: {mutant.key}\n" + "\n".join(difference) + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--cover"]:
        cover(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
