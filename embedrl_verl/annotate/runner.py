# SPDX-License-Identifier: Apache-2.0
"""Asks about all rows of an input, with as many requests in flight as the servers take, and keeps the answers.

    rows (a thread) -> workers: prepare (threads) -> complete -> entry -> answers.jsonl (a thread)

A question takes one or more tries; each is one line of the file, and the question is over when a line says `done`. When
a job is started again, finished questions are skipped and open ones go on with their next try.

Memory: the rows and requests in flight. A row is read when a thread and room for media are free, so rows that wait take
none.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from embedrl_verl.annotate.answers import ANSWERS_FILE, Answers, AnswerWriter, Entry
from embedrl_verl.annotate.backends import Backend, Refused, Reply
from embedrl_verl.annotate.prompts import Prompt
from embedrl_verl.annotate.questions import Question, Questions
from embedrl_verl.annotate.replies import rule_of
from embedrl_verl.annotate.rows import Rejection, Rows
from embedrl_verl.data.build import stop_if_bad
from embedrl_verl.data.schema import PairRecord
from embedrl_verl.errors import DataError

_LOG_EVERY_S = 30.0
_ROWS_AT_ONCE = 32
_LISTED = 100
"""So many bad rows are found before the job stops for them, so that a small input is told all of its own."""


class TooManyFailed(DataError):
    """Answers so far are kept."""


@dataclass(frozen=True)
class RunnerSettings:
    """How a run goes; nothing here changes an answer. `max_failed_share` is of the questions that are over, looked at
    after `first_check` of them; what the `threads` are encoding comes on top of `media_bytes`. `retry_failed`: what
    earlier runs have ended without a result is asked from the start again."""

    limit: int
    threads: int
    media_bytes: int = 2 << 30
    max_failed_share: float = 0.1
    max_rejected_share: float = 0.01
    first_check: int = 200
    retry_failed: bool = False


class Runner:
    """One run over an input. `served` is called, before anything is asked, with what the backend serves.

    `over`, `failed` and `rejected` are the questions that are over, causes of those without a result, and rows that
    cannot be used; those of earlier runs among them.
    """

    def __init__(
        self,
        rows: Rows,
        questions: Questions,
        backend: Backend,
        work: Path,
        settings: RunnerSettings,
        served: Callable[[Mapping[str, Any]], None] = lambda facts: None,
        label: str = "ask",
    ) -> None:
        self._rows, self._questions, self._backend = rows, questions, backend
        self._path, self._settings, self._served, self._label = work / ANSWERS_FILE, settings, served, label
        self.over = self.replies = self.rows_read = 0
        self.failed: Counter[str] = Counter()
        self.rejected: dict[tuple[str, int], Rejection] = {}
        self._media_left = settings.media_bytes
        self._began = self._told = time.monotonic()

    async def run(self) -> None:
        """Ask everything that is not answered yet; nobody has to serve if nothing is open. Whatever ends it, answers so
        far are kept."""
        answers = await asyncio.to_thread(Answers, self._path, self._count_earlier)
        self._stop_if_failed(final=False)
        threads, questions = self._settings.threads, self._open_questions(answers)
        self._next, self._thread_free, self._room = asyncio.Lock(), asyncio.Semaphore(threads), asyncio.Event()
        with (
            ThreadPoolExecutor(threads, "media") as self._threads,
            AnswerWriter(self._path) as self._writer,
            tqdm(desc=self._label, unit="question", initial=self.over, disable=not sys.stderr.isatty()) as self._bar,
        ):
            workers = self._settings.limit + 2 * threads
            tasks = [asyncio.create_task(self._work(questions)) for _ in range(workers)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self._backend.aclose()
        self._stop_if_failed(final=True)
        self._stop_if_bad()

    async def _open_questions(self, answers: Answers) -> AsyncIterator[Question]:
        connected, scan = False, self._scan(answers)
        while (found := await asyncio.to_thread(next, scan, None)) is not None:
            if found and not connected:
                self._served(await self._backend.connect())
                connected = True
            for question in found:
                yield question

    def _scan(self, answers: Answers) -> Iterator[list[Question]]:
        """The open questions of a row, or none of several."""
        for span in self._rows.spans:
            for row, record in self._rows.scan(span):
                self.rows_read += 1
                found = []
                if isinstance(record, PairRecord):
                    for name in self._questions.names(record):
                        tries = answers.tries(record.pair_id, name)
                        if tries and self._is_retried(tries[-1]):
                            found.append(Question(record, name, (), str(span.file), row, before=len(tries)))
                        elif not tries or not tries[-1]["done"]:
                            found.append(Question(record, name, tries, str(span.file), row))
                else:
                    self._reject(record)
                if found or self.rows_read % _ROWS_AT_ONCE == 0:
                    yield found

    async def _work(self, questions: AsyncIterator[Question]) -> None:
        while True:
            async with self._next:
                await self._take_thread()
                question = await anext(questions, None)
            if question is None:
                self._thread_free.release()
                return
            while (question := await self._try(question)) is not None:
                await self._take_thread()

    async def _take_thread(self) -> None:
        """Wait for a thread, and for memory for what it prepares."""
        await self._thread_free.acquire()
        while self._media_left <= 0:
            self._room.clear()
            await self._room.wait()

    async def _try(self, question: Question) -> Question | None:
        """One try, by a thread that is taken; the question with it if there is to be another."""
        key = {"id": question.record.pair_id, "question": question.name, "try": question.before + len(question.tries)}
        loop = asyncio.get_running_loop()
        try:
            prompt, request, size = await loop.run_in_executor(self._threads, self._prepare, question)
        except DataError as error:
            place = {"file": question.file, "row": question.row, "field": question.name, "reason": str(error)}
            self._note({**key, "done": True, "ok": False, "rejected": {**place, "pair_id": question.record.pair_id}})
            return None
        finally:
            self._thread_free.release()
        self._media_left -= size
        try:
            reply = await self._backend.complete(request)
            # Nothing is awaited between the answer and its note: an answer outlives its worker when the run is ended.
            entry = {**key, **self._outcome(question, prompt, reply)}
            self._note(entry)
        finally:
            self._media_left += size
            self._room.set()
        return None if entry["done"] else replace(question, tries=(*question.tries, entry))

    def _prepare(self, question: Question) -> tuple[Prompt, Any, int]:
        prompt, sampling = self._questions.request(question)
        request, size = self._backend.prepare(prompt, sampling)
        return replace(prompt, messages=[]), request, size

    def _outcome(self, question: Question, prompt: Prompt, reply: Reply | Refused) -> Entry:
        if isinstance(reply, Refused):
            return {"done": True, "ok": False, "cause": reply.cause, "text": "", "problems": [reply.detail]}
        found = self._questions.check(question, prompt, reply)
        found |= {"text": reply.text, "in": reply.prompt_tokens, "out": reply.completion_tokens}
        if not found["problems"]:
            return {**found, "done": True, "ok": True}
        last = len(question.tries) + 1 >= self._questions.settings.tries
        return {**found, "done": last, "ok": False, "cause": rule_of(found["problems"][0])}

    def _note(self, entry: Entry) -> None:
        self._writer.put(entry)
        self._count(entry)
        self.replies += 1
        self._bar.set_postfix({"failed": self.failed.total(), "replies": self.replies}, refresh=False)
        self._bar.update(self.over - self._bar.n)
        if self._bar.disable and (now := time.monotonic()) - self._told > _LOG_EVERY_S:
            self._told, rate = now, self.replies / (now - self._began)
            counts = f"{self.over:,} questions done, {self.failed.total()} failed, {rate:.1f} replies/s"
            print(f"{self._label}: {counts}", file=sys.stderr, flush=True)
        self._stop_if_failed(final=False)

    def _is_retried(self, entry: Entry) -> bool:
        return self._settings.retry_failed and entry["done"] and not entry["ok"]

    def _count_earlier(self, entry: Entry) -> None:
        if not self._is_retried(entry):
            self._count(entry)

    def _count(self, entry: Entry) -> None:
        """Take an answer of this run or of an earlier one into the counts."""
        if "rejected" in entry:
            self._reject(entry["rejected"])
        elif entry["done"]:
            self.over += 1
            if not entry["ok"]:
                self.failed[entry["cause"]] += 1

    def _reject(self, line: Rejection) -> None:
        self.rejected.setdefault((line["file"], line["row"]), line)
        if len(self.rejected) > max(_LISTED, self._settings.max_rejected_share * self._rows.count):
            self._stop_if_bad()

    def _stop_if_bad(self) -> None:
        found = [{"rejected": list(self.rejected.values())}]
        stop_if_bad(found, self._rows.count, self._settings.max_rejected_share, self._path.parent.parent)

    def _stop_if_failed(self, *, final: bool) -> None:
        failed, allowed = self.failed.total(), self._settings.max_failed_share
        if failed > allowed * self.over and (final or self.over >= self._settings.first_check):
            causes = "; ".join(f"{count} x {cause}" for cause, count in self.failed.most_common(5))
            raise TooManyFailed(
                f"{failed} of {self.over} questions have no answer, over --max-failed-share {allowed:g}. Causes: "
                f"{causes}. Replies are in {self._path}, and good ones are kept: mend the cause and run the command "
                "with --retry-failed, or raise the limit"
            )
