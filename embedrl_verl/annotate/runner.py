# SPDX-License-Identifier: Apache-2.0
"""Asks about all rows of an input, with as many requests in flight as the servers take, and journals the answers.

    reader (a thread) -> queue -> workers: prepare (threads) -> complete -> read -> journal (a thread, fsynced)

An *errand* is one thing to find out about a row, such as the T-CoT of its query. It takes one or more tries. What came
of a try is one journal entry, keyed by pair id, errand and try; the errand is over when an entry says `done`. When a
job is started again, entries are read back, finished errands are skipped, and open ones go on with their next try.
Seeds depend on key and settings alone, so an answer does not depend on what was in flight beside it, as far as the
server's arithmetic does not.

Memory: the rows in the queue and in work (little more than `limit`), the media of requests in flight (`media_bytes`),
and a few counts of every open chunk. A chunk is open from its first to its last answer; so that one slow answer cannot
keep them all open, there is a limit to their number.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from embedrl_verl.annotate.backends import Backend, Refused, Reply, Sampling
from embedrl_verl.annotate.chunks import Chunk, ChunkedInput, Row
from embedrl_verl.annotate.journal import Entry, Journal, JournalError, summary_of
from embedrl_verl.annotate.progress import Progress, RunnerSettings
from embedrl_verl.annotate.prompts import Prompt
from embedrl_verl.data.schema import PairRecord
from embedrl_verl.errors import DataError, EmbedRLError

_FLUSH_S = 0.2
_ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Errand:
    """One thing to find out about a row. `tries` are the entries of earlier tries, oldest first."""

    chunk: Chunk
    row: Row
    name: str
    tries: tuple[Entry, ...] = ()

    @property
    def record(self) -> PairRecord:
        """The row's record."""
        assert self.row.record is not None
        return self.row.record


class Asker(Protocol):
    """What is asked, and what is made of the replies. Its methods run in threads and keep no state."""

    def errands(self, record: PairRecord) -> Sequence[str]:
        """Names of what to find out about a row; none is possible."""
        ...

    def ask(self, errand: Errand) -> tuple[Prompt, Sampling]:
        """The question of the errand's next try.

        Raises:
            DataError: the row cannot be asked about (MediaError and the like); it is rejected.
        """
        ...

    def read(self, errand: Errand, prompt: Prompt, reply: Reply | Refused) -> Entry:
        """The entry of a try, without its key; `done` says that the errand is over, `ok` that it has a result."""
        ...


class _Open:
    """A chunk that is being worked on."""

    def __init__(self, chunk: Chunk, journal: Journal) -> None:
        self.chunk, self.journal = chunk, journal
        self.pending = 1  # the reader, until it has read all rows
        self.unwritten: list[Entry] = []
        self._rejected_rows: set[int] = set()
        self.summary: dict[str, Any] = {"errands": 0, "failed": Counter(), "rows": 0, "rejected": Counter()}

    def count(self, entry: Entry, progress: Progress) -> None:
        """Take an entry into the summary and the counts over all chunks; a rejected row counts once."""
        if "rejected" in entry:
            if entry["row"] not in self._rejected_rows:
                self._rejected_rows.add(entry["row"])
                cause = entry["rejected"]["field"] or "row"
                self.summary["rejected"][cause] += 1
                progress.rejected[cause] += 1
        elif entry["done"]:
            self.summary["errands"] += 1
            progress.errands += 1
            if not entry["ok"]:
                self.summary["failed"][entry["cause"]] += 1
                progress.failed[entry["cause"]] += 1


class Runner:
    """One run over an input.

    Args:
        source: the input.
        asker: what is asked.
        backend: who answers; `meet` has been called.
        folder: of the journals.
        settings_hash: stands in every journal's header.
        settings: how the run goes.
        report: called now and then with the counts.
    """

    def __init__(
        self,
        source: ChunkedInput,
        asker: Asker,
        backend: Backend,
        folder: Path,
        settings_hash: str,
        settings: RunnerSettings,
        report: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self._source, self._asker, self._backend = source, asker, backend
        self._folder, self._hash, self._settings, self._report = folder, settings_hash, settings, report
        self.progress = Progress()
        self._open: dict[int, _Open] = {}
        self._taking: set[asyncio.Task[Entry]] = set()
        self._max_open = 4 + 4 * settings.limit // max(1, source.chunks[0].rows)
        self._media_left = settings.media_bytes
        self._desks = asyncio.Semaphore(settings.threads)
        self._space = asyncio.Condition()
        self._room = asyncio.Condition()
        self._threads = ThreadPoolExecutor(settings.threads, "media")
        self._reader = ThreadPoolExecutor(1, "reader")
        self._writer = ThreadPoolExecutor(1, "journal")

    async def run(self) -> Progress:
        """Ask about everything that is not answered yet."""
        queue: asyncio.Queue[Errand | None] = asyncio.Queue(maxsize=2 * self._settings.threads)
        workers = self._settings.limit + 2 * self._settings.threads
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(self._work(queue)) for _ in range(workers)]
        feeder = loop.create_task(self._feed(queue, workers))
        flusher = loop.create_task(self._flush_often())
        work = asyncio.gather(feeder, *tasks)
        try:
            done, _ = await asyncio.wait((work, flusher), return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                ended.result()
        finally:
            ending = loop.create_task(self._end(work, (feeder, flusher, *tasks)))
            try:
                await asyncio.shield(ending)
            except asyncio.CancelledError:  # one Ctrl-C at the end loses no answer
                await ending
                raise
        self.progress.check(self._settings, final=True)
        return self.progress

    async def _end(self, work: asyncio.Future[Any], tasks: Sequence[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        try:
            # Every one is awaited: an error that nobody asks for would be printed when the process ends.
            await asyncio.gather(work, *tasks, return_exceptions=True)
            while self._taking:
                await asyncio.wait(self._taking)
            await self._flush()
        finally:
            for pool in (self._threads, self._reader, self._writer):
                pool.shutdown(wait=True, cancel_futures=True)
            for opened in self._open.values():
                opened.journal.close()
            self._report(self.progress)
        for opened in self._open.values():
            if opened.journal.lost:  # its error may have met nobody who waited
                raise JournalError(opened.journal.lost)

    # ---- reading

    async def _feed(self, queue: asyncio.Queue[Errand | None], workers: int) -> None:
        loop = asyncio.get_running_loop()
        complete = await loop.run_in_executor(self._reader, self._complete)
        for summary in complete.values():
            self.progress.add(summary)
        chunks = self._source.read(lambda chunk: chunk.number not in complete)
        while True:
            found = await loop.run_in_executor(self._reader, next, chunks, None)
            if found is None:
                break
            chunk, rows = found
            async with self._room:
                await self._room.wait_for(lambda: len(self._open) < self._max_open)
            path = journal_path(self._folder, chunk)
            journal = await loop.run_in_executor(self._reader, Journal, path, journal_header(self._hash, chunk))
            opened = self._open[chunk.number] = _Open(chunk, journal)
            tries = _by_errand(journal.entries)
            rejected = {entry["row"] for entry in journal.entries if "errand" not in entry}
            for entry in journal.entries:
                opened.count(entry, self.progress)
            journal.entries = []
            opened.summary["rows"] = chunk.rows
            self.progress.rows += chunk.rows
            while batch := await loop.run_in_executor(self._reader, _take, rows, _ROWS_AT_ONCE):
                for row in batch:
                    if row.row in rejected:
                        continue
                    if row.record is None:
                        self._note(opened, _rejection(row, row.field, row.reason))
                        continue
                    for name in self._asker.errands(row.record):
                        before = tries.get((row.record.pair_id, name), ())
                        if not before or not before[-1]["done"]:
                            opened.pending += 1
                            await queue.put(Errand(chunk, row, name, tuple(before)))
            await self._over(opened)
        for _ in range(workers):
            await queue.put(None)

    def _complete(self) -> dict[int, Entry]:
        """The summaries of complete journals, by the number of the chunk."""
        found = {}
        for chunk in self._source.chunks:
            summary = summary_of(journal_path(self._folder, chunk), journal_header(self._hash, chunk))
            if summary is not None:
                found[chunk.number] = summary
        return found

    # ---- asking

    async def _work(self, queue: asyncio.Queue[Errand | None]) -> None:
        while (errand := await queue.get()) is not None:
            opened = self._open[errand.chunk.number]
            while errand is not None:
                errand = await self._try(opened, errand)
            await self._over(opened)

    async def _try(self, opened: _Open, errand: Errand) -> Errand | None:
        """One try; the errand of the next one, or None when it is over."""
        loop = asyncio.get_running_loop()
        try:
            async with self._desks:  # so that requests wait for memory before they are in it
                async with self._space:
                    await self._space.wait_for(lambda: self._media_left > 0)
                prompt, request, size = await loop.run_in_executor(self._threads, self._prepare, errand)
                self._media_left -= size
        except DataError as error:
            self._note(
                opened, {**_key(errand), "done": True, "ok": False, **_rejection(errand.row, errand.name, error)}
            )
            return None
        try:
            reply = await self._backend.complete(request)
            # Nothing is awaited between the answer and this: an answer outlives its worker when the run is ended.
            taking = loop.create_task(self._take_in(opened, errand, prompt, reply))
            self._taking.add(taking)
            taking.add_done_callback(self._taking.discard)
            taking.add_done_callback(_looked_at)
        finally:
            del request
            self._media_left += size
            async with self._space:
                self._space.notify_all()
        entry = await asyncio.shield(taking)
        if entry["done"]:
            return None
        return Errand(errand.chunk, errand.row, errand.name, (*errand.tries, entry))

    async def _take_in(self, opened: _Open, errand: Errand, prompt: Prompt, reply: Reply | Refused) -> Entry:
        found = await asyncio.get_running_loop().run_in_executor(self._threads, self._asker.read, errand, prompt, reply)
        entry = {**_key(errand), **found}
        self._note(opened, entry)
        self.progress.replies += 1
        self.progress.completion_tokens += entry.get("out") or 0
        return entry

    def _prepare(self, errand: Errand) -> tuple[Prompt, Any, int]:
        prompt, sampling = self._asker.ask(errand)
        request, size = self._backend.prepare(prompt, sampling)
        return Prompt([], prompt.original_sizes, prompt.seen_sizes, prompt.num_frames), request, size

    # ---- journaling

    def _note(self, opened: _Open, entry: Entry) -> None:
        opened.unwritten.append(entry)
        opened.count(entry, self.progress)

    async def _over(self, opened: _Open) -> None:
        """One thing less to wait for in a chunk; the last closes its journal."""
        opened.pending -= 1
        if opened.pending:
            return
        await self._flush()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._writer, opened.journal.close, opened.summary)
        del self._open[opened.chunk.number]
        async with self._room:
            self._room.notify_all()

    async def _flush_often(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(_FLUSH_S)
            await self._flush()
            self.progress.check(self._settings, final=False)
            if time.monotonic() - last > 1:
                last = time.monotonic()
                self._report(self.progress)

    async def _flush(self) -> None:
        """Write all entries so far; they are on the disk when this returns.

        They are written too when the caller is cancelled meanwhile, before those of any later call.
        """
        work = [(opened.journal, opened.unwritten) for opened in self._open.values() if opened.unwritten]
        for opened in self._open.values():
            opened.unwritten = []
        writing = asyncio.get_running_loop().run_in_executor(self._writer, _append_all, work)
        writing.add_done_callback(_looked_at)
        await asyncio.shield(writing)


def journal_path(folder: Path, chunk: Chunk) -> Path:
    """The journal of a chunk."""
    return folder / f"journal-{chunk.number:05d}.jsonl"


def journal_header(settings_hash: str, chunk: Chunk) -> dict[str, Any]:
    """First line of a chunk's journal."""
    return {"settings": settings_hash, "chunk": chunk.number, "first": chunk.first, "rows": chunk.rows}


def _append_all(work: Sequence[tuple[Journal, list[Entry]]]) -> None:
    """Every journal gets its entries, whatever becomes of the others; the first error is raised afterwards."""
    errors: list[Exception] = []
    for journal, entries in work:
        try:
            journal.append(entries)
        except (EmbedRLError, OSError) as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _looked_at(future: asyncio.Future[Any]) -> None:
    """Keeps asyncio from printing an error of what was shielded, when the one that waited for it was cancelled."""
    if not future.cancelled():
        future.exception()


def _by_errand(entries: Sequence[Entry]) -> dict[tuple[str, str], list[Entry]]:
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if "errand" in entry:
            tries = found.setdefault((entry["id"], entry["errand"]), [])
            if entry["try"] != len(tries):
                raise DataError(
                    f"the journal holds try {entry['try']} of {entry['errand']} of pair {entry['id']!r} where try "
                    f"{len(tries)} must be; remove the journal to ask its rows again"
                )
            tries.append(entry)
    return found


def _key(errand: Errand) -> Entry:
    return {"id": errand.record.pair_id, "errand": errand.name, "try": len(errand.tries)}


def _rejection(row: Row, field_name: str, reason: object) -> Entry:
    return {"row": row.row, "rejected": {"field": field_name, "reason": str(reason), "pair_id": row.pair_id}}


def _take(rows: Iterator[Row], count: int) -> list[Row]:
    return list(itertools.islice(rows, count))
