"""Where the code can be changed on purpose, and what it is after each change.

Places and changes are those of cosmic-ray: operators, comparisons, numbers, `not`, `and`/`or`, `break`, loops without
rounds, other exceptions, missing decorators.
"""

from __future__ import annotations

import difflib
import json
import random
import subprocess
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ROOMS = ("training", "embedding", "ops", "stages", "io/artifacts.py")


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

    @property
    def room(self) -> str:
        """The package it is in."""
        return self.path.split("/")[1]

    def difference(self) -> str:
        """Show the change with the lines around it."""
        text = (ROOT / self.path).read_text().splitlines()
        lines = difflib.unified_diff(text, self.changed.splitlines(), self.path, self.operator, lineterm="", n=3)
        return "\n".join(lines)


def project_files() -> list[str]:
    """List what git lists of the project."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


def read_drawn(work: Path, code: str, count: int, seed: int, under: Sequence[str]) -> list[Mutant]:
    """Draw, or read what was drawn from the same code before; finding all places takes a while."""
    kept = work / f"drawn-{code}-{count}-{seed}-{'+'.join(under).replace('/', '.')}.json"
    if not kept.exists():
        kept.write_text(json.dumps([asdict(mutant) for mutant in draw(count, seed, under)]))
    return [Mutant(**mutant) for mutant in json.loads(kept.read_text())]


def draw(count: int, seed: int, under: Sequence[str]) -> list[Mutant]:
    """Draw places without repetition, then one change for each of those that Python takes without a word."""
    generator = random.Random(seed)
    places = [place for path in _sources(under) for place in _places_of(path)]
    mutants: list[Mutant] = []
    for path, changes in generator.sample(places, len(places)):
        drawn = generator.sample(changes, len(changes))
        mutants.extend(islice((one for one in (_change(path, *each) for each in drawn) if _compiles(one.changed)), 1))
        if len(mutants) == count:
            break
    return mutants


def _compiles(text: str) -> bool:
    """Whether it takes a test to notice the change: operators replace the stars of signatures, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            compile(text, "changed", "exec")
        except (SyntaxError, Warning):
            return False
    return True


def _sources(under: Sequence[str]) -> list[str]:
    rooms = tuple(f"slipstream/{room}" for room in ROOMS)
    return [
        name
        for name in sorted(project_files())
        if name.endswith(".py") and name.startswith(rooms) and name.startswith(tuple(under) or "slipstream/")
    ]


_Change = tuple[str, int, int, str]
"""Operator's name, which of its places in the file, line, definition."""


def _places_of(path: str) -> list[tuple[str, list[_Change]]]:
    """List the places of a file that can be changed, each with its changes; annotations mean nothing at run time."""
    import cosmic_ray.plugins
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.ast.ast_query import ASTQuery

    nodes = list(ast_nodes(get_ast((ROOT / path).read_text())))
    places: dict[tuple[int, int], list[_Change]] = defaultdict(list)
    for name in cosmic_ray.plugins.operator_names():
        kind = cosmic_ray.plugins.get_operator(name)
        if kind.arguments():
            continue
        operator = kind()
        occurrence = 0
        for node in nodes:
            for start, _ in operator.mutation_positions(node):
                if not _in_annotation(node) and not _is_separator(node):
                    definition = ASTQuery(node).get_definition_name() or "module"
                    places[start].append((name, occurrence, start[0], definition))
                occurrence += 1
    return [(path, changes) for _, changes in sorted(places.items())]


def _in_annotation(node: Any) -> bool:
    while node.parent is not None:
        parent = node.parent
        if parent.type == "annassign" and node is parent.children[1]:
            return True
        if parent.type == "tfpdef" and node is parent.children[2]:
            return True
        if parent.type == "funcdef" and node is parent.annotation:
            return True
        node = parent
    return False


def _is_separator(node: Any) -> bool:
    """Whether the node is the star before arguments that go by name, which cosmic-ray takes for a product."""
    return node.type == "operator" and node.parent.type in ("param", "parameters")


def _change(path: str, operator: str, occurrence: int, line: int, definition: str) -> Mutant:
    import cosmic_ray.plugins
    from cosmic_ray.mutating import mutate_code

    text = (ROOT / path).read_text()
    changed = mutate_code(text, cosmic_ray.plugins.get_operator(operator)(), occurrence)
    assert changed is not None
    before, after = (source.splitlines()[line - 1 : line] or [""] for source in (text, changed))
    name = operator.partition("/")[2]
    return Mutant(path, definition, line, name, occurrence, changed, before[0].strip(), after[0].strip())
