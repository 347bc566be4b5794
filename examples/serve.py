"""A trained model behind HTTP: raw values in, click probabilities out. Needs slipstream[onnx,serve], not torch.

    slipstream export model FOLDER --format onnx --out model.onnx
    python serve.py FOLDER model.onnx

A request has one sample a line, as JSON, with the names of the log's fields; the answer has, in the same order, the
probability of each, or null and the reason why it is no sample.
"""

import argparse
import json
from typing import Any

import onnxruntime
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import slipstream
from slipstream.errors import SlipstreamError

MOST_BYTES = 16 << 20


class Scorer:
    """The folder's vocabularies and transforms, and the network and tables in ONNX Runtime."""

    def __init__(self, folder: str, onnx: str) -> None:
        self.encoder = slipstream.load_encoder(folder)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1  # requests are what runs side by side
        self.session = onnxruntime.InferenceSession(onnx, settings, providers=["CPUExecutionProvider"])
        made_of = self.session.get_modelmeta().custom_metadata_map.get("slipstream.weights")
        if made_of != self.encoder.weights_hash:
            raise SystemExit(f"{onnx} was not exported from {folder}: its rows would mean something else")

    def score(self, body: bytes) -> dict[str, list[Any]]:
        """Score samples, one JSON object a line."""
        encoded = self.encoder.encode_values([json.loads(line) for line in body.splitlines() if line.strip()])
        (probabilities,) = self.session.run(["probability"], {"dense": encoded.dense, "rows": encoded.rows})
        return {"probability": encoded.spread(probabilities.tolist()), "reason": encoded.reasons}


def make_app(scorer: Scorer) -> Starlette:
    """Give the application: POST /score, and GET /fields for what a sample may have."""

    async def score(request: Request) -> JSONResponse:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > MOST_BYTES:
                return JSONResponse({"error": f"expected at most {MOST_BYTES:,} bytes"}, status_code=413)
        try:
            # in a thread, so that the next request is read meanwhile
            return JSONResponse(await run_in_threadpool(scorer.score, bytes(body)))
        except (SlipstreamError, ValueError) as error:
            said = {"error": str(error)}
            if hint := getattr(error, "hint", None):
                said["hint"] = hint
            return JSONResponse(said, status_code=400)

    async def fields(_: Request) -> JSONResponse:
        return JSONResponse(list(scorer.encoder.source.fields))

    return Starlette(routes=[Route("/score", score, methods=["POST"]), Route("/fields", fields)])


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a train artifact, or a folder that `slipstream export model` wrote")
    parser.add_argument("onnx", help="its export to ONNX")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    app = make_app(Scorer(options.folder, options.onnx))
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
