# SPDX-License-Identifier: Apache-2.0
"""Reasoners that vLLM runs: in this process, or behind OpenAI-style servers. The requests are those of annotation
(embedrl_verl/annotate), greedy."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from embedrl_verl.annotate.backends import Backend, Reply, ServerBackend
from embedrl_verl.annotate.engine import EngineBackend
from embedrl_verl.annotate.prompts import Sampling, TcotPrompts
from embedrl_verl.config.schema import MediaConfig
from embedrl_verl.data.media import MediaLimits
from embedrl_verl.families import Family
from embedrl_verl.model.tcots import FAILURES, Ask, Written
from embedrl_verl.serving import PoolSettings, ServerPool

_T = TypeVar("_T")
IN_FLIGHT = 256
PATIENCE_S = 60.0
"""How long nothing may be answered before the servers count as lost."""


class Loop:
    """An event loop in a thread of its own, for code that is not asynchronous."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name="embedrl-model").start()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The result of `work`; its errors are raised here."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class BackendReasoner:
    """A Reasoner behind a `Backend`; a request at a time for each input, up to `IN_FLIGHT` at once."""

    def __init__(self, backend: Backend, prompts: TcotPrompts, max_new_tokens: int) -> None:
        self.family = prompts.family
        self._backend, self._prompts = backend, prompts
        self._sampling = Sampling(max_new_tokens)
        self._loop = Loop()
        self._loop.run(backend.connect())

    def write(self, asks: Sequence[Ask]) -> list[Written]:
        """See `Writes`."""
        return self._loop.run(self._write(asks))

    async def _write(self, asks: Sequence[Ask]) -> list[Written]:
        turns = asyncio.Semaphore(IN_FLIGHT)
        return list(await asyncio.gather(*(self._one(ask, turns) for ask in asks)))

    async def _one(self, ask: Ask, turns: asyncio.Semaphore) -> Written:
        async with turns:
            try:
                prompt = await asyncio.to_thread(self._prompts.of, *ask)
            except FAILURES as error:
                return Written(None, problem=str(error))
            request, _ = await asyncio.to_thread(self._backend.prepare, prompt, self._sampling)
            reply = await self._backend.complete(request)
        if isinstance(reply, Reply):
            return Written(reply.text, prompt.seen_sizes, tokens=reply.completion_tokens)
        return Written(None, problem=f"{reply.cause}: {reply.detail}", is_input_fault=reply.is_input_fault)


def _prompts(family: Family, media: MediaConfig, limits: MediaLimits) -> TcotPrompts:
    return TcotPrompts(family, media.prompt_style, media.few_shot, limits)


def engine_reasoner(
    path: str, family: Family, media: MediaConfig, limits: MediaLimits, max_new_tokens: int
) -> BackendReasoner:
    """vLLM in this process."""
    return BackendReasoner(EngineBackend(path, family), _prompts(family, media, limits), max_new_tokens)


def server_reasoner(
    urls: Sequence[str], family: Family, media: MediaConfig, limits: MediaLimits, max_new_tokens: int
) -> BackendReasoner:
    """Servers of one model, as `vllm serve` starts them."""
    pool = ServerPool(urls, PoolSettings(limit=IN_FLIGHT), name="Reasoner's server")
    backend = ServerBackend(pool, family, patience_s=PATIENCE_S)
    return BackendReasoner(backend, _prompts(family, media, limits), max_new_tokens)
