# SPDX-License-Identifier: Apache-2.0
"""A pool under one event loop after another, closed early, and with cancelled requests."""

import asyncio
import contextlib
import gc
import time
import warnings

import pytest

from embedrl_verl.errors import EmbedRLError
from tests.serving.fakes import FakeServer, failure_of, free_url, quick_pool


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_one_pool_works_under_one_event_loop_after_another_and_remembers_health():
    url = free_url()
    pool = quick_pool(free_url(), url)
    up_before, answers = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()  # what earlier tests left behind is not of this pool

    async def step(closing):
        async with FakeServer(lambda *_: 1, port=int(url.rsplit(":")[-1])):
            up_before.append(pool.stats().servers[0].up)
            async with pool if closing else contextlib.nullcontext():
                answers.append(await asyncio.gather(*(pool.post("/x", {}) for _ in range(8))))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for closing in (True, False, True, False):
            asyncio.run(step(closing))
            assert closing or pool._running.session.closed
            gc.collect()
    assert answers == [[1] * 8] * 4 and up_before == [True, False, False, False]
    assert pool.metrics()["in_flight"] == 0


def test_two_loops_at_a_time_are_refused():
    async def run():
        async with FakeServer(lambda *_: 1) as server, quick_pool(server.url) as pool:
            await pool.post("/x", {})
            with pytest.raises(EmbedRLError, match="another event loop"):
                await asyncio.to_thread(lambda: asyncio.run(pool.get("/x")))

    asyncio.run(run())


def test_the_last_user_closes_and_a_request_after_that_opens_again():
    async def run():
        async with FakeServer(lambda *_: 1) as server:
            pool = quick_pool(server.url)
            async with pool:
                async with pool:
                    await pool.post("/x", {})
                session = pool._running.session
                assert not session.closed
            assert session.closed
            assert await pool.post("/x", {}) == 1
            await pool.aclose()

    asyncio.run(run())


def test_a_pool_that_is_closed_before_it_did_anything_leaves_no_session():
    async def run():
        async with quick_pool("127.0.0.1:1") as pool:
            session = pool._running.session
        assert session.closed

    asyncio.run(run())


def test_closing_fails_what_is_in_flight_or_waiting_and_blames_no_server():
    async def run():
        async with FakeServer(lambda *_: asyncio.sleep(30)) as server:
            pools = quick_pool(server.url, limit=1, timeout_s=60), quick_pool(free_url(), probe_interval_s=60)
            requests = [asyncio.create_task(failure_of(pool.post("/x", {}))) for pool in pools for _ in range(3)]
            await asyncio.sleep(0.2)
            for pool in pools:
                await pool.aclose()
            errors = await asyncio.wait_for(asyncio.gather(*requests), 25)
            assert {error.cause for error in errors} == {"pool closed"}
            assert pools[0].stats().servers[0].up

    asyncio.run(run())


def test_cancelled_requests_leave_nothing_behind():
    async def run():
        async with FakeServer(lambda *_: asyncio.sleep(0.2)) as server, quick_pool(server.url, limit=4) as pool:
            tasks = [asyncio.create_task(pool.post("/x", {})) for _ in range(12)]
            await asyncio.sleep(0.05)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert pool.metrics()["in_flight"] == 0 and pool.stats().servers[0].up
            assert [await pool._running.slots.acquire(0.0) for _ in range(5)] == [True] * 4 + [False]

    asyncio.run(run())


def test_a_cancellation_at_the_moment_of_a_timeout_is_not_lost():
    async def run():
        async with FakeServer(lambda *_: asyncio.sleep(30)) as server, quick_pool(server.url, timeout_s=0.05) as pool:
            for early in range(40):
                task = asyncio.create_task(pool.post("/x", {}))
                await asyncio.sleep(0.045 + early * 0.0005)
                time.sleep(0.01)  # both are due when the loop comes round
                task.cancel()
                await asyncio.wait((task,), timeout=20)
                assert task.cancelled()

    asyncio.run(run())


@pytest.mark.parametrize("pause", [0.0, 0.001, 0.05])
def test_a_pool_closes_whatever_its_probes_are_doing(pause):
    async def run():
        async with FakeServer(lambda *_: 1) as server:
            for _ in range(30):
                async with quick_pool(server.url, probe_interval_s=0.05, timeout_s=0.05):
                    await asyncio.sleep(pause)
                    time.sleep(0.01 if pause else 0)

    asyncio.run(asyncio.wait_for(run(), 60))
