# SPDX-License-Identifier: Apache-2.0
"""Many requests at once, little memory, and no answer that depends on what was beside it or is lost."""

import asyncio
import gc
import os
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from embedrl_verl.annotate.answers import Answers
from embedrl_verl.annotate.backends import Reply
from embedrl_verl.annotate.questions import ALMOST_GREEDY, Question, is_in_share, seed_of
from embedrl_verl.annotate.rows import Rows
from embedrl_verl.annotate.runner import Runner, RunnerSettings, TooManyFailed
from embedrl_verl.annotate.tcots import TcotQuestions, TcotSettings
from embedrl_verl.errors import ResourceError
from tests.annotate.fakes import PROMPTS, FakeBackend, pair_file, pairs, some_bad
from tests.serving.fakes import heartbeat


@pytest.fixture
def world(tmp_path):
    def build(count=40, backend=None, questions=None, folder="work", **settings):
        rows = Rows([pair_file(tmp_path / "a.parquet", count)], 1000)
        settings = {"limit": 8, "threads": 2, "max_failed_share": 1.0, **settings}
        questions = questions or TcotQuestions(TcotSettings(reask="resample"), PROMPTS)
        (tmp_path / folder).mkdir(exist_ok=True)
        return Runner(rows, questions, backend or FakeBackend(), tmp_path / folder, RunnerSettings(**settings))

    return build


def stored(runner):
    entries = []
    Answers(runner._path, entries.append)
    return sorted(entries, key=lambda entry: (entry["id"], entry["question"], entry["try"]))


def test_every_side_is_answered_once_and_tries_follow_each_other(world):
    backend = FakeBackend(some_bad)
    runner = world(backend=backend)
    asyncio.run(runner.run())
    entries = stored(runner)
    keys = {(entry["id"], entry["question"], entry["try"]) for entry in entries}
    assert len(keys) == len(entries) == len(backend.asked) and {entry["try"] for entry in entries} == {0, 1, 2}
    final = [entry for entry in entries if entry["done"]]
    assert len(final) == 80 == runner.over
    assert sum(not entry["ok"] for entry in final) == runner.failed.total() > 0


@pytest.mark.parametrize("limit", [1, 3, 64])
def test_answers_do_not_depend_on_how_many_are_in_flight(world, limit):
    def answers(limit):
        runner = world(backend=FakeBackend(some_bad), limit=limit, folder=f"work{limit}")
        asyncio.run(runner.run())
        return stored(runner)

    assert answers(limit) == answers(8)


def test_as_many_are_in_flight_as_allowed_and_rows_are_not_read_far_ahead(world):
    """A server that never answers: the reader stops soon after the limit."""
    backend = FakeBackend()
    backend.delay = 3600
    runner = world(count=2000, backend=backend, limit=64, threads=2)

    async def look():
        task = asyncio.ensure_future(runner.run())
        while backend.now < 68:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        now = backend.now
        task.cancel()
        await asyncio.wait([task])
        return now

    assert asyncio.run(look()) == 64 + 2 * 2  # the rest waits for a slot of the pool
    assert runner.rows_read <= 100  # two sides a row, 72 sides in work or in the queue


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
    asyncio.run(world(backend=backend, limit=32, media_bytes=5000, threads=3).run())
    assert 5 <= most <= 5 + 3  # media_bytes, and what the threads are at


def test_the_event_loop_is_free_while_media_are_encoded(world):
    """No question is put together or encoded before the loop has come round meanwhile."""
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

    backend, real = FakeBackend(), TcotQuestions(TcotSettings(), PROMPTS)
    backend.prepare = heavy("prepare", backend.prepare)
    questions = SimpleNamespace(names=real.names, request=heavy("request", real.request))
    questions.check, questions.settings = real.check, real.settings

    async def look():
        async with heartbeat(beats):
            await world(backend=backend, questions=questions, count=12, threads=4).run()

    asyncio.run(look())
    assert done == {"request": 24, "prepare": 24}


def test_too_many_failures_stop_early_with_causes_and_keep_the_answers(world, caplog):
    gc.collect()
    caplog.clear()
    backend = FakeBackend(lambda text, digest: Reply("no", False, 1, 1))
    backend.delay = 0.001
    runner = world(count=4000, backend=backend, max_failed_share=0.5, first_check=50)
    with pytest.raises(TooManyFailed, match=r"no answer, over --max-failed-share 0.5. Causes: \d+ x the tags"):
        asyncio.run(runner.run())
    assert len(stored(runner)) == runner.replies > 0 and len(backend.asked) < 4000
    gc.collect()
    assert "never retrieved" not in caplog.text  # asyncio's note of an error that nobody has asked for


def test_a_share_within_its_limit_is_no_error_and_is_looked_at_again_at_the_end(world):
    runner = world(backend=FakeBackend(some_bad))
    asyncio.run(runner.run())
    share = runner.failed.total() / runner.over
    asyncio.run(world(backend=FakeBackend(some_bad), max_failed_share=share).run())
    with pytest.raises(TooManyFailed):
        asyncio.run(world(backend=FakeBackend(some_bad), max_failed_share=share - 1e-6).run())


def test_a_full_disk_ends_the_run_and_the_next_completes_it(world, monkeypatch):
    write = os.write

    def full(file, data):
        if b'"question"' in bytes(data):
            raise OSError(28, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(os, "write", full)
    runner = world(count=24, backend=FakeBackend(some_bad))
    with pytest.raises(ResourceError, match="the disk is full.*run the same command again"):
        asyncio.run(runner.run())
    monkeypatch.undo()
    asyncio.run(world(count=24, backend=FakeBackend(some_bad)).run())
    assert sum(entry["done"] for entry in stored(runner)) == 48


@pytest.mark.parametrize(
    ("reask", "turns", "warm"), [("explain", 3, [0.0, 0.0]), ("resample", 1, [ALMOST_GREEDY, 0.7])]
)
def test_a_bad_reply_is_asked_again_with_what_was_wrong_or_drawn_again(world, reask, turns, warm):
    seen = []

    class Watching(FakeBackend):
        def prepare(self, prompt, sampling):
            seen.append((len(prompt.messages), sampling))
            return super().prepare(prompt, sampling)

    bad = Watching(lambda text, digest: Reply("no T-CoT", False, 1, 1))
    questions = TcotQuestions(TcotSettings(tries=2, reask=reask), PROMPTS)
    asyncio.run(world(count=2, backend=bad, questions=questions).run())
    assert sorted(count for count, _ in seen) == [1] * 4 + [turns] * 4 and len({one.seed for _, one in seen}) == 8
    assert sorted(one.temperature for _, one in seen) == [warm[0]] * 4 + [warm[1]] * 4


def test_seeds_differ_by_every_part_of_the_key_and_never_by_chance():
    keys = [(seed, pair, side, number) for seed in (0, 1) for pair in ("a", "b") for side in "qt" for number in (0, 1)]
    seeds = [seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(0, "a", "query", 0) == 4365023  # the same on every machine


def test_a_larger_share_holds_the_smaller_one():
    names = [f"p{n}" for n in range(5000)]
    drawn = {share: {name for name in names if is_in_share(share, 0, "gold", name)} for share in (0.0, 0.3, 0.6, 1.0)}
    assert not drawn[0.0] and drawn[0.3] < drawn[0.6] < drawn[1.0] == set(names)
    assert abs(len(drawn[0.3]) / 5000 - 0.3) < 0.03


@pytest.mark.parametrize(
    ("number", "first", "expected"), [(0, 0.0, ALMOST_GREEDY), (1, 0.0, 0.7), (0, 0.5, 0.5), (1, 0.9, 0.9)]
)
def test_later_tries_are_drawn_and_the_first_one_too(number, first, expected):
    """vLLM's CPU sampler heeds no seed in a batch that has a greedy request."""
    question = Question(pairs(1)[0], "query", ({},) * number)
    assert TcotSettings(temperature=first).sampling(question, redraw=True).temperature == expected
