"""What a name in a pipeline file stands for, where more can be added: one registry for each such key.

    dataset.source    slipstream.datasets.registry:SOURCES    every module of slipstream/datasets with a `build`
    model.name        slipstream.models.registry:MODELS       every module of slipstream/models with a `Model` subclass
    skip.criterion    slipstream.training.skipping.registry:CRITERIA
                      every module of slipstream/training/skipping/criteria with a `Criterion` subclass

To add a thing is to write it down where its registry looks; the choices of the pipeline file, the command line and the
reference follow. Looking at names loads nothing heavy: a module found in a folder is imported when somebody asks for
what it holds.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from slipstream.errors import did_you_mean

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Entry:
    summary: str
    item: object
    """The thing; or `module:attribute`, where it is found."""


class Registry(Generic[T]):
    """Names and what they stand for.

    Args:
        what: One of the things, for messages: `source`.
        package: A package, each of whose modules that defines a thing at its top level stands for it by the module's
            name; None for none.
        attribute: Name of the function or class that is a thing.
        subclass_of: Or the name of the class that a thing has for its base, whatever its own name.
    """

    def __init__(self, what: str, *, package: str | None = None, attribute: str = "", subclass_of: str = "") -> None:
        self._what, self._package = what, package
        self._attribute, self._subclass_of = attribute, subclass_of
        self._entries: dict[str, _Entry] = {}
        self._is_complete = package is None

    def register(self, name: str, item: T, *, summary: str) -> None:
        """Add a thing.

        Args:
            name: As it stands in pipeline files.
            item: The thing.
            summary: What it is, in a few words, for the reference.

        Raises:
            ValueError: The name is taken.
        """
        if name in self._all():
            raise ValueError(f"expected a new name of a {self._what}, found `{name}`, which there is already")
        self._entries[name] = _Entry(summary, item)

    @contextmanager
    def registered(self, name: str, item: T, *, summary: str = "") -> Iterator[None]:
        """Have a thing for the length of a block, as tests and notebooks want it."""
        self.register(name, item, summary=summary)
        try:
            yield
        finally:
            del self._entries[name]

    def names(self) -> tuple[str, ...]:
        """Every name: modules in the order of their names, then what was registered."""
        return tuple(self._all())

    def summary(self, name: str) -> str:
        """Say what a thing is, in a few words."""
        return self._all()[name].summary

    def get(self, name: str) -> T:
        """Give the thing of a name.

        Raises:
            ValueError: There is none; says which there are.
        """
        entries = self._all()
        if name not in entries:
            hint = did_you_mean(name, entries)
            raise ValueError(
                f"expected a {self._what}: {', '.join(entries)}; found `{name}`{f'; {hint}' if hint else ''}"
            )
        item = entries[name].item
        return cast(T, find_attribute(item) if isinstance(item, str) else item)

    def _names_thing(self, node: ast.stmt) -> bool:
        if self._subclass_of:
            return isinstance(node, ast.ClassDef) and self._subclass_of in map(ast.unparse, node.bases)
        return getattr(node, "name", None) == self._attribute

    def _all(self) -> dict[str, _Entry]:
        if not self._is_complete:
            assert self._package is not None
            self._entries = _find_modules(self._package, self._names_thing) | self._entries
            self._is_complete = True
        return self._entries


@dataclass(frozen=True, slots=True)
class ChoiceOf:
    """Marks a key of the pipeline file whose values are the names in a registry: `Annotated[str, ChoiceOf(…)]`."""

    registry: str
    """`module:attribute`; the module must load neither torch nor polars nor pyarrow."""

    def find(self) -> Registry[Any]:
        """Give the registry."""
        found: Registry[Any] = find_attribute(self.registry)
        return found


def find_attribute(path: str) -> Any:
    """Import what `module:attribute` names."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


def _find_modules(package: str, is_thing: Callable[[ast.stmt], bool]) -> dict[str, _Entry]:
    """Modules of a package that define a thing, without importing them; the first line of each says what it is."""
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None, package
    entries = {}
    for folder in map(Path, spec.submodule_search_locations):
        for path in sorted(folder.glob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for name in [node.name for node in tree.body if is_thing(node)]:  # type: ignore[attr-defined]
                first_line = (ast.get_docstring(tree) or "").partition("\n")[0].rstrip(".")
                entries[path.stem] = _Entry(first_line, f"{package}.{path.stem}:{name}")
    return entries
