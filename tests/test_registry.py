"""Names and what they stand for."""

import re
from pathlib import Path

import pytest

from slipstream.models.registry import MODELS
from slipstream.registry import ChoiceOf, Registry, find_attribute


@pytest.fixture
def things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[int]:
    """A package of three modules, of which two hold a thing."""
    folder = tmp_path / "shelf_of_things"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "two.py").write_text('"""The number two.\n\nAnd more.\n"""\n\ndef thing():\n    return 2\n')
    (folder / "one.py").write_text(
        '"""The number one."""\n\nclass thing:\n    pass\n\nraise ImportError("asked for")\n'
    )
    (folder / "ground.py").write_text('"""No thing."""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    return Registry("thing", package="shelf_of_things", attribute="thing")


def test_modules_of_a_folder_are_found_by_what_they_define_and_not_imported(things: Registry[int]):
    assert things.names() == ("one", "two")
    assert things.summary("two") == "The number two"


def test_a_module_is_imported_when_its_thing_is_asked_for(things: Registry[int]):
    assert things.get("two")() == 2  # type: ignore[operator]
    with pytest.raises(ImportError, match="asked for"):
        things.get("one")


def test_a_thing_can_be_registered_for_the_length_of_a_block(things: Registry[int]):
    with things.registered("three", 3, summary="The number three"):
        assert things.names() == ("one", "two", "three")
        assert things.get("three") == 3
    assert things.names() == ("one", "two")


def test_a_name_is_taken_once(things: Registry[int]):
    with pytest.raises(ValueError, match="`two`, which there is already"):
        things.register("two", 2, summary="")


def test_an_unknown_name_is_refused_with_the_known_ones(things: Registry[int]):
    with pytest.raises(ValueError, match=re.escape("expected a thing: one, two; found `tow`; did you mean `two`?")):
        things.get("tow")


def test_modules_are_found_by_the_base_of_what_they_define(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "shelf_of_classes"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "ground.py").write_text("class Thing: ...\n")
    (folder / "three.py").write_text("from shelf_of_classes.ground import Thing\n\nclass Three(Thing): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    things: Registry[type] = Registry("thing", package="shelf_of_classes", subclass_of="Thing")
    assert things.names() == ("three",)
    assert things.get("three").__name__ == "Three"


@pytest.mark.parametrize("name", MODELS.names())
def test_a_model_knows_its_name(name: str):
    assert MODELS.get(name)().name == name


def test_a_choice_finds_its_registry():
    registry = ChoiceOf("slipstream.datasets.registry:SOURCES").find()
    assert registry is find_attribute("slipstream.datasets.registry:SOURCES")
    assert set(registry.names()) == {"synthetic", "criteo", "avazu", "taobao", "dlrm_npz", "table"}
