# SPDX-License-Identifier: Apache-2.0
"""The process reward (method section 4): an instruct model on OpenAI-style servers picks a row's partner from a list.

All requests of a step run at the same time, under the pool's limit, and end at one deadline. A row whose request failed
or whose answer names no listed number is unknown: it is counted by cause and never scored as a miss.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from embedrl_verl.config.schema import JudgeConfig as JudgeSettings
from embedrl_verl.errors import EmbedRLError, MediaError
from embedrl_verl.judge.answer import is_whole_choice, parse_choice
from embedrl_verl.judge.candidates import JudgeList, judge_lists
from embedrl_verl.judge.judgement import Judgement
from embedrl_verl.judge.prompt import JudgePrompt, judge_prompt
from embedrl_verl.rewards.batch import RewardBatch
from embedrl_verl.serving import ServerError, ServerPool
from embedrl_verl.serving.sampling import NEUTRAL_SAMPLING

_LOG = logging.getLogger(__name__)
_CHAT = "/v1/chat/completions"
_NOT_VLLM = (200, 401, 403, 404, 405)
"""What servers without the route /version say of it (200: a page, no JSON); other failures say nothing of it."""
NO_NUMBER = "names no listed number"
MALFORMED = "malformed response"
CUT_OFF = "answer cut off"
UNREADABLE = "image unreadable"
IMAGE_LOADS = 4
"""Lists whose images are loaded at the same time, each in a thread."""
LONGEST_WORDS = 500


class ListwiseJudge:
    """A judge behind a pool of servers. `judge` may be called under one event loop after another.

    Args:
        pool: the judge's servers; all serve the same model.
        settings: lists, prompt and limits.
    """

    def __init__(self, pool: ServerPool, settings: JudgeSettings | None = None) -> None:
        self.pool = pool
        self.settings = settings or JudgeSettings()
        self._model = self.settings.model
        self._is_vllm: bool | None = None
        self._words: dict[str, str] = {}
        self._logged: set[str] = set()

    async def judge(
        self,
        batch: RewardBatch,
        *,
        step: int,
        identity: Sequence[str] | None = None,
        images: Callable[[int], Sequence[str] | None] | None = None,
        instructions: Sequence[str | None] | None = None,
    ) -> Judgement:
        """Judge all rows of a step.

        Args:
            batch: N rows.
            step, identity: see `judge_lists`.
            images: data: URLs of a row's input, or None; asked once a list, in a thread, if the settings show images.
            instructions: of each row's input.

        Raises:
            EmbedRLError: more rows than `max_unknown_share` are unknown (the message counts them by cause), or the
                server refuses constrained decoding.
            ValueError: `instructions` or `identity` do not fit the batch.
        """
        start = time.monotonic()
        deadline = start + self.settings.deadline_s
        if instructions is not None and len(instructions) != len(batch):
            raise ValueError(f"instructions must have one entry for each of {len(batch)} rows; got {len(instructions)}")
        lists = await asyncio.to_thread(
            judge_lists,
            batch,
            seed=self.settings.seed,
            step=step,
            hard_pairs=self.settings.hard_pairs,
            shared=self.settings.shared_lists,
            identity=identity,
        )
        before = self.pool.stats()
        answers: dict[int, int | str] = {}
        self._words = {}  # of this step's failures, by cause: what the first one said
        if lists:
            async with self.pool:
                try:
                    await self._meet(deadline)
                except ServerError as error:
                    cause = self._cause(error, hint=error.status is not None and self._model is None)
                    answers = {row: cause for listed in lists for row in listed.rows}
                else:
                    answers = await self._ask_all(batch, lists, images, instructions, deadline)
        after = self.pool.stats()
        return self._collect(
            batch,
            lists,
            answers,
            requests=after.requests - before.requests,
            retries=after.retries - before.retries,
            seconds=time.monotonic() - start,
        )

    async def _meet(self, deadline: float) -> None:
        """Ask once which model is served, and by which software."""
        if self._model is None:
            answer = await self.pool.get("/v1/models", deadline=deadline)
            try:
                self._model = str(answer["data"][0]["id"])
            except (TypeError, KeyError, IndexError) as error:
                raise EmbedRLError(
                    f"GET /v1/models of {', '.join(self.pool.urls)} must list a model; got {str(answer)[:200]}. "
                    "Name it in embedrl.judge.model"
                ) from error
        if self._is_vllm is None:
            try:
                answer = await self.pool.get("/version", deadline=deadline)
                self._is_vllm = isinstance(answer, dict) and "version" in answer
            except ServerError as error:
                if error.status is None and error.cause != "timeout":
                    raise
                if error.status not in _NOT_VLLM:  # asked again in the next step
                    _LOG.warning("judge: /version failed, so this step's answers are not constrained: %s", error)
                    return
                self._is_vllm = False
            constrained = self._is_vllm and self.settings.constrained
            _LOG.info("judge: %s decoding (%s)", "constrained" if constrained else "free", self.pool.urls[0])

    def _cause(self, error: ServerError, *, hint: bool = False) -> str:
        """The failure's cause, with the key that may mend it."""
        fix = ""
        if error.status in (401, 403):
            fix = "; name the variable of its key in embedrl.judge.api_key_env"
        elif hint:
            fix = "; a server that lists no models needs embedrl.judge.model"
        return self._note(error.cause, f"{error}{fix}")

    def _note(self, cause: str, words: str) -> str:
        """The cause, to count by; its first words are kept for the step's error, and logged once a run."""
        self._words.setdefault(cause, words)
        if cause not in self._logged:
            self._logged.add(cause)
            _LOG.warning("judge: rows are unknown: %s", words)
        return cause

    async def _ask_all(
        self,
        batch: RewardBatch,
        lists: Sequence[JudgeList],
        images: Callable[[int], Sequence[str] | None] | None,
        instructions: Sequence[str | None] | None,
        deadline: float,
    ) -> dict[int, int | str]:
        """For every listed row the number picked, or the cause of having none."""
        loop = asyncio.get_running_loop()
        tasks: dict[int, asyncio.Task[int | str]] = {}
        loads: list[asyncio.Task[Sequence[str] | None]] = []
        unreadable: dict[int, int | str] = {}
        try:
            if images is not None and self.settings.images:
                gate = asyncio.Semaphore(IMAGE_LOADS)
                loads = [loop.create_task(_load(images, listed.rows[0], gate)) for listed in lists]
            for home, listed in enumerate(lists):
                row = listed.rows[0]
                try:
                    shown = await loads[home] if loads else None
                except MediaError as error:
                    cause = self._note(UNREADABLE, str(error))
                    unreadable |= dict.fromkeys(listed.rows, cause)
                    continue
                prompt = judge_prompt(
                    [batch.tcots[candidate] for candidate in listed.candidates],
                    side=listed.side,
                    style=self.settings.style,
                    instruction=instructions[row] if instructions is not None else None,
                    images=shown or (),
                )
                for row in listed.rows:
                    request = self._ask(prompt, batch, row, len(listed), deadline, home)
                    tasks[row] = loop.create_task(request)
                # A list at a time: the loop stays free, and requests leave while others are built.
                await asyncio.sleep(0)
            await asyncio.gather(*tasks.values())
        finally:
            started: list[asyncio.Task[Any]] = [*loads, *tasks.values()]
            for task in started:
                task.cancel()
            await asyncio.gather(*started, return_exceptions=True)
        return unreadable | {row: task.result() for row, task in tasks.items()}

    async def _ask(
        self, prompt: JudgePrompt, batch: RewardBatch, row: int, n: int, deadline: float, home: int
    ) -> int | str:
        payload = {
            "model": self._model,
            "messages": prompt.messages(batch.tcots[row]),
            "max_tokens": self.settings.max_tokens,
            "temperature": self.settings.temperature,
            "top_p": 1.0,
            **(NEUTRAL_SAMPLING if self._is_vllm else {}),
            **self.settings.extra_body,
        }
        try:
            if self.settings.constrained and self._is_vllm:
                answer = await self._constrained(payload, n, deadline, home)
            else:
                answer = await self.pool.post(_CHAT, payload, deadline=deadline, home=home)
        except ServerError as error:
            return self._cause(error)
        try:
            choice = answer["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
        except (AttributeError, TypeError, KeyError, IndexError):
            return MALFORMED
        text = text if isinstance(text, str) else ""
        if reason == "length" and not is_whole_choice(text, n):
            return CUT_OFF
        return parse_choice(text, n) or NO_NUMBER

    async def _constrained(self, payload: dict[str, Any], n: int, deadline: float, home: int) -> Any:
        choices = {"structured_outputs": {"choice": [str(number) for number in range(1, n + 1)]}}
        try:
            return await self.pool.post(_CHAT, payload | choices, deadline=deadline, home=home)
        except ServerError as error:
            if error.status != 400:
                raise
            # Is it the constraint that the server refuses, or the request (such as a prompt that is too long)?
            await self.pool.post(_CHAT, payload, deadline=deadline, home=home)
            raise EmbedRLError(
                "the judge's server refuses constrained decoding (field structured_outputs) and answers without it; "
                f"set embedrl.judge.constrained=False. It said: {error}"
            ) from error

    def _collect(
        self,
        batch: RewardBatch,
        lists: Sequence[JudgeList],
        answers: dict[int, int | str],
        *,
        requests: int,
        retries: int,
        seconds: float,
    ) -> Judgement:
        scores = torch.full((len(batch),), torch.nan)
        picks = torch.zeros(len(batch), dtype=torch.int64)
        own_positions: list[tuple[int, ...]] = [()] * len(batch)
        causes: Counter[str] = Counter()
        for listed in lists:
            own = tuple(number for number, is_own in enumerate(listed.own, start=1) if is_own)
            for row in listed.rows:
                own_positions[row] = own
                answer = answers[row]
                if isinstance(answer, str):
                    causes[answer] += 1
                else:
                    picks[row] = answer
                    scores[row] = float(listed.own[answer - 1])
        unknown, allowed = causes.total(), self.settings.max_unknown_share
        if unknown > allowed * len(answers):
            counted = "; ".join(f"{count} x {cause}" for cause, count in causes.most_common())
            words = next((self._words[cause] for cause, _ in causes.most_common() if cause in self._words), "")
            raise EmbedRLError(
                f"the judge left {unknown} of {len(answers)} rows unknown, more than embedrl.judge.max_unknown_share="
                f"{allowed}. Causes: {counted}. Servers: {', '.join(self.pool.urls)}"
                + (f". The first failure: {words[:LONGEST_WORDS]}" if words else "")
            )
        return Judgement(
            scores=scores,
            picks=picks,
            side=batch.side,
            own_positions=tuple(own_positions),
            lists=tuple(lists),
            causes=causes,
            requests=requests,
            retries=retries,
            seconds=seconds,
        )


async def _load(
    images: Callable[[int], Sequence[str] | None], row: int, gate: asyncio.Semaphore
) -> Sequence[str] | None:
    async with gate:
        return await asyncio.to_thread(images, row)
