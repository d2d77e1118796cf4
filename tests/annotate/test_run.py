# SPDX-License-Identifier: Apache-2.0
"""Many requests at once, and little memory."""

import asyncio
import gc
import threading
from contextlib import closing

import pytest

from embedrl_verl.annotate.answers import Answers
from embedrl_verl.annotate.job import Run, TooManyFailed
from embedrl_verl.annotate.prompts import ALMOST_GREEDY, seed_of
from embedrl_verl.annotate.rows import Rows
from embedrl_verl.annotate.tcots import TcotSettings
from tests.annotate.fakes import FakeBackend, bad, job, pair_file


@pytest.fixture
def world(tmp_path):
    def build(backend, count=40, **changes):
        file = pair_file(tmp_path / "a.parquet", count)
        (tmp_path / "_work").mkdir(exist_ok=True)
        return Run(job([file], tmp_path, backend, **changes), Rows([file], 1000), tmp_path / "_work")

    return build


@pytest.mark.parametrize(
    ("limits", "least", "most", "rows"),
    [
        ({"limit": 64}, 68, 68, 100),  # 2 * 2 more, which wait for a place
        ({"limit": 500, "media_bytes": 5000}, 5, 5 + 2, 5),  # what the threads are at comes on top
    ],
)
def test_so_many_are_in_flight_as_limit_and_memory_allow_and_no_more_rows_are_read(world, limits, least, most, rows):
    """A server that never answers."""
    backend = FakeBackend()
    backend.delay = 3600
    run = world(backend, count=2000, **limits)

    async def look():
        task = asyncio.ensure_future(run.run())
        while backend.now < least:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # time for one too many
        now = backend.now
        task.cancel()
        await asyncio.wait([task])
        return now

    assert least <= asyncio.run(look()) <= most and run.rows_read <= rows


def test_memory_is_given_back_with_every_answer(world):
    backend = FakeBackend()
    backend.delay = 0.002
    run = world(backend, limit=32, media_bytes=5000, threads=3)
    asyncio.run(run.run())
    assert run.over == len(backend.asked) == 80 and backend.most <= 5 + 3


def test_too_many_failures_stop_early_with_causes_and_keep_the_answers(world, caplog):
    gc.collect()
    caplog.clear()
    backend = FakeBackend(bad)
    backend.delay = 0.001
    run = world(backend, count=4000, max_failed_share=0.5, first_check=50)
    with pytest.raises(TooManyFailed, match=r"no answer, over --max-failed-share 0.5. Causes: \d+ x the tags"):
        asyncio.run(run.run())
    stored = []
    with closing(Answers(run.work / "answers.jsonl", stored.append)):
        assert 0 < len(stored) == len(backend.replies) < 4000
    gc.collect()
    assert "never retrieved" not in caplog.text  # asyncio's note of an error that nobody has asked for


def test_what_failed_is_asked_again_from_the_start_if_that_is_wanted(world):
    mended = FakeBackend()
    for backend in (FakeBackend(bad), mended):
        with pytest.raises(TooManyFailed, match="--retry-failed"):
            asyncio.run(world(backend, max_failed_share=0.1).run())
    assert not mended.asked, "what is over is not asked again by itself"
    for _ in range(2):  # and what has a result is never asked again
        run = world(mended, retry_failed=True)
        asyncio.run(run.run())
        assert (run.over, run.failed.total(), len(mended.asked)) == (80, 0, 80)


@pytest.mark.parametrize(
    ("reask", "turns", "warm"), [("explain", 3, [0.0, 0.0]), ("resample", 1, [ALMOST_GREEDY, 0.7])]
)
def test_a_bad_reply_is_asked_again_with_what_was_wrong_or_drawn_again(world, reask, turns, warm):
    seen, threads = [], set()

    class Watching(FakeBackend):
        def prepare(self, prompt, sampling):
            seen.append((len(prompt.messages), sampling.temperature, sampling.seed))
            threads.add(threading.current_thread().name[:5])
            return super().prepare(prompt, sampling)

    asyncio.run(world(Watching(bad), count=2, settings=TcotSettings(tries=2, reask=reask)).run())
    assert sorted((count, heat) for count, heat, _ in seen) == [(1, warm[0])] * 4 + [(turns, warm[1])] * 4
    assert len({seed for _, _, seed in seen}) == 8
    assert threads == {"media"}  # the event loop stays free for those in flight


def test_seeds_differ_by_every_part_of_the_key_and_never_by_chance():
    keys = [(seed, pair, side, number) for seed in (0, 1) for pair in ("a", "b") for side in "qt" for number in (0, 1)]
    seeds = [seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(0, "a", "query", 0) == 4365023  # the same on every machine
