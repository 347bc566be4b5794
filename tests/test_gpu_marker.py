"""What is marked `gpu` runs on one: the mark stands on a device, never on a test that could do without."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.rglob("*.py"))


def marks_in(tree: ast.AST) -> int:
    """How often `pytest.mark.gpu` stands there."""
    return sum(isinstance(node, ast.Attribute) and node.attr == "gpu" for node in ast.walk(tree))


@pytest.mark.parametrize("path", [path for path in FILES if "mark.gpu" in path.read_text()], ids=lambda path: path.name)
def test_only_devices_are_marked_gpu(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    of_devices = sum(
        marks_in(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "pytest.param"
        and isinstance(node.args[0], ast.Constant)
        and node.args[0].value in ("real", "cuda")
    )
    assert marks_in(tree) == of_devices, (
        "take the fixture `cuda` or `real_cuda`: it fails where nothing is on the device"
    )
