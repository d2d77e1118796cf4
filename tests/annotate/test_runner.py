# SPDX-License-Identifier: Apache-2.0
"""Many requests at once, little memory, a free event loop, and no answer that depends on what was beside it."""

import asyncio
import gc
import os
import re
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from embedrl_verl.annotate import runner as runner_module
from embedrl_verl.annotate.assemble import assemble
from embedrl_verl.annotate.backends import Reply
from embedrl_verl.annotate.chunks import ChunkedInput
from embedrl_verl.annotate.journal import Journal, JournalError, read_journal
from embedrl_verl.annotate.progress import RunnerSettings, TooManyBad
from embedrl_verl.annotate.runner import Runner, journal_path
from embedrl_verl.annotate.seeds import ALMOST_GREEDY
from embedrl_verl.annotate.tcots import TcotAsker, TcotSettings
from tests.annotate.fakes import PROMPTS, FakeBackend, pair_file, some_bad, tcot
from tests.serving.fakes import heartbeat


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "_FLUSH_S", 0.01)

    def build(count=40, chunk_rows=8, backend=None, asker=None, **settings):
        source = ChunkedInput([pair_file(tmp_path / "a.parquet", count)], chunk_rows)
        settings = {"limit": 8, "threads": 2, "max_failed_share": 1.0, **settings}
        asker = asker or TcotAsker(TcotSettings(reask="resample"), PROMPTS)
        folder = tmp_path / f"work{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return lambda: Runner(source, asker, backend or FakeBackend(), folder, "hash", RunnerSettings(**settings))

    return build


def stored(runner):
    """Lines of answers that are on the disk."""
    files = [journal_path(runner._folder, chunk) for chunk in runner._source.chunks]
    lines = [line for file in files if file.exists() for line in file.read_bytes().splitlines()]
    return [line for line in lines if b'"errand"' in line]


def journals(runner):
    source = runner._source
    return [read_journal(journal_path(runner._folder, chunk)) for chunk in source.chunks]


async def run(build):
    runner = build()
    progress = await runner.run()
    return runner, progress


def test_every_side_is_answered_once_and_tries_follow_each_other(world):
    backend = FakeBackend(some_bad)
    runner, progress = asyncio.run(run(world(backend=backend)))
    entries = [entry for journal in journals(runner) for entry in journal]
    keys = [(entry["id"], entry["errand"], entry["try"]) for entry in entries]
    assert len(set(keys)) == len(keys) == len(backend.asked) == progress.replies
    final = [entry for entry in entries if entry["done"]]
    assert len(final) == 80 == progress.errands
    assert sum(not entry["ok"] for entry in final) == progress.failed.total() > 0
    assert {entry["try"] for entry in entries} == {0, 1, 2}


@pytest.mark.parametrize("limit", [1, 3, 64])
def test_answers_do_not_depend_on_how_many_are_in_flight(world, limit):
    def texts(limit):
        runner, _ = asyncio.run(run(world(backend=FakeBackend(some_bad), limit=limit)))
        return [sorted(journal, key=lambda e: (e["id"], e["errand"], e["try"])) for journal in journals(runner)]

    assert texts(limit) == texts(8)


def test_as_many_are_in_flight_as_allowed_and_rows_are_not_read_far_ahead(world):
    """A server that never answers: the reader stops soon after the limit."""
    backend = FakeBackend()
    backend.delay = 3600
    build = world(count=2000, chunk_rows=50, backend=backend, limit=64, threads=2)

    async def look():
        runner = build()
        task = asyncio.ensure_future(runner.run())
        for _ in range(6000):
            await asyncio.sleep(0.01)
            if backend.now >= 68:
                break
        await asyncio.sleep(0.1)
        rows, now = runner.progress.rows, backend.now
        task.cancel()
        await asyncio.wait([task])
        return rows, now

    rows, now = asyncio.run(look())
    assert now == 64 + 2 * 2  # the rest waits for a slot of the pool
    assert rows <= 100  # two sides a row, 72 sides in work or in the queue


def test_one_slow_answer_holds_back_nobody_and_opens_a_bounded_number_of_chunks(world):
    slow = "red 0"
    release = asyncio.Event

    class Slow(FakeBackend):
        async def complete(self, request):
            if slow in request[0] and "target" in request[0] and not self.released.is_set():
                await self.released.wait()
            return await super().complete(request)

    backend = Slow()
    build = world(count=400, chunk_rows=4, backend=backend, limit=4)

    async def look():
        backend.released = release()
        runner = build()
        task = asyncio.ensure_future(runner.run())
        before, until = -1, time.monotonic() + 60
        while before != len(backend.asked) or (before < 700 and time.monotonic() < until):
            before = len(backend.asked)
            await asyncio.sleep(0.3)
        opened = len(runner._open)
        backend.released.set()
        await task
        return before, opened

    before, opened = asyncio.run(look())
    assert before >= 700  # of 800: chunks are closed and opened behind the slow one
    assert 1 <= opened <= 8


def test_no_more_chunks_are_open_than_allowed_when_each_has_a_slow_answer(world):
    class Slow(FakeBackend):
        async def complete(self, request):
            row = re.search(r"target.* red (\d+)$", request[0])
            if row and int(row[1]) % 8 in (0, 1):  # one of two neighbours has a text as target
                await asyncio.sleep(3600)
            return await super().complete(request)

    backend = Slow()
    build = world(count=1200, chunk_rows=8, backend=backend, limit=64)

    async def look():
        runner = build()
        task = asyncio.ensure_future(runner.run())
        before, until = -1, time.monotonic() + 60
        while before != len(backend.asked) or (len(runner._open) < 9 and time.monotonic() < until):
            before = len(backend.asked)
            await asyncio.sleep(0.5)
        opened = len(runner._open)
        task.cancel()
        await asyncio.wait([task])
        return opened, runner._max_open

    opened, most = asyncio.run(look())
    assert 8 < opened <= most == 36


def test_encoded_media_stay_within_their_memory_whether_sent_or_waiting(world):
    held, most, until = 0, 0, time.monotonic() + 60

    class Sized(FakeBackend):
        def prepare(self, prompt, sampling):
            nonlocal held, most
            held += 1
            most = max(most, held)
            return super().prepare(prompt, sampling)[0], 1000

        async def complete(self, request):
            nonlocal held
            reply = await super().complete(request)
            while most < 5 and time.monotonic() < until:
                await asyncio.sleep(0.001)
            held -= 1
            return reply

    backend = Sized()
    backend.delay = 0.002
    asyncio.run(run(world(backend=backend, limit=32, media_bytes=5000, threads=3)))
    assert 5 <= most <= 5 + 3  # media_bytes, and what the threads are at


def test_the_event_loop_is_free_while_media_are_encoded(world):
    """No question is put together or encoded, and no answer read, before the loop has come round meanwhile."""
    beats, done, adding = [], Counter(), threading.Lock()

    def heavy(name, do):
        def wait(*args):
            before, until = len(beats), time.monotonic() + 20
            while len(beats) < before + 5:
                assert time.monotonic() < until, f"the event loop stands still for {name}"
                time.sleep(0.002)
            with adding:
                done[name] += 1
            return do(*args)

        return wait

    backend, asker = FakeBackend(), TcotAsker(TcotSettings(), PROMPTS)
    backend.prepare = heavy("prepare", backend.prepare)
    frozen = SimpleNamespace(errands=asker.errands, ask=heavy("ask", asker.ask), read=heavy("read", asker.read))

    async def look(build):
        async with heartbeat(beats):
            await build().run()

    asyncio.run(look(world(backend=backend, asker=frozen, count=12, threads=4)))
    assert done == {"ask": 24, "prepare": 24, "read": 24}


@pytest.fixture
def own_log(caplog):
    """The log of this test alone: asyncio's notes on what earlier tests left behind are written before it."""
    gc.collect()
    caplog.clear()
    return caplog


def test_too_many_failures_stop_early_and_keep_the_answers(world, own_log):
    backend = FakeBackend(lambda text, digest: Reply("no", False, 1, 1))
    backend.delay = 0.001
    build = world(count=4000, backend=backend, max_failed_share=0.5, first_check=50)
    runner = build()
    with pytest.raises(TooManyBad, match=r"cannot be used, above --max-failed-share 0.5. Causes: \d+ x the tags must"):
        asyncio.run(runner.run())
    assert len(backend.asked) < 4000
    assert len(stored(runner)) == runner.progress.replies > 0
    gc.collect()
    assert "never retrieved" not in own_log.text  # asyncio's note of an error that nobody has asked for


def test_a_share_within_its_limit_is_no_error_and_is_looked_at_again_at_the_end(world):
    backend = FakeBackend(some_bad)
    _, progress = asyncio.run(run(world(backend=backend)))
    share = progress.failed.total() / progress.errands
    asyncio.run(run(world(backend=FakeBackend(some_bad), max_failed_share=share)))
    with pytest.raises(TooManyBad):
        asyncio.run(run(world(backend=FakeBackend(some_bad), max_failed_share=share - 1e-6)))


class Breaks(FakeBackend):
    """Fails once more than `after` questions have come; `answered` are those it has answered."""

    def __init__(self, after):
        super().__init__()
        self.after, self.answered = after, []

    async def complete(self, request):
        if len(self.asked) > self.after:
            raise RuntimeError("lost")
        reply = await super().complete(request)
        self.answered.append(request)
        return reply


@pytest.mark.parametrize("slow", ["nothing", "reading", "writing"])
def test_an_error_of_the_backend_ends_the_run_and_every_answer_before_it_is_kept(world, monkeypatch, slow):
    """Those too that are still being read, or wait for the disk."""

    def slowly(do):
        def done(*args):
            time.sleep(0.05)
            return do(*args)

        return done

    if slow == "reading":
        monkeypatch.setattr(TcotAsker, "read", slowly(TcotAsker.read))
    if slow == "writing":
        monkeypatch.setattr(runner_module, "_append_all", slowly(runner_module._append_all))
    first = Breaks(after=30)
    runner = world(backend=first)()
    with pytest.raises(RuntimeError, match="lost"):
        asyncio.run(runner.run())
    again = FakeBackend()
    second = Runner(runner._source, runner._asker, again, runner._folder, "hash", runner._settings)
    asyncio.run(second.run())
    assert first.answered and len(again.asked) == 80 - len(first.answered)
    assert {body for _, body in first.answered}.isdisjoint(again.asked)


def test_one_interrupt_while_a_run_ends_loses_no_answer(world, monkeypatch):
    backend, reading, ending, may_read = Breaks(after=6), [], [], threading.Event()

    def slow_at_first(*args):
        if not reading:
            reading.append(True)
            assert may_read.wait(60)
        return read(*args)

    def noted(*args):
        ending.append(True)
        return end(*args)

    read, end = TcotAsker.read, Runner._end
    monkeypatch.setattr(TcotAsker, "read", slow_at_first)
    monkeypatch.setattr(Runner, "_end", noted)
    runner = world(backend=backend)()

    async def interrupted():
        task = asyncio.ensure_future(runner.run())
        while not ending:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        may_read.set()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(interrupted())
    assert len(stored(runner)) == len(backend.answered) > 0
    assert runner._writer._shutdown and not [one for one in runner._open.values() if one.journal._file >= 0]


def test_of_several_journals_each_is_written_whatever_becomes_of_the_others(tmp_path, monkeypatch):
    """Else another's chunk could be closed with entries missing."""
    work = [(Journal(tmp_path / name, {"chunk": name}), [{"id": name}]) for name in "abc"]
    write, full = os.pwrite, work[0][0]._file

    def pwrite(file, data, place):
        if file == full:
            raise OSError(28, "No space left on device")
        return write(file, data, place)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(JournalError, match="a: cannot be written .*No space left"):
        runner_module._append_all(work)
    assert [len((tmp_path / name).read_bytes().splitlines()) for name in "abc"] == [1, 2, 2]
    with pytest.raises(JournalError, match="not complete"):
        work[0][0].close({})
    for journal, _ in work:
        journal.close()


def test_a_journal_that_cannot_be_written_ends_the_run_and_the_next_completes_it(world, monkeypatch, own_log):
    write, lost = os.pwrite, []

    def full(file, data, place):
        if b'"errand"' in bytes(data) and len(stored(runner)) > 10 and (not lost or file == lost[0]):
            lost.append(file)
            raise OSError(28, "No space left on device")
        return write(file, data, place)

    monkeypatch.setattr(os, "pwrite", full)
    append = runner_module._append_all
    monkeypatch.setattr(runner_module, "_append_all", lambda work: time.sleep(0.02) or append(work))
    backend = FakeBackend(some_bad)
    runner = world(count=24, chunk_rows=2, backend=backend, limit=16, threads=4)()
    with pytest.raises(JournalError, match="No space left on device.*run the command again"):
        asyncio.run(runner.run())
    assert lost
    monkeypatch.setattr(os, "pwrite", write)
    again = FakeBackend(some_bad)
    asyncio.run(Runner(runner._source, runner._asker, again, runner._folder, "hash", runner._settings).run())
    entries = [entry for journal in journals(runner) for entry in journal]
    assert sum(entry["done"] for entry in entries) == 48
    gc.collect()
    assert "never retrieved" not in own_log.text


def test_the_second_question_is_asked_with_what_the_first_said(world):
    """Mode explain: the journal gives the reply and its problems to the next try, also after a restart."""
    seen = []

    class Watching(FakeBackend):
        def prepare(self, prompt, sampling):
            seen.append((len(prompt.messages), sampling))
            return super().prepare(prompt, sampling)

    bad = Watching(lambda text, digest: Reply("no T-CoT", False, 1, 1))
    asker = TcotAsker(TcotSettings(tries=2, reask="explain"), PROMPTS)
    asyncio.run(run(world(count=2, backend=bad, asker=asker)))
    assert sorted(turns for turns, _ in seen) == [1] * 4 + [3] * 4
    assert len({sampling.seed for _, sampling in seen}) == 8
    assert {sampling.temperature for _, sampling in seen} == {0.0}


def test_a_resampled_reply_has_another_seed_and_a_temperature(world):
    seen = []

    class Watching(FakeBackend):
        def prepare(self, prompt, sampling):
            seen.append((len(prompt.messages), sampling))
            return super().prepare(prompt, sampling)

    bad = Watching(lambda text, digest: Reply("no T-CoT", False, 1, 1))
    asyncio.run(run(world(count=2, backend=bad, asker=TcotAsker(TcotSettings(tries=2, reask="resample"), PROMPTS))))
    assert {turns for turns, _ in seen} == {1} and len({sampling.seed for _, sampling in seen}) == 8
    assert sorted(sampling.temperature for _, sampling in seen) == [ALMOST_GREEDY] * 4 + [0.7] * 4


def test_assembling_takes_rows_in_the_order_of_the_input(world, tmp_path):
    from embedrl_verl.data.parquet import read_pairs

    backend = FakeBackend(lambda text, digest: Reply(tcot("text_keywords"), False, 1, 1) if "red" not in text else None)
    runner, _ = asyncio.run(run(world(backend=backend)))
    out = tmp_path / "out"
    out.mkdir()
    assemble(runner._source, runner._folder, out, keep_failed=True)
    ids = [pair.pair_id for part in sorted(out.glob("part-*")) for pair in read_pairs(part)]
    assert ids == [f"p{number}" for number in range(40)]
