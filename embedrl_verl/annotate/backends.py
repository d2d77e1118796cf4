# SPDX-License-Identifier: Apache-2.0
"""Who answers: OpenAI-style servers behind a `ServerPool`. (`engine` has vLLM in this process.)

What fails is one of three things: the request itself, or it alone again and again (`Refused`, an outcome of its row);
the settings (ConfigError); or everybody, for `patience_s` (ServersLost: the job stops and can be resumed).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from embedrl_verl.annotate.prompts import Messages, Prompt
from embedrl_verl.errors import ConfigError, EmbedRLError
from embedrl_verl.families import Family
from embedrl_verl.serving import ServerError, ServerPool
from embedrl_verl.serving.vllm import NEUTRAL_SAMPLING, clip_part, image_part, request_arguments

CHAT = "/v1/chat/completions"
OURS = ("model", "messages", "max_tokens", "temperature", "top_p", "seed")
_LOOK_S, _PAUSE_S = 0.5, 1.0
_SETTINGS_WRONG = (401, 402, 403, 404, 405)
_TRIES_BESIDE_OTHERS, _TRIES_ALONE, _TRIES_BUSY = 3, 5, 30
"""Rounds of the pool's tries after which a request is refused (busy: as often as it is told to wait while others are
answered), and rounds in which nobody is answered, after which the servers are lost."""
_FOREVER_S = 1e9


class ServersLost(EmbedRLError):
    """No server answers; the job can be resumed."""


@dataclass(frozen=True)
class Sampling:
    """How one reply is drawn: as one of `choices`, where the backend can see to it."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """A model's reply. `cut_off`: it ended at max_tokens. Token counts are the server's; None if it gave none."""

    text: str
    cut_off: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True)
class Refused:
    """The request has no reply, for a reason of its own. `cause`: a few words to count by."""

    cause: str
    detail: str


class Backend(Protocol):
    """Who answers. `connect` comes before `prepare`, in the event loop that then calls `complete`."""

    def wanted(self) -> Mapping[str, Any]:
        """The facts of `connect` that the user has named, known before anybody is reached."""

    async def connect(self) -> Mapping[str, Any]:
        """What is served, as facts that belong to the settings: "model", and whatever changes the questions."""

    def prepare(self, prompt: Prompt, sampling: Sampling) -> tuple[Any, int]:
        """A request, and how many bytes of memory it takes. Blocks; called in threads."""

    async def complete(self, request: Any) -> Reply | Refused: ...

    async def aclose(self) -> None: ...


@dataclass
class ServerBackend:
    """Servers of one model (None: the one that they list). `videos`: auto, "video_url" (vLLM's list of frames) or
    "images"; `extra`: more fields of every request; `patience_s`: without a server that is up, then the job stops."""

    pool: ServerPool
    family: Family
    model: str | None = None
    videos: str = "auto"
    extra: Mapping[str, Any] = field(default_factory=dict)
    patience_s: float = 300.0
    is_vllm: bool = False
    _answered: int = 0
    _lost: str = ""
    _watch: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        if self.videos not in ("auto", "video_url", "images"):
            raise ConfigError(f"videos must be sent as auto, video_url or images; got {self.videos!r}")
        if taken := sorted(set(self.extra) & set(OURS)):
            raise ConfigError(f"extra fields of a request must not be {', '.join(OURS)}; got {taken}")

    def wanted(self) -> Mapping[str, Any]:
        named = {"extra": dict(self.extra)} | ({"model": self.model} if self.model is not None else {})
        return named | ({"videos": self.videos} if self.videos != "auto" else {})

    async def connect(self) -> Mapping[str, Any]:
        try:
            listed = await self.pool.models(deadline=time.monotonic() + self.patience_s)
        except ServerError as error:
            if error.status in (401, 403):
                raise ConfigError(f"{error}. Check the key") from error
            if error.transient:
                raise ServersLost(
                    f"{error}. Is a server running there? Start it, then run the command again"
                ) from error
            listed = []  # the server has no such page
        names, urls = [str(entry["id"]) for entry in listed], ", ".join(self.pool.urls)
        if self.model is None and len(names) != 1:
            raise ConfigError(f"name the model (--model): {urls} list {names or 'none'}")
        if self.model is not None and names and self.model not in names:
            raise ConfigError(f"--model must be one that {urls} serve, {names}; got {self.model!r}")
        self.model = self.model or names[0]
        self.is_vllm = any(entry.get("owned_by") == "vllm" for entry in listed)
        if self.videos == "auto":
            self.videos = "video_url" if self.is_vllm else "images"
        self._watch = asyncio.create_task(self._look())
        return {"model": self.model, "videos": self.videos, "vllm": self.is_vllm, "extra": dict(self.extra)}

    def prepare(self, prompt: Prompt, sampling: Sampling) -> tuple[bytes, int]:
        payload = {name: getattr(sampling, name) for name in OURS[2:]} | (NEUTRAL_SAMPLING if self.is_vllm else {})
        payload |= {"model": self.model, "messages": encode(prompt.messages, videos=self.videos), **self.extra}
        if sampling.choices and self.is_vllm:
            payload.setdefault("structured_outputs", {"choice": list(sampling.choices)})
        clips = [part for part in parts_of(prompt.messages) if part["type"] == "video"]
        if clips and self.videos == "video_url":
            if len(clips) > 1:
                raise ConfigError(f"a request can hold one video; got {len(clips)}")
            payload |= request_arguments(self.family, clips[0]["times"])
        body = json.dumps(payload).encode()  # here, in a thread: with images it is large
        return body, len(body) + 4096

    async def complete(self, request: bytes) -> Reply | Refused:
        tries = alone = 0
        while not self._lost:
            before = self._answered
            try:
                answer = await self.pool.post(CHAT, request, deadline=time.monotonic() + _FOREVER_S)
                self._answered += 1
                return read_reply(answer)
            except ServerError as error:
                if self._lost:
                    break
                if error.status in _SETTINGS_WRONG:
                    raise ConfigError(f"{error}. Check --url, --model, the key and the account") from error
                tries, is_busy = tries + 1, error.status == 429
                others = self._answered > before if is_busy else tries >= _TRIES_BESIDE_OTHERS and await self._is_well()
                alone = 0 if others else alone + 1
                is_its_own = not error.transient and error.status is not None
                if is_its_own or (others and tries >= (_TRIES_BUSY if is_busy else _TRIES_BESIDE_OTHERS)):
                    return Refused(error.cause, str(error))
                if alone >= _TRIES_ALONE:
                    why = "no request is answered any more. Mend the servers, then run the command again"
                    raise ServersLost(f"{error}; {why}") from error
            await asyncio.sleep(_PAUSE_S * min(tries, _TRIES_ALONE))
        raise ServersLost(self._lost)

    async def _is_well(self) -> bool:
        """Whether a request that nothing is wrong with is answered: then what fails is another one's own fault."""
        hello = {"model": self.model, "messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 1}
        try:
            await self.pool.post(CHAT, hello, deadline=time.monotonic() + self.patience_s)
        except ServerError:
            return False
        return True

    async def aclose(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        await self.pool.aclose()

    async def _look(self) -> None:
        """Close the pool, so that waiting requests end, when no server was up for `patience_s`."""
        since = time.monotonic()
        while time.monotonic() - since <= self.patience_s:
            if any(server.up for server in self.pool.servers):
                since = time.monotonic()
            await asyncio.sleep(_LOOK_S)
        errors = "; ".join(f"{server.url}: {server.last_error}" for server in self.pool.servers)
        self._lost = f"no server was up for {self.patience_s:g} s ({errors}). Start them, then run the command again"
        await self.pool.aclose()


def read_reply(answer: Any) -> Reply | Refused:
    """The reply in a chat completion."""
    try:
        choice = answer["choices"][0]
        text, reason = choice["message"].get("content"), choice.get("finish_reason")
    except (TypeError, KeyError, IndexError, AttributeError):
        return Refused("malformed response", repr(answer)[:300])
    usage = answer["usage"] if isinstance(answer.get("usage"), dict) else {}
    clean = (text if isinstance(text, str) else "").encode("utf-8", "replace").decode()  # lone surrogates
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return Reply(clean, reason == "length", *(count if type(count) is int else None for count in counts))


def encode(messages: Messages, *, videos: str) -> Messages:
    """Messages with media as data: URLs. Pixels travel without loss, as PNG."""

    def parts(part: Mapping[str, Any]) -> list[dict[str, Any]]:
        if part["type"] == "video":
            return list(map(image_part, part["video"])) if videos == "images" else [clip_part(part["video"])]
        return [image_part(part["image"]) if part["type"] == "image" else dict(part)]

    def content(found: Any) -> Any:
        return found if isinstance(found, str) else [new for part in found for new in parts(part)]

    return [{**message, "content": content(message["content"])} for message in messages]


def parts_of(messages: Messages) -> list[dict[str, Any]]:
    """The parts of all messages, in order."""
    return [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
