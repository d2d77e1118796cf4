# SPDX-License-Identifier: Apache-2.0
"""Who answers: OpenAI-style servers behind a `ServerPool`. (`engine` has vLLM in this process.)

What fails is one of three things: the request itself, or it alone again and again (`Refused`, an outcome of its row);
the settings (ConfigError); or everybody, for `patience_s` (ServersLost: the job stops and can be resumed).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from embedrl_verl.annotate.prompts import Messages, Prompt, Sampling
from embedrl_verl.errors import ConfigError, EmbedRLError
from embedrl_verl.families import Family
from embedrl_verl.serving import ServerError, ServerPool
from embedrl_verl.serving.vllm import NEUTRAL_SAMPLING, clip_part, image_part, request_arguments

_LOG = logging.getLogger(__name__)
CHAT = "/v1/chat/completions"
OURS = ("model", "messages", "max_tokens", "temperature", "top_p", "seed")
_PAUSE_S, _FIRST_LOOK_S = 1.0, 10.0
_SETTINGS_WRONG = (401, 402, 403, 404, 405)
_TRIES, _TRIES_OTHERS = 3, 30
"""Rounds of the pool's tries after which a request that servers break at (others: that has to wait, or loses its
connection) is refused if another one is answered."""


class ServersLost(EmbedRLError):
    """No server answers; the job can be resumed."""


@dataclass(frozen=True)
class Reply:
    """A model's reply. `cut_off`: it ended at max_tokens. Token counts are the server's; None if it gave none."""

    text: str
    cut_off: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True)
class Refused:
    """The request has no reply, for a reason of its own. `cause`: a few words to count by; `is_input_fault`: a server
    has read and refused it (others have failed at it again and again)."""

    cause: str
    detail: str
    is_input_fault: bool = True


class Backend(Protocol):
    """Who answers. `connect` comes before `prepare`, in the event loop that then calls `complete`."""

    def named(self) -> Mapping[str, Any]:
        """What the user has said of the model, known before anybody is reached."""

    async def connect(self) -> Mapping[str, Any]:
        """What is served, as facts that belong to the settings: "model", and whatever changes the questions."""

    def prepare(self, prompt: Prompt, sampling: Sampling) -> tuple[Any, int]:
        """A request, and how many bytes of memory it takes. Blocks; called in threads."""

    async def complete(self, request: Any) -> Reply | Refused: ...

    async def aclose(self) -> None: ...


@dataclass
class ServerBackend:
    """Servers of one model (None: the one that they list). `videos`: auto, "video_url" (vLLM's list of frames) or
    "images"; `extra`: more fields of every request; `patience_s`: without any answer, then the job stops."""

    pool: ServerPool
    family: Family
    model: str | None = None
    videos: str = "auto"
    extra: Mapping[str, Any] = field(default_factory=dict)
    patience_s: float = 300.0
    is_vllm: bool = False
    _failing_since: float | None = None

    def __post_init__(self) -> None:
        if taken := sorted(set(self.extra) & set(OURS)):
            raise ConfigError(f"extra fields of a request must not be {', '.join(OURS)}; got {taken}")

    def named(self) -> Mapping[str, Any]:
        return {"model": self.model, "videos": self.videos, "extra": dict(self.extra)}

    async def connect(self) -> Mapping[str, Any]:
        listed, urls = await self._models(), ", ".join(self.pool.urls)
        names = [str(entry["id"]) for entry in listed]
        if self.model is None and len(names) != 1:
            raise ConfigError(f"name the model (--model): {urls} list {names or 'none'}")
        if self.model is not None and names and self.model not in names:
            raise ConfigError(f"--model must be one that {urls} serve, {names}; got {self.model!r}")
        self.model = self.model or names[0]
        self.is_vllm = any(entry.get("owned_by") == "vllm" for entry in listed)
        if self.videos == "auto":
            self.videos = "video_url" if self.is_vllm else "images"
        return {"model": self.model, "videos": self.videos, "vllm": self.is_vllm}

    async def _models(self) -> list[dict[str, Any]]:
        """What the servers list; [] from servers without such a page. Waits for one that is not up yet."""
        start, urls, failure = time.monotonic(), ", ".join(self.pool.urls), None
        for patience in (min(_FIRST_LOOK_S, self.patience_s), self.patience_s):
            if failure is not None:
                _LOG.warning("%s: no answer yet (%s); waiting %g s in all (--patience)", urls, failure, self.patience_s)
            try:
                return await self.pool.models(deadline=start + patience)
            except ServerError as error:
                if error.status in (401, 403):
                    raise ConfigError(f"{error}. Check the key") from error
                if not error.transient:
                    return []
                failure = error
        raise ServersLost(f"{urls}: {failure}. Is a server running there? Start it, then run the command again")

    def prepare(self, prompt: Prompt, sampling: Sampling) -> tuple[bytes, int]:
        payload = {name: getattr(sampling, name) for name in OURS[2:]} | (NEUTRAL_SAMPLING if self.is_vllm else {})
        payload |= {"model": self.model, "messages": encode(prompt.messages, videos=self.videos), **self.extra}
        if sampling.choices and self.is_vllm:
            payload.setdefault("structured_outputs", {"choice": list(sampling.choices)})
        clips = [part for part in parts_of(prompt.messages) if part["type"] == "video"]
        if clips and self.videos == "video_url":
            payload |= request_arguments(self.family, clips[0]["times"])
        body = json.dumps(payload).encode()  # here, in a thread: with images it is large
        return body, len(body) + 4096

    async def complete(self, request: bytes) -> Reply | Refused:
        tries = 0
        while True:
            was_up = any(server.up for server in self.pool.servers)  # else nobody sees this round's request
            try:
                answer = await self.pool.post(CHAT, request)
                self._failing_since = None
                return read_reply(answer)
            except ServerError as error:
                if error.status in _SETTINGS_WRONG:
                    raise ConfigError(f"{error}. Check --url, --model, the key and the account") from error
                if error.status is not None and not error.transient:
                    return Refused(error.cause, str(error))
                self._failing_since = self._failing_since or time.monotonic()
                tries += was_up
                is_broken = error.cause == "timeout" or (error.status or 0) >= 500
                is_tried = tries >= (_TRIES if is_broken else _TRIES_OTHERS)
                is_late = time.monotonic() - self._failing_since > self.patience_s
                if is_tried or is_late:
                    is_well = await self._is_well()
                    if is_well and is_tried:
                        return Refused(error.cause, str(error), is_input_fault=False)
                    if is_late and not is_well:
                        why = f"nothing is answered any more, for {self.patience_s:g} s (--patience)"
                        raise ServersLost(f"{error}; {why}. Mend the servers, then run the command again") from error
            await asyncio.sleep(_PAUSE_S * min(tries + 1, 5))

    async def _is_well(self) -> bool:
        """Whether a request that nothing is wrong with is answered: then what fails is another one's own fault."""
        hello = {"model": self.model, "messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 1}
        try:
            if not any(server.up for server in self.pool.servers):
                return False
            await self.pool.post(CHAT, hello)
        except ServerError:
            return False
        self._failing_since = None
        return True

    async def aclose(self) -> None:
        await self.pool.aclose()


def read_reply(answer: Any) -> Reply | Refused:
    """The reply in a chat completion."""
    try:
        choice = answer["choices"][0]
        text, reason = choice["message"].get("content"), choice.get("finish_reason")
    except (TypeError, KeyError, IndexError, AttributeError):
        return Refused("malformed response", repr(answer)[:300], is_input_fault=False)
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
