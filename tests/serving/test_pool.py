# SPDX-License-Identifier: Apache-2.0
import asyncio
import contextlib
import pickle
import time
from email.utils import formatdate

import pytest
from aiohttp import web

from embedrl_verl.serving import ServerError, ServerPool
from embedrl_verl.serving.pool import HOME_SLACK
from embedrl_verl.serving.server import seconds_to_wait
from tests.serving.fakes import FakeServer, failure_of, free_url, quick_pool


def in_turn(*answers):
    """An `answer` that gives these one after the other, and the last for ever."""
    left = list(answers)
    return lambda path, body: left.pop(0) if len(left) > 1 else left[0]


def test_a_request_carries_body_and_key_and_gives_the_decoded_answer():
    async def run():
        async with FakeServer(lambda path, body: {"path": path, "got": body}) as server:
            async with ServerPool([server.url + "/v1"], api_key="key") as pool:
                assert await pool.post("/v1/x", {"a": "ü"}) == {"path": "/v1/x", "got": {"a": "ü"}}
                assert await pool.get("/v1/models") == {"path": "/v1/models", "got": None}
            assert {headers["Authorization"] for headers in server.headers} == {"Bearer key"}

    asyncio.run(run())


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
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
    assert 30 < seconds_to_wait(formatdate(time.time() + 50, usegmt=True), 60) <= 50
    assert [seconds_to_wait(text, 60) for text in ("3600", "-1", "nan", "soon", "2.5")] == [60, 0, 0, 0, 2.5]


def test_no_more_than_the_limit_run_and_all_of_them_do():
    async def run():
        async def slow(*_):
            await asyncio.sleep(0.05)

        one, two = FakeServer(slow), FakeServer(slow)
        async with one, two, quick_pool(one.url, two.url, limit=8) as pool:
            await asyncio.gather(*(pool.post("/x", {}) for _ in range(80)))
            assert pool.stats().most_in_flight == 8 and one.most + two.most <= 8
            assert 30 <= len(one.bodies) <= 50

    asyncio.run(run())


def test_waiting_for_a_retry_takes_no_slot():
    async def run():
        answers = in_turn(web.Response(status=500), "good")
        async with FakeServer(answers) as server, quick_pool(server.url, limit=1, backoff_s=6) as pool:
            first = asyncio.create_task(pool.post("/x", {"n": 1}))
            while not server.bodies:
                await asyncio.sleep(0.01)
            assert await pool.post("/x", {"n": 2}) == "good"
            assert await first == "good"
            assert [body["n"] for body in server.bodies] == [1, 2, 1]

    asyncio.run(run())


def test_a_hanging_server_is_a_timeout_and_its_requests_end():
    async def run():
        server = FakeServer(lambda *_: asyncio.sleep(30))
        async with server, quick_pool(server.url, timeout_s=1, retries=1, probe_interval_s=20) as pool:
            start = time.monotonic()
            errors = await asyncio.gather(*(failure_of(pool.post("/x", {})) for _ in range(5)))
            assert {error.cause for error in errors} == {"timeout"} and time.monotonic() - start < 20
            while server.now:  # nothing goes on behind the caller's back
                assert time.monotonic() - start < 25
                await asyncio.sleep(0.01)

    asyncio.run(run())


def test_a_dead_server_is_named_with_its_cause():
    async def run():
        async with quick_pool(free_url(), retries=2) as pool:
            error = await failure_of(pool.post("/x", {}))
            assert error.cause == "no server is up" and "connection refused" in str(error)
        async with quick_pool(free_url(), retries=0) as pool:
            await failure_of(pool.post("/x", {}))
            assert not pool.stats().servers[0].up and pool.metrics()["up/0"] == 0

    asyncio.run(run())


def test_the_deadline_ends_a_request_wherever_it_waits():
    async def run():
        async with FakeServer(lambda *_: asyncio.sleep(30)) as server:
            cases = {
                "in the request": (quick_pool(server.url, timeout_s=20), "deadline"),
                "for a slot": (quick_pool(server.url, timeout_s=20, limit=1), "deadline"),
                "for a server": (quick_pool(free_url()), "no server is up"),
            }
            for where, (pool, cause) in cases.items():
                async with pool:
                    holder = asyncio.create_task(pool.post("/x", {}))
                    await asyncio.sleep(0.05)
                    start = time.monotonic()
                    error = await failure_of(pool.post("/x", {}, deadline=start + 1))
                    assert (error.cause, 0.95 < time.monotonic() - start < 15) == (cause, True), where
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


def test_a_server_that_is_gone_is_found_again_long_before_the_next_round_of_probes():
    async def run():
        one, two = FakeServer(lambda *_: 1), FakeServer(lambda *_: 2)
        async with one, two:
            pass
        async with quick_pool(one.url, two.url, probe_interval_s=600) as pool:
            await asyncio.gather(*(failure_of(pool.post("/x", {}, deadline=time.monotonic() + 0.5)) for _ in range(4)))
            assert [server.up for server in pool.stats().servers] == [False, False]
            deadline = time.monotonic() + 60
            waiting = asyncio.create_task(pool.post("/x", {}, deadline=deadline))
            async with FakeServer(lambda *_: 1, port=one.port):
                assert await waiting == 1
                async with FakeServer(lambda *_: 2, port=two.port):  # also while another one is up
                    while not pool.stats().servers[1].up:
                        assert time.monotonic() < deadline
                        await asyncio.sleep(0.01)

    asyncio.run(run())


def test_a_server_that_timed_out_gets_no_requests_before_the_next_round_of_probes_if_another_is_up():
    async def run():
        one, two = FakeServer(lambda *_: asyncio.sleep(60)), FakeServer(lambda *_: 2)
        async with one, two, quick_pool(one.url, two.url, probe_interval_s=600, timeout_s=1) as pool:
            assert await asyncio.gather(*(pool.post("/x", {}) for _ in range(2))) == [2, 2]
            await asyncio.sleep(2.5)
            assert [server.up for server in pool.stats().servers] == [False, True]

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
            await asyncio.sleep(30)

        async with FakeServer(answer) as server, quick_pool(server.url, timeout_s=8, retries=0) as pool:
            hanging = [asyncio.create_task(failure_of(pool.post("/x", {})))]
            await asyncio.sleep(4)
            hanging.append(asyncio.create_task(failure_of(pool.post("/x", {}))))
            assert (await hanging[0]).cause == "timeout"
            while not pool.stats().servers[0].up:
                await asyncio.sleep(0.01)
            assert not hanging[1].done()
            assert (await hanging[1]).cause == "timeout"
            assert pool.stats().servers[0].up

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


def test_a_home_that_has_too_much_in_flight_shares_with_the_others():
    async def run():
        one, two = FakeServer(lambda *_: asyncio.sleep(30)), FakeServer(lambda *_: asyncio.sleep(30))
        async with one, two, quick_pool(one.url, two.url, limit=100) as pool:
            tasks = [asyncio.create_task(pool.post("/x", {}, home=0)) for _ in range(60)]
            while one.now + two.now < 60:
                await asyncio.sleep(0.01)
            assert 0 < one.now - two.now <= HOME_SLACK + 1
            for task in tasks:
                task.cancel()

    asyncio.run(run())
