# SPDX-License-Identifier: Apache-2.0
"""The process reward (method section 4): an instruct model on OpenAI-style servers picks a row's partner from a list.

All requests of a step run at the same time, under the pool's limit, and end at one deadline. A row whose request failed
or whose answer names no listed number is unknown: it is counted by cause and never scored as a miss.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from embedrl_verl.config.schema import JudgeConfig
from embedrl_verl.errors import EmbedRLError, MediaError
from embedrl_verl.judge.lists import JudgeList, judge_lists
from embedrl_verl.judge.prompt import JudgePrompt, judge_prompt
from embedrl_verl.rewards import SIDES, RewardBatch
from embedrl_verl.serving import ServerError, ServerPool
from embedrl_verl.serving.vllm import NEUTRAL_SAMPLING

_LOG = logging.getLogger(__name__)
_CHAT = "/v1/chat/completions"
PLACEHOLDER = "http://judge"
"""Stands for the servers that verl has not started yet."""
NO_NUMBER = "names no listed number"
MALFORMED = "malformed response"
CUT_OFF = "answer cut off"
UNREADABLE = "image unreadable"
AT_ONCE = 4
"""Lists whose images are loaded and whose prompts are written at the same time, each in a thread."""
LONGEST_WORDS = 500
_KEY_FIX = "; name the variable of its key in embedrl.judge.api_key_env"
_MODEL_FIX = "; a server that lists no models needs embedrl.judge.model"
_POSITIONS = 12  # of which the log shows the bias
# Decimals, ranges and negative numbers are read as a whole, so that no part of them passes for a choice.
_NUMBER = re.compile(r"-?[0-9]+(?:[.,][0-9]+)*")

ImagesOf: TypeAlias = Callable[[int], Sequence[str] | None]


class _Unknown(NamedTuple):
    """Why a row has no answer: the cause, to count by, and what the server said."""

    cause: str
    words: str = ""


@dataclass(frozen=True, eq=False, repr=False)  # asyncio.run prints a result for itself
class Judgement:
    """Result of `ListwiseJudge.judge` for N rows.

    scores: (N,) float32, J of eq. 4: 1 the judge picked a candidate of the own pair, 0 another one, NaN unknown.
    picks: (N,) int64, number of the candidate picked, counted from 1; 0 = none.
    causes: how many rows with a list are unknown for which cause.
    requests, retries: requests sent, and attempts beyond the first of each.
    seconds: of the whole stage.
    """

    scores: Tensor
    picks: Tensor
    lists: tuple[JudgeList, ...]
    causes: Counter[str]
    requests: int
    retries: int
    seconds: float

    def metrics(self) -> dict[str, float]:
        """Numbers for the log, each with the prefix `judge/`; a mean over no row is left out.

        `blind_rate` is what a judge that cannot read would hit on the same lists (the own pair's share of each); it and
        `hit_rate` are over the rows that were judged. `unknown_rate` is of the rows with a list. By position p:
        `picked_at/<p>` share of picks, `own_at/<p>` share of lists in which the own pair stands there, both over judged
        rows whose list is that long, and `hit_at/<p>` hit rate of the picks there. A judge without position bias picks
        where own candidates are.
        """
        rows = len(self.scores)
        length, side = torch.zeros(2, rows, dtype=torch.int64)
        blind = torch.full((rows,), torch.nan, dtype=torch.float64)
        own = torch.zeros(rows, _POSITIONS + 1, dtype=torch.bool)  # of position 0 nothing is said
        for listed in self.lists:
            of_list = torch.tensor(listed.rows)
            length[of_list], blind[of_list], side[of_list] = len(listed), listed.own_share, SIDES.index(listed.side)
            shown = torch.tensor(listed.own[:_POSITIONS])
            own[of_list, 1 : len(shown) + 1] = shown
        known, with_list = ~self.scores.isnan(), length > 0
        result = {"rows_without_list": float((~with_list).sum())}
        for name, group in (("mean", known), *((name, known & (side == i)) for i, name in enumerate(SIDES))):
            if group.any():
                result[f"hit_rate/{name}"] = float(self.scores[group].double().mean())
                result[f"blind_rate/{name}"] = float(blind[group].mean())
        if known.any():
            result["hit_above_blind"] = result["hit_rate/mean"] - result["blind_rate/mean"]
        if with_list.any():
            result["unknown_rate"] = float((with_list & ~known).sum() / with_list.sum())
        for place in range(1, _POSITIONS + 1):
            group = known & (length >= place)
            if not group.any():
                break
            picked = group & (self.picks == place)
            result[f"picked_at/{place}"] = float(picked.sum() / group.sum())
            result[f"own_at/{place}"] = float(own[group, place].double().mean())
            if picked.any():
                result[f"hit_at/{place}"] = float(self.scores[picked].double().mean())
        result |= {f"unknown/{cause.replace(' ', '_')}": float(count) for cause, count in self.causes.items()}
        result |= {"requests": float(self.requests), "retries": float(self.retries), "seconds": self.seconds}
        result["requests_per_second"] = self.requests / self.seconds
        return {f"judge/{name}": value for name, value in result.items()}


class ListwiseJudge:
    """A judge behind a pool of servers. `judge` may be called under one event loop after another."""

    def __init__(self, pool: ServerPool, settings: JudgeConfig | None = None) -> None:
        self.pool = pool
        self.settings = settings or JudgeConfig()
        self._model: str | None = None
        self._is_vllm: bool | None = None
        self._logged: set[str] = set()

    async def judge(
        self,
        batch: RewardBatch,
        *,
        step: int,
        identity: Sequence[str] | None = None,
        images: ImagesOf | None = None,
        instructions: Sequence[str | None] | None = None,
    ) -> Judgement:
        """Judge all N rows of a step.

        Args:
            step, identity: see `judge_lists`.
            images: data: URLs of a row's input, or None; asked once a list, in a thread, if the settings show images.
            instructions: of each row's input.
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

        def write(listed: JudgeList) -> JudgePrompt:
            row = listed.rows[0]
            return judge_prompt(
                [batch.tcots[candidate] for candidate in listed.candidates],
                side=listed.side,
                style=self.settings.style,
                instruction=instructions[row] if instructions is not None else None,
                images=(images(row) or ()) if images is not None and self.settings.images else (),
            )

        requests, retries = self.pool.requests, self.pool.retries
        answers: dict[int, int | _Unknown] = {}
        if lists:
            async with self.pool:
                try:
                    await self._meet(deadline)
                except ServerError as error:
                    fix = _KEY_FIX if error.status in (401, 403) else _MODEL_FIX if error.status else ""
                    unknown = self._unknown(error.cause, str(error), fix)
                    answers = {row: unknown for listed in lists for row in listed.rows}
                else:
                    answers = await self._ask_all(batch, lists, write, deadline)
        scores, picks = torch.full((len(batch),), torch.nan), torch.zeros(len(batch), dtype=torch.int64)
        for listed in lists:
            for row in listed.rows:
                answer = answers[row]
                if not isinstance(answer, _Unknown):
                    picks[row], scores[row] = answer, float(listed.own[answer - 1])
        return Judgement(
            scores=scores,
            picks=picks,
            lists=tuple(lists),
            causes=self._causes(answers),
            requests=self.pool.requests - requests,
            retries=self.pool.retries - retries,
            seconds=time.monotonic() - start,
        )

    async def _meet(self, deadline: float) -> None:
        """Ask once which model is served, and by which software."""
        if self._model is not None and self._is_vllm is not None:
            return
        models = []
        try:
            models = await self.pool.models(deadline=deadline)
        except ServerError as error:
            if self.settings.model is None:
                raise
            if error.transient:
                self._ask_again(error)
                return
        if self.settings.model is None and not models:
            urls = ", ".join(self.pool.urls)
            raise EmbedRLError(f"GET /v1/models of {urls} must list a model; got none. Name it in embedrl.judge.model")
        self._model = self.settings.model or str(models[0]["id"])
        self._is_vllm = any(model.get("owned_by") == "vllm" for model in models)
        if not self._is_vllm:  # a gateway may list the model as its own
            try:
                answer = await self.pool.get("/version", deadline=deadline)
                self._is_vllm = isinstance(answer, dict) and "version" in answer
            except ServerError as error:
                if error.transient:
                    self._is_vllm = None
                    self._ask_again(error)
                    return
        constrained = self._is_vllm and self.settings.constrained
        _LOG.info("judge: %s decoding (%s)", "constrained" if constrained else "free", self.pool.urls[0])

    def _ask_again(self, error: ServerError) -> None:
        """It is not known whether the server is vLLM: this step's answers are free."""
        _LOG.warning("judge: this step's answers are not constrained, the server did not say what it is: %s", error)

    async def _ask_all(
        self, batch: RewardBatch, lists: Sequence[JudgeList], write: Callable[[JudgeList], JudgePrompt], deadline: float
    ) -> dict[int, int | _Unknown]:
        """For every listed row the number picked, or why there is none."""
        gate = asyncio.Semaphore(AT_ONCE)

        async def ask_list(number: int, listed: JudgeList) -> Mapping[int, int | _Unknown]:
            try:
                async with gate:
                    prompt = await asyncio.to_thread(write, listed)
            except MediaError as error:
                return dict.fromkeys(listed.rows, self._unknown(UNREADABLE, str(error)))
            asked = (
                self._ask(prompt.messages(batch.tcots[row]), len(listed), deadline, affinity=number)
                for row in listed.rows
            )
            return dict(zip(listed.rows, await asyncio.gather(*asked), strict=True))

        tasks = [asyncio.ensure_future(ask_list(number, listed)) for number, listed in enumerate(lists)]
        try:
            return {row: answer for found in await asyncio.gather(*tasks) for row, answer in found.items()}
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, messages: list[dict[str, Any]], n: int, deadline: float, affinity: int) -> int | _Unknown:
        payload = {
            "model": self._model,
            "messages": messages,
            "max_tokens": self.settings.max_tokens,
            "temperature": self.settings.temperature,
            "top_p": 1.0,
            **(NEUTRAL_SAMPLING if self._is_vllm else {}),
            **self.settings.extra_body,
        }
        choices = {"structured_outputs": {"choice": [str(number) for number in range(1, n + 1)]}}
        constrained = self.settings.constrained and self._is_vllm
        try:
            try:
                asked = payload | choices if constrained else payload
                answer = await self.pool.post(_CHAT, asked, deadline=deadline, affinity=affinity)
            except ServerError as error:
                if error.status != 400 or not constrained:
                    raise
                # Is it the constraint that the server refuses, or the request (such as a prompt that is too long)?
                await self.pool.post(_CHAT, payload, deadline=deadline, affinity=affinity)
                raise EmbedRLError(
                    "the judge's server refuses constrained decoding (field structured_outputs) and answers without "
                    f"it; set embedrl.judge.constrained=False. It said: {error}"
                ) from error
        except ServerError as error:
            return self._unknown(error.cause, str(error), _KEY_FIX if error.status in (401, 403) else "")
        try:
            choice = answer["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
        except (AttributeError, TypeError, KeyError, IndexError):
            return _Unknown(MALFORMED)
        text = text if isinstance(text, str) else ""
        if reason == "length" and not is_whole_choice(text, n):
            return _Unknown(CUT_OFF)
        return parse_choice(text, n) or _Unknown(NO_NUMBER)

    def _unknown(self, cause: str, words: str, fix: str = "") -> _Unknown:
        """The first of each cause is logged once a run, with the key that may fix it."""
        if cause not in self._logged:
            self._logged.add(cause)
            _LOG.warning("judge: rows are unknown: %s%s", words, fix)
        return _Unknown(cause, f"{words}{fix}")

    def _causes(self, answers: Mapping[int, int | _Unknown]) -> Counter[str]:
        """How many rows are unknown for which cause; too many stop the step."""
        unknown = [answer for answer in answers.values() if isinstance(answer, _Unknown)]
        causes, allowed = Counter(one.cause for one in unknown), self.settings.max_unknown_share
        if len(unknown) > allowed * len(answers):
            counted = "; ".join(f"{count} x {cause}" for cause, count in causes.most_common())
            words = next((one.words for one in sorted(unknown, key=lambda one: -causes[one.cause]) if one.words), "")
            raise EmbedRLError(
                f"the judge left {len(unknown)} of {len(answers)} rows unknown, more than "
                f"embedrl.judge.max_unknown_share={allowed}. Causes: {counted}. Servers: {', '.join(self.pool.urls)}"
                + (f". The first failure: {words[:LONGEST_WORDS]}" if words else "")
            )
        return causes


def parse_choice(text: str, n: int) -> int | None:
    """The number from 1 to `n` that the answer names, else None: a doubt is no answer, and no answer is unknown.

    It is the only number in the text, whatever words, brackets and punctuation stand around it; it may occur more than
    once ("3", "(3).", "Candidate 3", "Answer: 3, yes 3"). Two numbers, 0, a number above `n` or none: None.
    """
    numbers = {number.lstrip("0") for number in _NUMBER.findall(text)}
    listed = numbers & {str(number) for number in range(1, n + 1)}
    return int(listed.pop()) if len(numbers) == len(listed) == 1 else None


def is_whole_choice(text: str, n: int) -> bool:
    """Whether a text that the server cut off is one listed number all the same, and not the beginning of another."""
    number = text.strip()
    return [str(other) for other in range(1, n + 1) if str(other).startswith(number)] == [number]


def make_judge(config: JudgeConfig, urls: Sequence[str]) -> ListwiseJudge:
    """The judge of these servers."""
    return ListwiseJudge(ServerPool.from_config(config, urls, section="embedrl.judge", name="judge"), config)


def check_judge(config: JudgeConfig) -> None:
    """What can be checked before a server runs. The key is the trainer's, whose node may be another."""
    make_judge(replace(config, api_key_env=None), config.urls or (PLACEHOLDER,))
