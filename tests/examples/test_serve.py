"""The server of the guide, in a process of its own, asked over HTTP."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raw_logs import invoke, make_lines, subprocess_environment, write_pipeline, write_raw
from typer.testing import CliRunner

import slipstream
from slipstream.cli import app

SERVER = Path(__file__).parents[2] / "examples" / "serve.py"
LINES = make_lines(700)
NAMES = ["label", *(f"int_{at}" for at in range(13)), *(f"cat_{at}" for at in range(26))]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trained model's folder, and its export to ONNX."""
    folder = tmp_path_factory.mktemp("serve")
    pipeline = write_pipeline(folder / "run.toml", write_raw(folder / "log.tsv", LINES))
    assert invoke("run", pipeline, folder / "runs", "train.batch_size=64").exit_code == 0
    (model,) = (folder / "runs" / "run" / "train").glob("[0-9a-f]*")
    onnx = folder / "model.onnx"
    written = CliRunner().invoke(app, ["export", "model", str(model), "--format", "onnx", "--out", str(onnx)])
    assert written.exit_code == 0, written.output
    return model, onnx


@pytest.fixture
def server(exported: tuple[Path, Path]) -> Iterator[HTTPConnection]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [sys.executable, "-W", "error", str(SERVER), *map(str, exported), "--port", str(port)]
    process = subprocess.Popen(command, env=subprocess_environment(), stderr=subprocess.PIPE)
    try:
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        while True:
            try:
                connection.connect()
                break
            except ConnectionRefusedError:
                assert process.poll() is None, process.communicate()[1].decode()
                time.sleep(0.02)
        yield connection
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
        connection.close()
    finally:
        process.terminate()
        said = process.communicate(timeout=30)[1].decode()
    assert "Traceback" not in said, said


def ask(connection: HTTPConnection, *samples: object, body: bytes | None = None) -> tuple[int, Any]:
    if body is None:
        body = "\n".join(json.dumps(sample) for sample in samples).encode()
    connection.request("POST", "/score", body)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_the_server_gives_raw_values_the_probabilities_of_their_lines(
    server: HTTPConnection, exported: tuple[Path, Path]
):
    values = [dict(zip(NAMES, line.decode().split("\t"), strict=True)) for line in LINES[:40]]
    model = slipstream.load(exported[0])
    expected = model.predict(*model.encode(b"\n".join(LINES[:40])))
    status, answer = ask(server, *values)
    assert status == 200 and answer["reason"] == [None] * 40
    np.testing.assert_allclose(answer["probability"], expected, rtol=0, atol=1e-6)

    # numbers as numbers, what is missing left out, without a label: the same sample
    bare = {name: int(text) if name.startswith("int") else text for name, text in values[3].items() if text}
    del bare["label"]
    status, answer = ask(server, bare, {**bare, "int_2": "x\ty\n"}, {**bare, "cat_4": None})
    assert answer["probability"][0] == pytest.approx(expected[3], abs=1e-6)
    assert answer["probability"][1] is None and answer["reason"][1].startswith("int_2: expected an integer")
    assert answer["probability"][2] is not None

    assert ask(server, {"int_0": []})[0] == ask(server, [3])[0] == ask(server, body=b"nonsense")[0] == 400
    status, answer = ask(server, {**bare, "cat4": "5"})
    assert status == 400 and answer["error"].endswith("found `cat4`") and answer["hint"] == "did you mean `cat_4`?"
    assert ask(server)[1] == {"error": "expected at least one sample, found none"}
    assert ask(server, {"int_0": "x"})[1] == {
        "probability": [None],
        "reason": ["int_0: expected an integer, found 'x'"],
    }
    assert ask(server, body=b" " * (16 << 20) + b"\n{}")[0] == 413


def test_a_folder_that_the_export_is_not_of_is_refused(exported: tuple[Path, Path], tmp_path: Path):
    other = tmp_path / "int8"
    done = CliRunner().invoke(app, ["export", "model", str(exported[0]), "--quantize", "int8", "--out", str(other)])
    assert done.exit_code == 0, done.output
    spec = importlib.util.spec_from_file_location("serve", SERVER)
    assert spec is not None and spec.loader is not None
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)
    with pytest.raises(SystemExit, match="was not exported from"):
        serve.Scorer(str(other), str(exported[1]))


def test_the_guide_shows_the_server_as_it_is():
    guide = (SERVER.parents[1] / "docs/guides/serving.md").read_text(encoding="utf-8")
    assert f"```py\n{SERVER.read_text(encoding='utf-8')}```\n" in guide
