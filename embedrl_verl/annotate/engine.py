# SPDX-License-Identifier: Apache-2.0
"""vLLM in this process, for a machine where nobody serves: the class `LLM`, imported when it is needed.

Requests that wait are given to the engine together. It has no server, so a server (which takes new requests while old
ones run) keeps a device busier; for more than some thousand rows start one and name its --url.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from embedrl_verl.annotate.backends import Refused, Reply, Request, Sampling, ServersLost
from embedrl_verl.annotate.prompts import Messages, Prompt
from embedrl_verl.errors import ConfigError
from embedrl_verl.families import Family
from embedrl_verl.serving.vllm import processor_arguments

_GATHER_S = 0.05


@dataclass
class EngineBackend:
    """An engine of this process.

    Attributes:
        path: the model's folder or hub id.
        family: of the model.
        options: more arguments of `vllm.LLM`.
    """

    path: str
    family: Family
    options: Mapping[str, Any] = field(default_factory=dict)
    _waiting: list[tuple[Request, asyncio.Future[Reply | Refused]]] = field(default_factory=list)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "engine"))
    _driver: asyncio.Task[None] | None = None
    _engine: Any = None
    _tokenizer: Any = None

    def wanted(self) -> Mapping[str, Any]:
        """See `Backend`."""
        return {"model": self.path, "engine": "vllm.LLM", "options": dict(self.options)}

    async def meet(self) -> Mapping[str, Any]:
        """See `Backend`."""
        loop = asyncio.get_running_loop()
        self._engine = await loop.run_in_executor(self._thread, self._start)
        self._tokenizer = self._engine.get_tokenizer()
        self._driver = loop.create_task(self._drive())
        return self.wanted()

    def prepare(self, prompt: Prompt, sampling: Sampling) -> tuple[Request, int]:
        """See `Backend`."""
        media: dict[str, list[Any]] = {}
        clips: list[dict[str, Any]] = []
        size = 4096
        for message in prompt.messages:
            for part in () if isinstance(message["content"], str) else message["content"]:
                if part["type"] == "image":
                    media.setdefault("image", []).append(part["image"])
                    size += 3 * part["image"].width * part["image"].height
                elif part["type"] == "video":
                    frames_THWC = np.stack([np.asarray(frame) for frame in part["video"]])
                    clips.append(part["times"].metadata())
                    media.setdefault("video", []).append((frames_THWC, {**clips[-1], "do_sample_frames": False}))
                    size += frames_THWC.nbytes
        processor = processor_arguments(self.family, clips)
        data = {"multi_modal_data": media} if media else {}
        return (prompt.messages, data | ({"mm_processor_kwargs": processor} if processor else {}), sampling), size

    async def complete(self, request: Request) -> Reply | Refused:
        """See `Backend`."""
        reply: asyncio.Future[Reply | Refused] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, reply))
        return await reply

    async def aclose(self) -> None:
        """See `Backend`."""
        if self._driver is not None:
            self._driver.cancel()
        self._thread.shutdown(wait=True)
        self._engine = None

    async def _drive(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_GATHER_S)
            taken, self._waiting = self._waiting, []
            taken = [one for one in taken if not one[1].done()]
            if not taken:
                continue
            try:
                replies = await loop.run_in_executor(self._thread, self._run, [request for request, _ in taken])
            except Exception as error:  # whatever it is, the engine cannot be trusted any more
                lost = ServersLost(f"the engine has failed ({error!r}); run the command again to go on")
                lost.__cause__ = error
                for _, reply in taken:
                    if not reply.done():
                        reply.set_exception(lost)
                continue
            for (_, reply), found in zip(taken, replies, strict=True):
                if not reply.done():
                    reply.set_result(found)

    def _start(self) -> Any:
        try:
            from vllm import LLM
        except ImportError as error:
            raise ConfigError(
                f"--engine needs vLLM in this environment ({error}); or name a server with --url"
            ) from error
        try:
            return LLM(model=self.path, **dict(self.options))
        except (OSError, TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"vLLM must be able to load --engine {self.path} (--engine-args {dict(self.options)}); it says: {error}"
            ) from error

    def _run(self, requests: list[Request]) -> list[Reply | Refused]:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        prompts, params = [], []
        for messages, media, sampling in requests:
            text = self._tokenizer.apply_chat_template(plain(messages), tokenize=False, add_generation_prompt=True)
            prompts.append({"prompt": text, **media})
            choice = StructuredOutputsParams(choice=list(sampling.choices)) if sampling.choices else None
            params.append(
                SamplingParams(
                    max_tokens=sampling.max_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=sampling.seed,
                    structured_outputs=choice,
                )
            )
        try:
            outputs = self._engine.generate(prompts, params, use_tqdm=False)
        except ValueError as error:  # a prompt that is too long, a medium that the model cannot take
            if len(requests) == 1:
                return [Refused("refused by the engine", str(error))]
            half = len(requests) // 2  # find the one at fault
            return [*self._run(requests[:half]), *self._run(requests[half:])]
        return [
            Reply(
                output.outputs[0].text.encode("utf-8", "replace").decode(),
                output.outputs[0].finish_reason == "length",
                len(output.prompt_token_ids or ()),
                len(output.outputs[0].token_ids),
            )
            for output in outputs
        ]


def plain(messages: Messages) -> Messages:
    """Messages for a chat template: the kinds of media parts, without the media."""
    return [
        message
        if isinstance(message["content"], str)
        else {
            **message,
            "content": [part if part["type"] == "text" else {"type": part["type"]} for part in message["content"]],
        }
        for message in messages
    ]
