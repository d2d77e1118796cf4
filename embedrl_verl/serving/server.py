# SPDX-License-Identifier: Apache-2.0
"""One OpenAI-style server: its address, what is known of it, and one attempt of a request by `AsyncOpenAI`."""

from __future__ import annotations

import asyncio
import email.utils
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
from openai import APIConnectionError, APIStatusError, AsyncOpenAI

from embedrl_verl.errors import ConfigError, EmbedRLError

_T = TypeVar("_T")
_EXCERPT = 300  # longest part of a server's message in an error
_TRANSIENT = (408, 425, 429)  # time-out, too early, too many: they say "send it again"


class ServerError(EmbedRLError):
    """A request, or one attempt of it, that has no answer.

    Attributes:
        cause: a few words to count failures by, such as "timeout", "connection refused", "HTTP 503", "no server is up",
            "deadline". It names neither the server nor the request.
        status: the HTTP status if a server answered the last attempt, else None.
    """

    def __init__(self, message: str, cause: str = "", status: int | None = None) -> None:
        super().__init__(message)
        self.cause = cause
        self.status = status

    @property
    def transient(self) -> bool:
        """Whether another attempt may succeed; not so if a server refused the request itself."""
        return self.status is None or not 400 <= self.status < 500 or self.status in _TRANSIENT


@dataclass(eq=False)
class Server:
    """State of one server; it outlives event loops.

    `requests` counts attempts; `ready_at` is the monotonic time before which it asked not to be called (Retry-After);
    `last_error` is the cause of its last failure as a server, "" if it never had one.
    """

    url: str
    up: bool = True
    in_flight: int = 0
    requests: int = 0
    ready_at: float = 0.0
    last_error: str = ""

    async def exchange(
        self, client: AsyncOpenAI, path: str, body: Mapping[str, Any] | bytes | None, timeout_s: float
    ) -> Any:
        """One attempt: POST, or GET without a body. The decoded JSON answer, None for an empty one."""
        if body is None:
            sent = client.get(path, cast_to=bytes)
        elif isinstance(body, bytes):
            sent = client.post(path, cast_to=bytes, content=body)
        else:
            sent = client.post(path, cast_to=bytes, body=body)
        try:
            answer = (await within(timeout_s, asyncio.ensure_future(sent))).result()
        except TimeoutError:
            raise self._error("timeout", f"no answer within {timeout_s:.3g} s") from None
        except APIStatusError as error:
            retry_after = error.response.headers.get("Retry-After", "")
            self.ready_at = max(self.ready_at, time.monotonic() + seconds_to_wait(retry_after, timeout_s))
            said = error.body.get("message", error.body) if isinstance(error.body, dict) else error.body
            detail = repr(str(said or "")[:_EXCERPT])
            raise self._error(f"HTTP {error.status_code}", detail, error.status_code) from error
        except APIConnectionError as error:
            raise self._error(*_connection_failure(error)) from error
        try:
            return json.loads(answer) if answer else None
        except ValueError as error:
            raise self._error("not JSON", repr(answer[:_EXCERPT]), 200) from error

    def _error(self, cause: str, detail: str, status: int | None = None) -> ServerError:
        return ServerError(f"{self.url}: {cause} ({detail})", cause, status)


async def within(seconds: float | None, task: asyncio.Task[_T] | asyncio.Future[_T]) -> asyncio.Future[_T]:
    """The task when it is done; it is cancelled with the caller, and after `seconds`.

    `asyncio.wait_for` may swallow a cancellation before Python 3.12, and `asyncio.timeout` came with 3.11.
    """
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to read it
    try:
        await asyncio.wait((task,), timeout=seconds)
        if not task.done():
            raise TimeoutError
        return task
    finally:
        task.cancel()


def _connection_failure(error: BaseException) -> tuple[str, str]:
    """Cause and detail of an APIConnectionError, which itself says "Connection error." or "Request timed out."."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    cause = "connection lost"
    if any(isinstance(one, ConnectionRefusedError) for one in chain):
        cause = "connection refused"
    elif any(isinstance(one, aiohttp.ClientConnectorError) for one in chain):
        cause = "cannot connect"
    return cause, str(chain[-1]) or type(chain[-1]).__name__


def seconds_to_wait(retry_after: str, longest: float) -> float:
    """Seconds that a Retry-After header (a number, or a date) asks for, in [0, longest]; 0 if it is neither."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(0.0, seconds), longest)  # in this order NaN is 0


def server_url(url: str) -> str:
    """Normalise an address: "host:8000", "http://host:8000/" and "http://host:8000/v1" are the same server.

    Returns:
        "http(s)://host[:port][/prefix]" without a slash at its end.
    """
    text = url.strip() if isinstance(url, str) else ""
    parts = urlsplit(text if "://" in text else f"http://{text}")
    try:
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # urlsplit reads the port when it is asked for
        valid = False
    if not valid or any(character.isspace() for character in text):
        raise ConfigError(f"a server's URL must read http://host:port (https, a path and /v1 are allowed); got {url!r}")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(
            "a server's URL must be an address alone, without user name, query or fragment (a key is passed apart); "
            f"got one for host {parts.hostname!r}"
        )
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}"
