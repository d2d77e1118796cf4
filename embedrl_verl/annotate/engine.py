# SPDX-License-Identifier: Apache-2.0
"""vLLM in this process, for a machine where nobody serves. Requests that wait are given to the engine together; a
server takes new ones while old ones run, so it keeps a device busier."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from embedrl_verl.annotate.backends import Refused, Reply, ServersLost, parts_of
from embedrl_verl.annotate.prompts import Messages, Prompt, Sampling
from embedrl_verl.errors import ConfigError
from embedrl_verl.families import Family
from embedrl_verl.serving.vllm import processor_arguments

FITTING = -1  # vLLM: as long as the memory has room for
WORKER = "embedrl_verl.platforms.vllm_seeds.SeedsOnCpus"
_GATHER_S = 0.05


@dataclass
class EngineBackend:
    """See `Backend`. `path`: the model's folder or hub id; `options`: more arguments of `vllm.LLM`."""

    path: str
    family: Family
    options: Mapping[str, Any] = field(default_factory=dict)
    _waiting: list[tuple[Any, asyncio.Future[Reply | Refused]]] = field(default_factory=list)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "engine"))
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _engine: Any = None
    _lost: str = ""

    def named(self) -> Mapping[str, Any]:
        return {"model": self.path, "engine": "vllm.LLM", "options": dict(self.options)}

    async def connect(self) -> Mapping[str, Any]:
        self._engine = await asyncio.get_running_loop().run_in_executor(self._thread, self._start)
        return self.named()

    def prepare(self, prompt: Prompt, sampling: Sampling) -> tuple[Any, int]:
        media: dict[str, list[Any]] = {}
        clips: list[dict[str, Any]] = []
        size = 4096
        for part in parts_of(prompt.messages):
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

    async def complete(self, request: Any) -> Reply | Refused:
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Reply | Refused] = loop.create_future()
        self._waiting.append((request, reply))
        async with self._turn:  # whoever has it takes along all that wait
            if not (reply.done() or self._lost):
                await asyncio.sleep(_GATHER_S)
                taken, self._waiting = self._waiting, []
                try:
                    found = await loop.run_in_executor(self._thread, self._run, [one for one, _ in taken])
                    for (_, one), answer in zip(taken, found, strict=True):
                        one.set_result(answer)
                except Exception as error:  # whatever it is, the engine cannot be trusted any more
                    self._lost = f"the engine has failed ({error!r}); run the command again to go on"
            if not reply.done():
                raise ServersLost(self._lost)
        return reply.result()

    async def aclose(self) -> None:
        self._thread.shutdown(wait=True)
        self._engine = None

    def _start(self) -> Any:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # another process would keep the cause of its end
        options = {
            "max_model_len": -1,
            "worker_extension_cls": WORKER,
            **self.options,
        }  # -1: as long as fits the memory
        try:
            from vllm import LLM
        except ImportError as error:
            raise ConfigError(f"--engine needs vLLM in this environment ({error}); or name a --url") from error
        try:
            return LLM(model=self.path, **options)
        except Exception as error:  # of any kind, from any library
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(
                f"vLLM must be able to load --engine {self.path} (--engine-args {dict(self.options)}); it says: {said}"
            ) from error

    def _run(self, requests: list[Any]) -> list[Reply | Refused]:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        tokenizer, prompts, params = self._engine.get_tokenizer(), [], []
        for messages, media, drawn in requests:
            text = tokenizer.apply_chat_template(_plain(messages), tokenize=False, add_generation_prompt=True)
            prompts.append({"prompt": text, **media})
            options = {name: getattr(drawn, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
            choice = StructuredOutputsParams(choice=list(drawn.choices)) if drawn.choices else None
            params.append(SamplingParams(structured_outputs=choice, **options))
        try:
            outputs = self._engine.generate(prompts, params, use_tqdm=False)
        except ValueError as error:  # a prompt that is too long, a medium that the model cannot take
            if len(requests) == 1:
                return [Refused("refused by the engine", str(error))]
            half = len(requests) // 2  # find the one at fault
            return [*self._run(requests[:half]), *self._run(requests[half:])]
        replies: list[Reply | Refused] = []
        for output in outputs:
            made, prompt_ids = output.outputs[0], output.prompt_token_ids or ()
            text = made.text.encode("utf-8", "replace").decode()
            replies.append(Reply(text, made.finish_reason == "length", len(prompt_ids), len(made.token_ids)))
        return replies


def _plain(messages: Messages) -> Messages:
    """Messages for a chat template: the kinds of media parts, without the media."""

    def content(found: Any) -> Any:
        return found if isinstance(found, str) else [p if p["type"] == "text" else {"type": p["type"]} for p in found]

    return [{**message, "content": content(message["content"])} for message in messages]
