# SPDX-License-Identifier: Apache-2.0
"""`embedrl serve`: the pair behind OpenAI's /v1/embeddings.

Requests are read in threads; their inputs, one by one, wait for the call under way and go into the next, so that
several clients share a batch. What fails is the request's own: an error of OpenAI's form with the reason.
"""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.requests import ClientDisconnect

from embedrl_verl.data.media import DECODE_ERRORS, MAX_PIXELS, LoadedItem
from embedrl_verl.data.schema import Side
from embedrl_verl.embedder import EmbedInput
from embedrl_verl.embedder.gather import Gatherer
from embedrl_verl.errors import DataError, EmbedRLError
from embedrl_verl.model import Ask, EmbedRLModel, ask_for
from embedrl_verl.model.pair import Encoding, Think
from embedrl_verl.retrieval.requests import Refusal, Request, read_request

logger = logging.getLogger(__name__)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


@dataclass(frozen=True)
class Limits:
    """Inputs at a time; inputs and bytes of a request; inputs that may wait, and pixels of their pictures (3 bytes each
    in memory), before requests are refused with 503."""

    batch_size: int = 64
    max_inputs: int = 256
    max_body: int = 16 << 20
    max_waiting: int = 1024
    max_pixels: int = 1 << 30


class Metrics:
    """What /metrics tells, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"namespace": "embedrl", "registry": self.registry}
        self.requests = Counter("requests", "Answered requests for vectors.", ["status"], **options)
        self.inputs = Counter("inputs", "Inputs that have got a vector.", ["side", "think"], **options)
        self.failed = Counter("failed_inputs", "Inputs without a vector.", **options)
        self.waiting = Gauge("waiting_inputs", "Inputs that wait or are under way.", **options)
        self.batch = Histogram("batch_inputs", "Inputs of a call of the model.", buckets=BATCHES, **options)
        self.seconds = Histogram("request_seconds", "From a request to its answer.", buckets=SECONDS, **options)


class Service:
    """The pair and what its endpoints answer.

    Args:
        name: of the model, in requests and answers.
        instruction: of inputs that bring none.
    """

    def __init__(self, model: EmbedRLModel, name: str, limits: Limits, instruction: str = "") -> None:
        self.model, self.name, self.limits, self.instruction = model, name, limits, instruction
        self.metrics, self.started = Metrics(), int(time.time())
        (probe,) = model.embedder.vectors([EmbedInput(LoadedItem("a heron", "", (), ()))], "query")
        if isinstance(probe, EmbedRLError):
            raise probe
        self.dim = len(probe)
        self._encode = Gatherer(self._run, kind=lambda one: one[1:], most=limits.batch_size)
        self._waiting = self._pixels = 0

    async def _run(self, batch: list[tuple[Ask, Side, Think]]) -> list[Encoding | Exception]:
        _, side, think = batch[0]
        self.metrics.batch.observe(len(batch))
        asks = [ask for ask, _, _ in batch]

        def encode() -> list[Encoding | Exception]:
            return list(self.model.encodings(asks, side, think=think, batch_size=len(asks)))

        return await asyncio.to_thread(encode)

    async def embeddings(self, http: HttpRequest) -> dict[str, Any]:
        """The answer to a request; raises Refusal."""
        body = await _body(http, self.limits.max_body)
        more: dict[str, Any] = {"model": self.name, "dim": self.dim, "max_inputs": self.limits.max_inputs}
        request = await asyncio.to_thread(read_request, body, **more)
        think = request.think or self.model.think
        if think != "never" and self.model.reasoner is None:
            raise Refusal(400, f"think={think!r} needs a Reasoner, and this server has none; leave it out")
        pixels = await asyncio.to_thread(_pixels, request)
        waiting = self._waiting + len(request.inputs)
        if waiting > self.limits.max_waiting or pixels + self._pixels > self.limits.max_pixels:
            raise Refusal(503, f"{self._waiting} inputs wait already; try again later")
        self._count(len(request.inputs), pixels)
        try:
            asks = await asyncio.to_thread(self._asks, request)
            found = await asyncio.gather(*(self._encode((ask, request.side, think)) for ask in asks))
        finally:
            self._count(-len(request.inputs), -pixels)
        self.metrics.failed.inc(sum(one.vector is None for one in found))
        data = [self._item(number, one, request.as_base64) for number, one in enumerate(found)]
        self.metrics.inputs.labels(request.side, think).inc(len(data))
        return {"object": "list", "data": data, "model": self.name}

    def _count(self, inputs: int, pixels: int) -> None:
        self._waiting += inputs
        self._pixels += pixels
        self.metrics.waiting.set(self._waiting)

    def _asks(self, request: Request) -> list[Ask]:
        asks = []
        for number, one in enumerate(request.inputs):
            try:
                asks.append(ask_for(one, request.side, instruction=self.instruction, max_frames=self.model.max_frames))
            except DataError as error:
                raise Refusal(400, f"input {number}: {error}") from error
        return asks

    def _item(self, number: int, one: Encoding, as_base64: bool) -> dict[str, Any]:
        if one.vector is None:
            raise Refusal(400, f"input {number} has no vector: {one.problem}")
        values = one.vector.numpy()
        vector = base64.b64encode(values.astype("<f4").tobytes()).decode() if as_base64 else values.tolist()
        return {"object": "embedding", "index": number, "embedding": vector, "tcot": one.tcot}


def _pixels(request: Request) -> int:
    """Of all pictures, by their heads: a small file can be a large picture. What has no head counts nothing here, and
    is refused when it is decoded."""
    found = 0
    for data in (image for one in request.inputs for image in one.get("images", ())):
        with suppress(*DECODE_ERRORS, Image.DecompressionBombError), Image.open(io.BytesIO(data)) as image:
            found += image.width * image.height
    if found > MAX_PIXELS:
        raise Refusal(413, f"the pictures of a request may have {MAX_PIXELS} pixels; they have {found}")
    return found


async def _body(http: HttpRequest, limit: int) -> bytes:
    """The body, not read further than the limit."""
    found = bytearray()
    async for piece in http.stream():
        found += piece
        if len(found) > limit:
            raise Refusal(413, f"a request may have {limit} bytes; it has more")
    return bytes(found)


def application(service: Service) -> FastAPI:
    """The endpoints."""
    app = FastAPI(title="embedrl serve", docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/v1/embeddings")
    async def embeddings(http: HttpRequest) -> Response:
        return await _answered(service.metrics, lambda: service.embeddings(http))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": service.name, "object": "model", "created": service.started, "owned_by": "embedrl"}
        return {"object": "list", "data": [model]}

    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def _answered(metrics: Metrics, answer: Callable[[], Awaitable[dict[str, Any]]]) -> Response:
    started, status = time.perf_counter(), 500
    try:
        content = await answer()
        status = 200
    except Refusal as refusal:
        status, content = refusal.status, _error(refusal.status, refusal.message)
    except ClientDisconnect:
        status, content = 499, {}  # nobody reads it
    except Exception:
        logger.exception("a request has failed")
        content = _error(500, "the model has failed; the server's log has the cause")
    finally:
        metrics.seconds.observe(time.perf_counter() - started)
        metrics.requests.labels(str(status)).inc()
    return JSONResponse(content, status)


def _error(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def run_service(
    model: EmbedRLModel, name: str, limits: Limits, *, instruction: str = "", host: str = "127.0.0.1", port: int = 8000
) -> None:
    """Listen until stopped; the address is printed when the models are loaded and the port is bound."""
    app = application(Service(model, name, limits, instruction))
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False)
    socket = config.bind_socket()
    print(f"serving {name} at http://{host}:{socket.getsockname()[1]}/v1/embeddings", flush=True)
    uvicorn.Server(config).run(sockets=[socket])
