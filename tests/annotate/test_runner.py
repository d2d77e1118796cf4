# SPDX-License-Identifier: Apache-2.0
"""Many requests at once, little memory, a free event loop, and no answer that depends on what was beside it."""

import asyncio
import gc
import time

import pytest

from embedrl_verl.annotate import runner as runner_module
from embedrl_verl.annotate.assemble import assemble
from embedrl_verl.annotate.backends import Reply
from embedrl_verl.annotate.chunks import ChunkedInput
from embedrl_verl.annotate.journal import read_journal
from embedrl_verl.annotate.runner import Runner, RunnerSettings, TooManyBad, journal_path
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
    assert opened <= 8


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
    """No question is put together before the loop has come round meanwhile."""
    beats = []

    class Heavy(TcotAsker):
        def ask(self, errand):
            before, until = len(beats), time.monotonic() + 20
            while len(beats) < before + 5:
                assert time.monotonic() < until, "the event loop stands still"
                time.sleep(0.002)
            return super().ask(errand)

    async def look(build):
        async with heartbeat(beats):
            await build().run()

    asyncio.run(look(world(asker=Heavy(TcotSettings(), PROMPTS), count=12, threads=4)))
    assert beats


def test_too_many_failures_stop_early_and_keep_the_answers(world, tmp_path, caplog):
    backend = FakeBackend(lambda text, digest: Reply("no", False, 1, 1))
    backend.delay = 0.001
    build = world(count=4000, backend=backend, max_failed_share=0.5, first_check=50)
    with pytest.raises(TooManyBad, match=r"cannot be used, above --max-failed-share 0.5. Causes: \d+ x the tags must"):
        asyncio.run(run(build))
    asked = len(backend.asked)
    assert asked < 4000
    stored = sum(len(path.read_bytes().splitlines()) - 1 for path in tmp_path.glob("work*/journal-*.jsonl"))
    assert 0 < stored <= asked + len(list(tmp_path.glob("work*/journal-*.jsonl")))
    gc.collect()
    assert "never retrieved" not in caplog.text  # asyncio's note of an error that nobody has asked for


def test_a_share_within_its_limit_is_no_error_and_is_looked_at_again_at_the_end(world):
    backend = FakeBackend(some_bad)
    _, progress = asyncio.run(run(world(backend=backend)))
    share = progress.failed.total() / progress.errands
    asyncio.run(run(world(backend=FakeBackend(some_bad), max_failed_share=share)))
    with pytest.raises(TooManyBad):
        asyncio.run(run(world(backend=FakeBackend(some_bad), max_failed_share=share - 1e-6)))


@pytest.mark.parametrize("slow", ["nothing", "reading", "writing"])
def test_an_error_of_the_backend_ends_the_run_and_every_answer_before_it_is_kept(world, monkeypatch, slow):
    """Those too that are still being read, or wait for the disk."""
    answered = []

    class Breaks(FakeBackend):
        async def complete(self, request):
            if len(self.asked) > 30:
                raise RuntimeError("lost")
            reply = await super().complete(request)
            answered.append(request)
            return reply

    def slowly(do):
        def done(*args):
            time.sleep(0.05)
            return do(*args)

        return done

    if slow == "reading":
        monkeypatch.setattr(TcotAsker, "read", slowly(TcotAsker.read))
    if slow == "writing":
        monkeypatch.setattr(runner_module, "_append_all", slowly(runner_module._append_all))
    first = Breaks()
    build = world(backend=first)
    runner = build()
    with pytest.raises(RuntimeError, match="lost"):
        asyncio.run(runner.run())
    again = FakeBackend()
    second = Runner(runner._source, runner._asker, again, runner._folder, "hash", runner._settings)
    asyncio.run(second.run())
    assert answered and len(again.asked) == 80 - len(answered)
    assert {body for _, body in answered}.isdisjoint(again.asked)


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
