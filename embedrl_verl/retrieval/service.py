# SPDX-License-Identifier: Apache-2.0
"""`embedrl serve`: the pair behind OpenAI's /v1/embeddings.

Requests are read in threads; their inputs, one by one, wait for the call under way and go into the next, so that
several clients share a batch. What fails is the request's own: an error of OpenAI's form with the reason.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import uvicorn
from fastapi import Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.requests import ClientDisconnect

from embedrl_verl.data.media import DECODE_ERRORS, IMAGE_FORMATS, MAX_PIXELS, LoadedItem
from embedrl_verl.data.schema import Side
from embedrl_verl.embedder import EmbedInput
from embedrl_verl.embedder.gather import Gatherer
from embedrl_verl.errors import DataError, EmbedRLError
from embedrl_verl.model import Ask, EmbedRLModel, ask_for
from embedrl_verl.model.pair import Encoding, Think
from embedrl_verl.retrieval.requests import THINK, Refusal, Request, read_request
from embedrl_verl.tcot import parse_tcot

logger = logging.getLogger(__name__)
T = TypeVar("T")
RETRY_AFTER_S = 1
"""What clients are asked to wait when too many inputs wait already."""
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
        cut_to: numbers that vectors may be cut to (`dimensions`): those that the Embedder was trained for.
    """

    def __init__(
        self, model: EmbedRLModel, name: str, limits: Limits, instruction: str = "", cut_to: Sequence[int] = ()
    ) -> None:
        self.model, self.name, self.limits, self.instruction = model, name, limits, instruction
        self.metrics, self.started = Metrics(), int(time.time())
        (probe,) = model.embedder.vectors([EmbedInput(LoadedItem("a heron", "", (), ()))], "query")
        if isinstance(probe, EmbedRLError):
            raise probe
        self.dims = sorted({*cut_to, len(probe.vector)})
        # Those that think do not hold up the others, and a batch is prepared while the one before it is computed.
        self._gatherers: dict[tuple[Side, Think], Gatherer[tuple[Ask, Side, Think], Encoding]] = defaultdict(
            lambda: Gatherer(self._run, most=limits.batch_size, at_once=2)
        )
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
        request = await self.read(http)
        think = request.think or self.model.think
        _, found = await unless_gone(http, self.encodings(request, think))
        data = [_item(number, one, request) for number, one in enumerate(found)]
        self.metrics.inputs.labels(request.side, think).inc(len(data))
        answer: dict[str, Any] = {"object": "list", "data": data, "model": self.name}
        if all(one.tokens is not None for one in found):
            tokens = sum(one.tokens or 0 for one in found)
            answer["usage"] = {"prompt_tokens": tokens, "total_tokens": tokens}
            if any(one.tcot_tokens is not None for one in found):
                written = sum(one.tcot_tokens or 0 for one in found)
                answer["usage"] |= {"completion_tokens": written, "total_tokens": tokens + written}
        return answer

    async def read(self, http: HttpRequest, think: Sequence[Think] = THINK) -> Request:
        """What is asked for, with a `think` that this server can do."""
        body = await _body(http, self.limits.max_body)
        most = min(self.limits.max_inputs, self.limits.max_waiting)  # more would never find room
        more: dict[str, Any] = {"model": self.name, "dims": self.dims, "max_inputs": most}
        request = await asyncio.to_thread(read_request, body, **more, think=think)
        if request.think not in (None, "never") and self.model.reasoner is None:
            reason = f"think={request.think!r} needs a Reasoner, and this server has none; leave it out"
            raise Refusal(400, reason, "think")
        return request

    async def encodings(self, request: Request, think: Think) -> tuple[list[Ask], list[Encoding]]:
        """The inputs of a request, decoded, and their vectors; Refusal where one has none, or too many wait."""
        pixels = await asyncio.to_thread(_pixels, request)
        waiting = self._waiting + len(request.inputs)
        if waiting > self.limits.max_waiting or pixels + self._pixels > self.limits.max_pixels:
            raise Refusal(503, f"{self._waiting} inputs wait already; try again later")
        self._count(len(request.inputs), pixels)
        decoded = asyncio.ensure_future(asyncio.to_thread(self._asks, request))
        try:
            asks = await asyncio.shield(decoded)
            encode = self._gatherers[request.side, think]
            found = await asyncio.gather(*(encode((ask, request.side, think)) for ask in asks))
        finally:
            # A thread goes on for a client that has left, and its pictures are in memory until it ends.
            decoded.add_done_callback(lambda one: self._discount(one, request, pixels))
        self.metrics.failed.inc(sum(one.vector is None for one in found))
        for number, one in enumerate(found):
            if one.vector is None:
                raise Refusal(400 if one.is_input_fault else 502, f"input {number} has no vector: {one.problem}")
        return asks, found

    def _discount(self, decoded: asyncio.Future[list[Ask]], request: Request, pixels: int) -> None:
        self._count(-len(request.inputs), -pixels)
        if not decoded.cancelled():
            decoded.exception()  # of a client that has left nobody asks for it

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


def _item(number: int, one: Encoding, request: Request) -> dict[str, Any]:
    assert one.vector is not None
    values = one.vector.numpy()
    if request.dim < len(values):
        values = values[: request.dim] / np.linalg.norm(values[: request.dim])
    vector = base64.b64encode(values.astype("<f4").tobytes()).decode() if request.as_base64 else values.tolist()
    item = {"object": "embedding", "index": number, "embedding": vector, "tcot": one.tcot}
    return item if one.tcot is None else {**item, "well_formed": parse_tcot(one.tcot).is_well_formed}


def _pixels(request: Request) -> int:
    """Of all pictures, by their heads: a small file can be a large picture. What has no head counts nothing here, and
    is refused when it is decoded."""
    found = 0
    for data in (image for one in request.inputs for image in one.get("images", ())):
        try:
            with suppress(*DECODE_ERRORS), Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                found += image.width * image.height
        except Image.DecompressionBombError as error:
            raise Refusal(413, f"a picture may have {MAX_PIXELS} pixels ({error})") from error
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


async def unless_gone(http: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves; call it when the body has been read."""

    async def left() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


def application(service: Service, api_key: str | None = None) -> FastAPI:
    """The endpoints; all but /health need the key, if there is one."""

    async def check_key(http: HttpRequest) -> None:
        if api_key is None or http.scope["path"] == "/health":
            return
        if not hmac.compare_digest(_key_of(http.headers.get("Authorization", "")), api_key.encode()):
            raise Refusal(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY")

    async def refused(_: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return _refused(error)

    app = FastAPI(
        title="embedrl serve",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        dependencies=[Depends(check_key)],
        exception_handlers={Refusal: refused},
    )

    @app.post("/v1/embeddings")
    async def embeddings(http: HttpRequest) -> Response:
        return await answered(service.metrics, lambda: service.embeddings(http))

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


def _key_of(header: str) -> bytes:
    """The key that a client gives, or that a browser was given as password."""
    scheme, _, value = header.encode("latin-1").partition(b" ")
    if scheme.lower() == b"basic":
        with suppress(ValueError):
            return base64.b64decode(value).partition(b":")[2]
    return value if scheme.lower() == b"bearer" else b""


async def answered(metrics: Metrics, answer: Callable[[], Awaitable[dict[str, Any]]]) -> Response:
    """The answer as JSON, or why there is none; counted."""
    started, response = time.perf_counter(), Response(status_code=499)  # nobody reads it
    try:
        response = JSONResponse(await answer())
    except Refusal as refusal:
        response = _refused(refusal)
    except ClientDisconnect:
        pass
    except Exception:
        logger.exception("a request has failed")
        response = _refused(Refusal(500, "the model has failed; the server's log has the cause"))
    finally:
        metrics.seconds.observe(time.perf_counter() - started)
        metrics.requests.labels(str(response.status_code)).inc()
    return response


def _refused(refusal: Refusal) -> Response:
    """The answer in OpenAI's form."""
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    error = {"message": refusal.message, "type": kind, "param": refusal.field, "code": refusal.status}
    headers = {
        401: {"WWW-Authenticate": 'Bearer, Basic realm="embedrl serve"'},
        503: {"Retry-After": str(RETRY_AFTER_S)},
    }.get(refusal.status)
    return JSONResponse({"error": error}, refusal.status, headers)


def run_service(app: FastAPI, name: str, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Listen until stopped; the address is printed when the port is bound."""
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False)
    socket = config.bind_socket()
    print(f"serving {name} at http://{host}:{socket.getsockname()[1]}/v1/embeddings", flush=True)
    uvicorn.Server(config).run(sockets=[socket])
