# SPDX-License-Identifier: Apache-2.0
import asyncio
import contextlib
import gc
import pickle
import socket
import time
import warnings
from email.utils import formatdate

import pytest
from aiohttp import web

from embedrl_verl.errors import EmbedRLError
from embedrl_verl.serving import PoolSettings, ServerError, ServerPool
from embedrl_verl.serving.server import seconds_to_wait
from tests.serving.fakes import FakeServer, heartbeat

QUICK = {"timeout_s": 10.0, "backoff_s": 0.01, "probe_interval_s": 0.05}


def quick_pool(*urls, **change):
    return ServerPool(urls, PoolSettings(**{**QUICK, **change}), name="fake")


def in_turn(*answers):
    """An `answer` that gives these one after the other, and the last for ever."""
    left = list(answers)
    return lambda path, body: left.pop(0) if len(left) > 1 else left[0]


async def failure_of(request):
    with pytest.raises(ServerError) as caught:
        await request
    return caught.value


@pytest.fixture
def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_request_carries_body_and_key_and_gives_the_decoded_answer():
    async def run():
        async with FakeServer(lambda path, body: {"path": path, "got": body}) as server:
            async with ServerPool([server.url + "/v1"], api_key="key") as pool:
                assert await pool.post("/v1/x", {"a": "ü"}) == {"path": "/v1/x", "got": {"a": "ü"}}
                assert await pool.get("/v1/models") == {"path": "/v1/models", "got": None}
            assert {headers["Authorization"] for headers in server.headers} == {"Bearer key"}

    asyncio.run(run())


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_or_broken_answer_is_retried(status):
    async def run():
        async with FakeServer(in_turn(web.Response(status=status), "good")) as server, quick_pool(server.url) as pool:
            assert await pool.post("/x", {}) == "good"
            assert (pool.stats().requests, pool.stats().retries, pool.stats().failures) == (1, 1, 0)

    asyncio.run(run())


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refused_request_is_not_retried_and_the_server_is_quoted(status):
    async def run():
        body = '{"error": {"message": "no such field"}}'
        server = FakeServer(lambda *_: web.Response(status=status, text=body))
        async with server, quick_pool(server.url) as pool:
            error = await failure_of(pool.post("/x", {}))
            assert (error.cause, error.status, len(server.bodies)) == (f"HTTP {status}", status, 1)
            assert "no such field" in str(error) and server.url in str(error)
            assert pool.stats().servers[0].up and pool.metrics()["failures"] == 1

    asyncio.run(run())


def test_retries_end_and_the_error_names_the_cause():
    async def run():
        async with FakeServer(lambda *_: web.Response(status=503)) as server, quick_pool(server.url, retries=2) as pool:
            assert (await failure_of(pool.post("/x", {}))).cause == "HTTP 503"
            assert len(server.bodies) == 3

    asyncio.run(run())


def test_an_answer_that_is_not_json_is_an_error():
    async def run():
        async with FakeServer(lambda *_: web.Response(text="<html>")) as server, quick_pool(server.url) as pool:
            assert (await failure_of(pool.post("/x", {}))).cause == "not JSON"

    asyncio.run(run())


def test_a_retry_goes_to_another_server():
    async def run():
        bad, good = FakeServer(lambda *_: web.Response(status=500)), FakeServer(lambda *_: "good")
        async with bad, good, quick_pool(bad.url, good.url) as pool:
            assert await asyncio.gather(*(pool.post("/x", {}) for _ in range(4))) == ["good"] * 4
            assert (len(bad.bodies), len(good.bodies)) == (2, 4)

    asyncio.run(run())


def test_the_server_with_the_fewest_requests_in_flight_is_chosen():
    async def run():
        let_go = asyncio.Event()
        one, two = FakeServer(lambda *_: let_go.wait()), FakeServer(lambda *_: 1)
        async with one, two, quick_pool(one.url, two.url) as pool:
            held = [asyncio.create_task(pool.post("/x", {})) for _ in range(2)]  # one each
            await held[1]
            for _ in range(5):
                await pool.post("/x", {})
            assert (len(one.bodies), len(two.bodies)) == (1, 6)
            let_go.set()
            await held[0]
            for _ in range(4):  # ties take turns
                await pool.post("/x", {})
            assert (len(one.bodies), len(two.bodies)) == (3, 8)

    asyncio.run(run())


def test_retry_after_is_waited_for_only_if_no_other_server_is_ready():
    async def run():
        busy = web.Response(status=429, headers={"Retry-After": "0.4"})
        async with FakeServer(in_turn(busy, "late")) as one, FakeServer(lambda *_: "other") as two:
            async with quick_pool(one.url) as pool:
                start = time.monotonic()
                assert await pool.post("/x", {}) == "late"
                assert time.monotonic() - start > 0.38
            one.answer = in_turn(web.Response(status=503, headers={"Retry-After": "30"}), "late")
            async with quick_pool(one.url, two.url, timeout_s=30) as pool:
                assert await asyncio.wait_for(pool.post("/x", {}), 10) == "other"

    asyncio.run(run())


def test_retry_after_may_be_a_date_and_is_bounded():
    assert 8 < seconds_to_wait(formatdate(time.time() + 10, usegmt=True), 60) <= 10
    assert [seconds_to_wait(text, 60) for text in ("3600", "-1", "nan", "soon", "2.5")] == [60, 0, 0, 0, 2.5]


def test_no_more_than_the_limit_run_and_all_of_them_do():
    async def run():
        async def slow(*_):
            await asyncio.sleep(0.05)

        async with FakeServer(slow) as one, FakeServer(slow) as two:
            async with quick_pool(one.url, two.url, limit=8) as pool, heartbeat() as gaps:
                await asyncio.gather(*(pool.post("/x", {}) for _ in range(80)))
                assert pool.stats().most_in_flight == 8 and one.most + two.most <= 8
                assert 30 <= len(one.bodies) <= 50
            assert max(gaps) < 0.5

    asyncio.run(run())


def test_waiting_for_a_retry_takes_no_slot():
    async def run():
        answers = in_turn(web.Response(status=500), "good")
        async with FakeServer(answers) as server, quick_pool(server.url, limit=1, backoff_s=3) as pool:
            first = asyncio.create_task(pool.post("/x", {}))
            while not server.bodies:
                await asyncio.sleep(0.01)
            assert await pool.post("/x", {}) == "good"
            assert not first.done()
            assert await first == "good"

    asyncio.run(run())


def test_a_hanging_server_is_a_timeout_and_its_requests_end():
    async def run():
        server = FakeServer(lambda *_: asyncio.sleep(30))
        async with server, quick_pool(server.url, timeout_s=0.1, retries=1) as pool:
            start = time.monotonic()
            errors = await asyncio.gather(*(failure_of(pool.post("/x", {})) for _ in range(5)))
            assert {error.cause for error in errors} == {"timeout"} and time.monotonic() - start < 5

    asyncio.run(run())


def test_a_dead_server_is_named_with_its_cause(closed_port):
    async def run():
        async with quick_pool(closed_port, retries=2) as pool:
            error = await failure_of(pool.post("/x", {}))
            assert error.cause == "no server is up" and "connection refused" in str(error)
        async with quick_pool(closed_port, retries=0) as pool:
            await failure_of(pool.post("/x", {}))
            assert not pool.stats().servers[0].up and pool.metrics()["up/0"] == 0

    asyncio.run(run())


def test_the_deadline_ends_a_request_wherever_it_waits(closed_port):
    async def run():
        async with FakeServer(lambda *_: asyncio.sleep(30)) as server:
            cases = {
                "in the request": (quick_pool(server.url, timeout_s=20), "deadline"),
                "for a slot": (quick_pool(server.url, timeout_s=20, limit=1), "deadline"),
                "for a server": (quick_pool(closed_port), "no server is up"),
            }
            for where, (pool, cause) in cases.items():
                async with pool:
                    holder = asyncio.create_task(pool.post("/x", {}))
                    await asyncio.sleep(0.05)
                    start = time.monotonic()
                    error = await failure_of(pool.post("/x", {}, deadline=start + 0.3))
                    assert (error.cause, 0.25 < time.monotonic() - start < 5) == (cause, True), where
                    holder.cancel()
            async with quick_pool(server.url) as pool:
                error = await failure_of(pool.post("/x", {}, deadline=time.monotonic() - 1))
                assert error.cause == "deadline" and pool.stats().servers[0].up

    asyncio.run(run())


def test_a_server_that_dies_and_comes_back_is_used_again():
    async def run():
        one, two = FakeServer(lambda *_: 1), FakeServer(lambda *_: 2)
        async with one, contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(two)
            async with quick_pool(one.url, two.url) as pool:
                assert {await pool.post("/x", {}) for _ in range(4)} == {1, 2}
                await stack.aclose()
                assert {await pool.post("/x", {}) for _ in range(6)} == {1}
                assert [server.up for server in pool.stats().servers] == [True, False]
                again = await stack.enter_async_context(FakeServer(lambda *_: 2, port=two.port))
                while not pool.stats().servers[1].up:
                    await asyncio.sleep(0.01)
                assert {await pool.post("/x", {}) for _ in range(6)} == {1, 2} and len(again.bodies) == 3
                assert [server.up for server in pool.stats().servers] == [True, True]

    asyncio.run(run())


def test_requests_wait_for_a_restart_while_every_server_is_down():
    async def run():
        server = FakeServer(lambda *_: 1)
        async with server:
            pass
        async with quick_pool(server.url, retries=1) as pool:
            deadline = time.monotonic() + 60
            waiting = [asyncio.create_task(pool.post("/x", {}, deadline=deadline)) for _ in range(20)]
            await asyncio.sleep(0.4)
            assert not any(task.done() for task in waiting)
            async with FakeServer(lambda *_: 1, port=server.port):
                assert await asyncio.gather(*waiting) == [1] * 20

    asyncio.run(run())


def test_a_server_whose_health_says_it_is_broken_gets_no_requests():
    async def run():
        one, two = FakeServer(lambda *_: 1), FakeServer(lambda *_: 2, health=503)
        async with one, two, quick_pool(one.url, two.url) as pool:
            while pool.stats().servers[1].up:
                await asyncio.sleep(0.01)
            assert {await pool.post("/x", {}) for _ in range(4)} == {1}

    asyncio.run(run())


def test_a_request_sent_before_a_recovery_does_not_take_the_server_down_after_it():
    async def run():
        async def answer(path, body):
            await asyncio.sleep(30 if body == "hang" else 0)

        async with FakeServer(answer) as server, quick_pool(server.url, timeout_s=1, retries=0) as pool:
            hanging = [asyncio.create_task(failure_of(pool.post("/x", "hang")))]
            await asyncio.sleep(0.7)
            hanging.append(asyncio.create_task(failure_of(pool.post("/x", "hang"))))
            await hanging[0]
            while not pool.stats().servers[0].up:
                await asyncio.sleep(0.01)
            assert not hanging[1].done()
            await hanging[1]
            assert pool.stats().servers[0].up

    asyncio.run(run())


def test_one_pool_works_under_one_event_loop_after_another_and_remembers_health(closed_port):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pool = quick_pool(closed_port, f"127.0.0.1:{port}")
    up_before, answers = [], []

    async def step(closing):
        async with FakeServer(lambda *_: 1, port=port):
            up_before.append(pool.stats().servers[0].up)
            async with pool if closing else contextlib.nullcontext():
                answers.append(await asyncio.gather(*(pool.post("/x", {}) for _ in range(8))))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for closing in (True, False, True, False):
            asyncio.run(step(closing))
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


def test_closing_fails_what_is_in_flight_or_waiting_and_blames_no_server(closed_port):
    async def run():
        async with FakeServer(lambda *_: asyncio.sleep(30)) as server:
            pools = quick_pool(server.url, limit=1, timeout_s=60), quick_pool(closed_port, probe_interval_s=60)
            requests = [asyncio.create_task(failure_of(pool.post("/x", {}))) for pool in pools for _ in range(3)]
            await asyncio.sleep(0.2)
            for pool in pools:
                await pool.aclose()
            errors = await asyncio.wait_for(asyncio.gather(*requests), 20)
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
            await asyncio.wait_for(asyncio.gather(*(pool.post("/x", {}) for _ in range(4))), 5)

    asyncio.run(run())


def test_the_key_is_in_no_message():
    async def run():
        server = FakeServer(lambda *_: web.Response(status=401))
        async with server, ServerPool([server.url], api_key="secret") as pool:
            assert "secret" not in str(await failure_of(pool.post("/x", {}))) + repr(pool) + repr(pool.stats())

    asyncio.run(run())


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ServerError("text", "HTTP 503", 503)))
    assert (str(error), error.cause, error.status) == ("text", "HTTP 503", 503)


def test_a_cancellation_at_the_moment_of_a_timeout_is_not_lost():
    async def run():
        async with FakeServer(lambda *_: asyncio.sleep(30)) as server, quick_pool(server.url, timeout_s=0.05) as pool:
            for early in range(40):
                task = asyncio.create_task(pool.post("/x", {}))
                await asyncio.sleep(0.045 + early * 0.0005)
                time.sleep(0.01)  # both are due when the loop comes round
                task.cancel()
                await asyncio.wait((task,), timeout=0.2)
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

    asyncio.run(asyncio.wait_for(run(), 20))
