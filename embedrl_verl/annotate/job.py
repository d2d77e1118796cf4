# SPDX-License-Identifier: Apache-2.0
"""A command that asks a model about every row: begin or go on with its folder, ask what is open, write the result.

    rows (a thread) -> workers: prepare (threads) -> complete -> entry -> answers.jsonl

A question takes one or more tries; each is one line of the file, and the question is over when a line says `done`. When
a job is started again, finished questions are skipped and open ones go on with their next try.

Memory: the rows and requests in flight. A row is read when a thread and room for media are free, so rows that wait take
none.
"""

from __future__ import annotations

import asyncio
import json
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from embedrl_verl.annotate.answers import ANSWERS_FILE, Answers, Entry
from embedrl_verl.annotate.backends import Backend, Refused, Reply
from embedrl_verl.annotate.prompts import DrawSettings, Prompt, Question, Sampling
from embedrl_verl.annotate.replies import rule_of
from embedrl_verl.annotate.rows import Rejection, Rows
from embedrl_verl.data.build import build_facts, building, difference, stop_if_bad
from embedrl_verl.data.files import CARD_FILE, read_object, write_json
from embedrl_verl.data.schema import PairRecord
from embedrl_verl.errors import ConfigError, DataError

SERVED_FILE = "served.json"
_ROWS_AT_ONCE = 32
_LISTED = 100
"""So many bad rows are found before the job stops for them, so that a small input is told all of its own."""


class TooManyFailed(DataError):
    """Answers so far are kept."""


def tokens_of(tries: Iterable[Entry]) -> Counter[str]:
    """Replies and tokens of a question; a refused request has neither."""
    found = Counter[str]()
    for entry in tries:
        if "out" in entry:
            found.update(replies=1, prompt_tokens=entry["in"] or 0, completion_tokens=entry["out"] or 0)
            found.update(replies_without_usage=entry["out"] is None)
    return found


@dataclass(frozen=True)
class RunSettings:
    """How a run goes; nothing here changes an answer. `max_failed_share` is of the questions that are over, looked at
    after `first_check` of them; what the `threads` are encoding comes on top of `media_bytes`. `retry_failed`: what
    earlier runs have ended without a result is asked from the start again. Prices are money for a million tokens, in
    any currency."""

    limit: int
    threads: int
    media_bytes: int = 2 << 30
    max_failed_share: float = 0.1
    max_rejected_share: float = 0.01
    first_check: int = 200
    retry_failed: bool = False
    price_prompt: float | None = None
    price_completion: float | None = None

    def cost(self, counts: Mapping[str, int]) -> dict[str, float]:
        """{"cost"} of the tokens counted; {} without any price."""
        if self.price_prompt is self.price_completion is None:
            return {}
        prompt, completion = self.price_prompt or 0, self.price_completion or 0
        return {"cost": round((prompt * counts["prompt_tokens"] + completion * counts["completion_tokens"]) / 1e6, 6)}


@dataclass(frozen=True)
class Job(ABC):
    """What a command asks, and what it makes of the answers. `command` is what goes on with it, told to whoever needs
    the folder."""

    files: Sequence[Path]
    out: Path
    settings: DrawSettings
    backend: Backend
    how: RunSettings
    rows_per_part: int = 2048
    command: Sequence[str] = ()

    name: ClassVar[str]

    def run(self, say: Callable[[str], None] = print) -> int:
        """Do what is left to do. Returns 0, or 3 if a row of the input cannot be used (see rejected.jsonl)."""
        rows, stamps = Rows(self.files, self.rows_per_part), [file.stat().st_mtime_ns for file in self.files]
        facts = build_facts(f"data {self.name}", {**self.described(), "model": dict(self.backend.named())}, self.files)
        with building(self.out, facts, self.command, stamps=stamps) as work:
            if work is None:
                card = read_object(self.out / CARD_FILE)
                say(f"{self.out} is finished; nothing to do")
            else:
                asyncio.run(Run(self, rows, work).run())
                served = read_object(work / SERVED_FILE) if (work / SERVED_FILE).is_file() else {}
                with closing(Answers(work / ANSWERS_FILE)) as answers:
                    card = self.write(work, rows, answers, facts, served)
        for line in self.report(card):
            say(line)
        return DataError.exit_code if card["rejected"]["rows"] else 0

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """All that changes the output but the model and the input, as JSON values."""

    @abstractmethod
    def names(self, record: PairRecord) -> Sequence[str]:
        """What to find out about a row; none is possible."""

    @abstractmethod
    def request(self, question: Question) -> tuple[Prompt, Sampling]:
        """The question's next try; called in threads. DataError (unreadable media) rejects the row."""

    @abstractmethod
    def check(self, question: Question, prompt: Prompt, reply: Reply) -> Entry:
        """`problems` of a reply, for which it is asked again, and more for its entry."""

    @abstractmethod
    def write(
        self, work: Path, rows: Rows, answers: Answers, facts: Mapping[str, Any], served: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write the output and its card; returns the card."""

    @abstractmethod
    def report(self, card: Mapping[str, Any]) -> list[str]:
        """Lines for the terminal."""


class Run:
    """One run of a job over its input. `over`, `failed` and `rejected` are the questions that are over, causes of those
    without a result, and rows that cannot be used; those of earlier runs among them."""

    def __init__(self, job: Job, rows: Rows, work: Path) -> None:
        self.job, self.rows, self.work = job, rows, work
        self.over = self.rows_read = 0
        self.failed: Counter[str] = Counter()
        self.rejected: dict[tuple[str, int], Rejection] = {}
        self._media_left = job.how.media_bytes

    async def run(self) -> None:
        """Ask everything that is not answered yet; nobody has to serve if nothing is open. Whatever ends it, answers so
        far are kept."""
        file, threads, in_terminal = self.work / ANSWERS_FILE, self.job.how.threads, sys.stderr.isatty()
        self._answers = await asyncio.to_thread(Answers, file, self._count_earlier)
        self._stop_if_failed(final=False)
        self._next, self._thread_free, self._room = asyncio.Lock(), asyncio.Semaphore(threads), asyncio.Event()
        self._bar = tqdm(desc=self.job.name, unit="question", initial=self.over, mininterval=0.5 if in_terminal else 30)
        with closing(self._answers), ThreadPoolExecutor(threads, "media") as self._threads, self._bar:
            questions = self._open_questions()
            tasks = [asyncio.create_task(self._ask(questions)) for _ in range(self.job.how.limit + 2 * threads)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self.job.backend.aclose()
        self._stop_if_failed(final=True)
        self._stop_if_bad()

    async def _open_questions(self) -> AsyncIterator[Question]:
        connected, scan = False, self._scan()
        while (found := await asyncio.to_thread(next, scan, None)) is not None:
            if found and not connected:
                self._note_served(await self.job.backend.connect())
                connected = True
            for question in found:
                yield question

    def _note_served(self, served: Mapping[str, Any]) -> None:
        """Keep what answers; nothing else may go on."""
        file, now = self.work / SERVED_FILE, json.loads(json.dumps(served))
        if file.is_file() and (changed := difference(read_object(file), now)):
            raise ConfigError(
                f"{self.job.out} has answers of another model or server: {changed}, and answers to different questions "
                "must not mix: use the same, or another folder, or remove this one"
            )
        write_json(file, now)

    def _scan(self) -> Iterator[list[Question]]:
        """The open questions of a row, or none of several."""
        for span in self.rows.spans:
            for row, record in self.rows.scan(span):
                self.rows_read += 1
                found = []
                if isinstance(record, PairRecord):
                    for name in self.job.names(record):
                        tries = self._answers.tries(record.pair_id, name)
                        if not tries or not tries[-1]["done"] or self._is_retried(tries[-1]):
                            tries = () if tries and tries[-1]["done"] else tries
                            found.append(Question(record, name, tries, str(span.file), row))
                else:
                    self._reject(record)
                if found or self.rows_read % _ROWS_AT_ONCE == 0:
                    yield found

    async def _ask(self, questions: AsyncIterator[Question]) -> None:
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
        pair_id, name = question.record.pair_id, question.name
        key = {"id": pair_id, "question": name, "try": len(question.tries)}
        try:
            work = asyncio.get_running_loop().run_in_executor(self._threads, self._prepare, question)
            prompt, request, size = await work
        except DataError as error:
            place = {"file": question.file, "row": question.row, "field": name, "reason": str(error)}
            self._note({**key, "done": True, "ok": False, "rejected": {**place, "pair_id": pair_id}})
            return None
        finally:
            self._thread_free.release()
        self._media_left -= size
        try:
            reply = await self.job.backend.complete(request)
            # Nothing is awaited between the answer and its note: an answer outlives its worker when the run is ended.
            entry = {**key, **self._outcome(question, prompt, reply)}
            self._note(entry)
        finally:
            self._media_left += size
            self._room.set()
        return None if entry["done"] else replace(question, tries=(*question.tries, entry))

    def _prepare(self, question: Question) -> tuple[Prompt, Any, int]:
        prompt, sampling = self.job.request(question)
        request, size = self.job.backend.prepare(prompt, sampling)
        return replace(prompt, messages=[]), request, size

    def _outcome(self, question: Question, prompt: Prompt, reply: Reply | Refused) -> Entry:
        if isinstance(reply, Refused):
            return {"done": True, "ok": False, "cause": reply.cause, "text": "", "problems": [reply.detail]}
        found = self.job.check(question, prompt, reply)
        found |= {"text": reply.text, "in": reply.prompt_tokens, "out": reply.completion_tokens}
        if not found["problems"]:
            return {**found, "done": True, "ok": True}
        last = len(question.tries) + 1 >= self.job.settings.tries
        return {**found, "done": last, "ok": False, "cause": rule_of(found["problems"][0])}

    def _note(self, entry: Entry) -> None:
        self._answers.put(entry)
        self._count(entry)
        self._bar.set_postfix({"failed": self.failed.total()}, refresh=False)
        self._bar.update(self.over - self._bar.n)
        self._stop_if_failed(final=False)

    def _is_retried(self, entry: Entry) -> bool:
        return self.job.how.retry_failed and entry["done"] and not entry["ok"]

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
        if len(self.rejected) > max(_LISTED, self.job.how.max_rejected_share * self.rows.count):
            self._stop_if_bad()

    def _stop_if_bad(self) -> None:
        found = [{"rejected": list(self.rejected.values())}]
        stop_if_bad(found, self.rows.count, self.job.how.max_rejected_share, self.job.out)

    def _stop_if_failed(self, *, final: bool) -> None:
        failed, allowed = self.failed.total(), self.job.how.max_failed_share
        if failed > allowed * self.over and (final or self.over >= self.job.how.first_check):
            causes = "; ".join(f"{count} x {cause}" for cause, count in self.failed.most_common(5))
            raise TooManyFailed(
                f"{failed} of {self.over} questions have no answer, over --max-failed-share {allowed:g}. Causes: "
                f"{causes}. Replies are in {self.work / ANSWERS_FILE}, and good ones are kept: mend the cause and run "
                "the command with --retry-failed, or raise the limit"
            )
