# SPDX-License-Identifier: Apache-2.0
"""Many requests at once, and little memory."""

import asyncio
import gc
import threading
import time
from types import SimpleNamespace

import pytest

from embedrl_verl.annotate.answers import Answers
from embedrl_verl.annotate.backends import Reply
from embedrl_verl.annotate.questions import ALMOST_GREEDY, seed_of
from embedrl_verl.annotate.rows import Rows
from embedrl_verl.annotate.runner import Runner, RunnerSettings, TooManyFailed
from embedrl_verl.annotate.tcots import TcotQuestions, TcotSettings
from tests.annotate.fakes import PROMPTS, FakeBackend, pair_file


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


def test_rows_that_wait_for_memory_are_not_read(world):
    backend = FakeBackend()
    backend.delay, backend.prepare = (
        3600,
        lambda prompt, sampling: ((prompt.messages[0]["content"][-1]["text"], ""), 1000),
    )
    runner = world(count=2000, backend=backend, limit=500, media_bytes=5000)

    async def look():
        task = asyncio.ensure_future(runner.run())
        while runner.rows_read < 3:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(look())
    assert runner.rows_read <= 5


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


def test_what_failed_is_asked_again_from_the_start_if_that_is_wanted(world):
    broken, mended = FakeBackend(lambda text, digest: Reply("no", False, 1, 1)), FakeBackend()
    with pytest.raises(TooManyFailed, match="--retry-failed"):
        asyncio.run(world(backend=broken, max_failed_share=0.1).run())
    with pytest.raises(TooManyFailed):
        asyncio.run(world(backend=mended, max_failed_share=0.1).run())
    assert not mended.asked, "what is over is not asked again by itself"
    runner = world(backend=mended, retry_failed=True)
    asyncio.run(runner.run())
    assert (runner.over, runner.failed.total(), len(mended.asked)) == (80, 0, 80)
    asyncio.run(world(backend=mended, retry_failed=True).run())
    assert len(mended.asked) == 80, "what has a result is never asked again"


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


def test_questions_are_put_together_and_encoded_in_threads(world):
    """The event loop stays free for those in flight."""
    names, backend, questions = set(), FakeBackend(), TcotQuestions(TcotSettings(), PROMPTS)

    def request(question):
        names.add(threading.current_thread().name[:5])
        return questions.request(question)

    real, backend.prepare = (
        backend.prepare,
        lambda *asked: names.add(threading.current_thread().name[:5]) or real(*asked),
    )
    there = {name: getattr(questions, name) for name in ("names", "check", "settings")}
    asyncio.run(world(backend=backend, questions=SimpleNamespace(request=request, **there), count=3).run())
    assert names == {"media"}
