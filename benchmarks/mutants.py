"""Change the code on purpose, one place at a time, and see whether a test notices.

    python benchmarks/mutants.py                         400 changes, drawn by seed 0
    python benchmarks/mutants.py --count 50 --seed 3 --under slipstream/training
    python benchmarks/mutants.py --work FOLDER           go on where an earlier run in that folder stopped
    python benchmarks/mutants.py --work FOLDER --again   try what survived, with the tests as they are now
    python benchmarks/mutants.py --work FOLDER --again --match _choose_part --also tests/stages/test_train_ranks.py

One place of the code is drawn after the other, each as likely as any, then one of its changes. Tests are chosen by
coverage: those that run the changed statement, its module's own first, then the quickest, until their time is
`--seconds`. Each change runs in a fork of a process that has torch loaded, in a copy of the project. What only
processes of their own run is not seen by coverage: `--also` names tests to try beside those chosen.

A change is noticed when a test fails, collection fails, or the tests take far longer than they do unchanged. Survivors
go to a file with their difference; those that `mutants_equivalent.toml` lists with a reason count as equivalent.
A table for people first, one JSON line last.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import tempfile
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mutants_coverage import Covered, choose_tests, read_covered
from mutants_forks import (
    CRASHED,
    SAID,
    TOO_SLOW,
    Work,
    in_forks,
    load_what_is_slow_to_load,
    make_copies,
    run_pytest,
)
from mutants_places import ROOT, Mutant, project_files, read_drawn

EQUIVALENT = Path(__file__).with_name("mutants_equivalent.toml")
SECONDS_FOR_ONE_TEST = 100
FIRST_TESTS = 3
"""Files of so many tests are tried before those of the others are imported."""
OUTCOMES = ("noticed", "too slow", "survived", "not run by any test")


@dataclass(frozen=True)
class Verdict:
    """What became of a change."""

    mutant: str
    """Its identity: the code it was made in, its place and what it is."""
    outcome: str
    tests: int
    seconds: float
    by: str
    """The test that noticed."""


def main() -> None:
    """Draw, try, count."""
    options = parse()
    work = Path(options.work) if options.work else Path(tempfile.mkdtemp(prefix="mutants-"))
    work.mkdir(parents=True, exist_ok=True)
    load_what_is_slow_to_load()
    copies = make_copies(work, options.jobs)
    covered = read_covered(work, copies, options.tests)
    code = digest_of_the_code()
    mutants = read_drawn(work, code, options.count, options.seed, options.under)
    print(f"{len(mutants)} changes, {len(covered.seconds)} tests, seed {options.seed}; kept in {work}", flush=True)
    if covered.failing:
        print(f"left out, because they fail unchanged: {', '.join(covered.failing)}", flush=True)
    verdicts = read_verdicts(work)
    if options.again:
        verdicts = {name: verdict for name, verdict in verdicts.items() if verdict.outcome in OUTCOMES[:2]}
    known = read_equivalent()
    waiting = [
        mutant
        for mutant in mutants
        if identity(mutant, code) not in verdicts and options.match in mutant.key and mutant.key not in known
    ]
    for number, (mutant, verdict) in enumerate(try_all(waiting, code, covered, copies, options), start=1):
        verdicts[verdict.mutant] = verdict
        with (work / "verdicts.jsonl").open("a") as kept:
            kept.write(json.dumps(asdict(verdict)) + "\n")
        said = f"[{number}/{len(waiting)}] {verdict.outcome} ({verdict.tests} tests, {verdict.seconds:.0f} s)"
        print(f"{said} {mutant.key}\n      {verdict.by}", flush=True)
    report([(mutant, verdicts.get(identity(mutant, code))) for mutant in mutants], work, options.seed)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400, help="changes to try")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--under", action="append", default=[], help="only files whose path starts so")
    parser.add_argument("--tests", action="append", default=[], help="only tests in files whose path starts so")
    parser.add_argument("--match", default="", help="of those drawn, try only the ones whose name contains this")
    parser.add_argument("--also", action="append", default=[], help="tests to try on each change beside those chosen")
    parser.add_argument("--again", action="store_true", help="try what survived again")
    parser.add_argument("--seconds", type=float, default=60.0, help="of tests for one change, at most")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", help="keeps coverage, verdicts and survivors; by default a new temporary folder")
    return parser.parse_args()


# trying ---------------------------------------------------------------------------------------------------------------


def digest_of_the_code() -> str:
    """Digest the package: what was noticed there stays noticed, whatever tests come to those that were."""
    digest = hashlib.sha256()
    for name in sorted(project_files()):
        if name.startswith("slipstream/"):
            digest.update(name.encode() + (ROOT / name).read_bytes())
    return digest.hexdigest()[:12]


def identity(mutant: Mutant, code: str) -> str:
    """Name a change of this very code."""
    return f"{code} {mutant.path} {mutant.operator} {mutant.occurrence}"


def read_verdicts(work: Path) -> dict[str, Verdict]:
    """Read what earlier runs in this folder found; the last word on a change counts."""
    kept = work / "verdicts.jsonl"
    lines = kept.read_text().splitlines() if kept.exists() else []
    return {verdict.mutant: verdict for verdict in (Verdict(**json.loads(line)) for line in lines)}


def try_all(
    mutants: Sequence[Mutant], code: str, covered: Covered, copies: list[Path], options: argparse.Namespace
) -> Iterator[tuple[Mutant, Verdict]]:
    """Try every change, as many at once as there are copies of the project."""
    chosen = {mutant: choose_tests(mutant, covered, options.seconds) + options.also for mutant in mutants}
    for mutant, tests in chosen.items():
        if not tests:
            yield mutant, Verdict(identity(mutant, code), "not run by any test", 0, 0.0, "")
    works = [
        Work(mutant, _trying(mutant, tests), at_most=300 + 20 * sum(covered.seconds.get(test, 60.0) for test in tests))
        for mutant, tests in chosen.items()
        if tests
    ]
    for done in in_forks(works, copies):
        shutil.copy2(ROOT / done.of.path, done.copy / done.of.path)
        if done.code == CRASHED:
            raise SystemExit(f"no test judged {done.of.key}:\n{(done.copy / SAID).read_text()[-3000:]}")
        outcome = "survived" if done.code == 0 else "too slow" if done.code == TOO_SLOW else "noticed"
        by = "" if done.code == 0 else _who_noticed((done.copy / SAID).read_text(errors="replace"), done.code)
        yield done.of, Verdict(identity(done.of, code), outcome, len(chosen[done.of]), done.seconds, by)


def _trying(mutant: Mutant, tests: list[str]) -> Callable[[Path], int]:
    first = [test for test in tests if test.split("::")[0] in {one.split("::")[0] for one in tests[:FIRST_TESTS]}]
    others = [test for test in tests if test not in first]

    def run(copy: Path) -> int:
        (copy / mutant.path).write_text(mutant.changed)
        options = ("-x", f"--timeout={SECONDS_FOR_ONE_TEST}")
        return run_pytest(copy, first, *options) or (run_pytest(copy, others, *options) if others else 0)

    return run


def _who_noticed(said: str, code: int) -> str:
    found = re.findall(r"^(?:FAILED|ERROR) (.*)$", said, flags=re.MULTILINE)
    return found[0] if found else f"pytest ended with {code}: {said[-200:]}"


# saying ---------------------------------------------------------------------------------------------------------------


def report(tried: list[tuple[Mutant, Verdict | None]], work: Path, seed: int) -> None:
    """Print the counts by room, and write the survivors."""
    known = read_equivalent()
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    survivors = []
    for mutant, verdict in tried:
        if verdict is None and mutant.key not in known:
            continue
        outcome = "equivalent" if verdict is None else verdict.outcome
        if outcome in ("survived", "not run by any test"):
            if mutant.key in known:
                outcome = "equivalent"
            else:
                survivors.append(f"== {outcome}: {mutant.key}\n{mutant.difference()}\n")
        rows[mutant.room][outcome] += 1
    kept = work / "survivors.txt"
    kept.write_text("\n".join(survivors))
    total = sum(rows.values(), Counter())
    names = [*OUTCOMES, "equivalent"]
    print(f"\n{'room':<12}" + "".join(f"{name:>21}" for name in names) + f"{'noticed of all':>16}")
    for room, counts in [*sorted(rows.items()), ("all", total)]:
        print(f"{room:<12}" + "".join(f"{counts[name]:>21}" for name in names) + f"{share(counts):>15.1%}")
    print(f"survivors: {kept}")
    print(json.dumps({"seed": seed, "share": round(share(total), 4), **{name: total[name] for name in names}}))


def read_equivalent() -> dict[str, str]:
    """Read which changes no test can notice, with the reason of each."""
    return tomllib.loads(EQUIVALENT.read_text()) if EQUIVALENT.exists() else {}


def share(counts: Counter[str]) -> float:
    """Divide what tests notice by what makes a difference."""
    noticed = counts["noticed"] + counts["too slow"]
    return noticed / max(1, counts.total() - counts["equivalent"])


if __name__ == "__main__":
    main()
