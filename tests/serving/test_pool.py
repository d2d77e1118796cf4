# SPDX-License-Identifier: Apache-2.0
"""A request ends in time with an answer or with its cause, at a server that is well; nothing outlives its loop."""

import asyncio
import contextlib
import gc
import pickle
import time
import warnings
from email.utils import formatdate
from types import SimpleNamespace

import pytest
from aiohttp import web

from embedrl_verl.errors import ConfigError, EmbedRLError
from embedrl_verl.serving import PoolSettings, ServerPool, server_url
from embedrl_verl.serving.pool import AFFINITY_SLACK
from embedrl_verl.serving.server import seconds_to_wait
from tests.serving.fakes import QUICK, FakeServer, failure_of, free_url, in_a_loop, quick_pool


def in_turn(*answers):
    """An `answer` that gives these one after the other, and the last for ever."""
    left = list(answers)
    return lambda path, body: left.pop(0) if len(left) > 1 else left[0]


async def hang(path, body):
    await asyncio.sleep(60)


async def until(holds, within_s=60.0):
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def ups(pool):
    return [server.up for server in pool.servers]


@pytest.mark.parametrize("key", ["mine", None])
def test_a_request_carries_its_body_and_its_own_key_and_passes_no_proxy(key, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, free_url())
    monkeypatch.setenv("OPENAI_API_KEY", "of somebody else")

    async def run():
        async with FakeServer(lambda path, body: {"path": path, "got": body}) as server:
            async with quick_pool(server.url + "/v1", api_key=key) as pool:
                for body in ({"a": "ü"}, b'{"a": "\xc3\xbc"}'):
                    assert await pool.post("/v1/x", body) == {"path": "/v1/x", "got": {"a": "ü"}}
                assert await pool.get("/version") == {"path": "/version", "got": None}
            assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {key or 'EMPTY'}"}

    asyncio.run(run())


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
@in_a_loop
async def test_a_busy_or_broken_answer_is_retried(status):
    async with FakeServer(in_turn(web.Response(status=status), "good")) as server, quick_pool(server.url) as pool:
        assert await pool.post("/x", {}) == "good" and (pool.requests, pool.retries) == (1, 1)


@pytest.mark.parametrize("status", [400, 401, 404, 422])
@in_a_loop
async def test_a_refused_request_is_not_retried_and_the_server_is_quoted(status):
    server = FakeServer(lambda *_: web.json_response({"error": {"message": "no such field"}}, status=status))
    async with server, quick_pool(server.url, api_key="secret") as pool:
        error = await failure_of(pool.post("/x", {}))
        assert (error.cause, error.status, len(server.bodies)) == (f"HTTP {status}", status, 1)
        assert "no such field" in str(error) and server.url in str(error) and ups(pool) == [True]
        assert "secret" not in f"{error} {pool!r} {vars(error)}"
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.cause, again.status) == (str(error), error.cause, status)


@pytest.mark.parametrize(
    ("answer", "cause"),
    [({"status": 503}, "HTTP 503"), ({"text": "<html>"}, "not JSON")],
)
@in_a_loop
async def test_retries_end_and_the_error_names_the_cause(answer, cause):
    async with FakeServer(lambda *_: web.Response(**answer)) as server, quick_pool(server.url, retries=2) as pool:
        assert (await failure_of(pool.post("/x", {}))).cause == cause
        assert len(server.bodies) == 3


@in_a_loop
async def test_a_retry_goes_to_another_server():
    bad, good = FakeServer(lambda *_: web.Response(status=500)), FakeServer(lambda *_: "good")
    async with bad, good, quick_pool(bad.url, good.url) as pool:
        assert await asyncio.gather(*(pool.post("/x", {}) for _ in range(4))) == ["good"] * 4
        assert (len(bad.bodies), len(good.bodies)) == (2, 4)


@in_a_loop
async def test_the_server_with_the_fewest_requests_in_flight_is_chosen():
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
        for _ in range(7):  # of equals the least used
            await pool.post("/x", {})
        assert (len(one.bodies), len(two.bodies)) == (7, 7)


@in_a_loop
async def test_an_affinity_stays_with_its_server_until_that_has_too_much_in_flight():
    one, two = FakeServer(hang), FakeServer(hang)
    async with one, two, quick_pool(one.url, two.url, limit=100) as pool:
        tasks = [asyncio.create_task(pool.post("/x", {}, affinity=2)) for _ in range(60)]
        await until(lambda: one.now + two.now == 60)
        assert one.now - two.now == AFFINITY_SLACK
        for task in tasks:
            task.cancel()


@in_a_loop
async def test_retry_after_is_waited_for_only_if_no_other_server_is_ready():
    busy = web.Response(status=429, headers={"Retry-After": "0.4"})
    async with FakeServer(in_turn(busy, "late")) as one, FakeServer(lambda *_: "other") as two:
        async with quick_pool(one.url) as pool:
            start = time.monotonic()
            assert await pool.post("/x", {}) == "late" and time.monotonic() - start > 0.38
        one.answer = in_turn(web.Response(status=503, headers={"Retry-After": "30"}), "late")
        async with quick_pool(one.url, two.url, timeout_s=30) as pool:
            assert await asyncio.wait_for(pool.post("/x", {}), 20) == "other"


def test_retry_after_may_be_a_date_and_is_bounded():
    assert 30 < seconds_to_wait(formatdate(time.time() + 50, usegmt=True), 60) <= 50
    assert [seconds_to_wait(text, 60) for text in ("3600", "-1", "nan", "soon", "", "2.5")] == [60, 0, 0, 0, 0, 2.5]


@in_a_loop
async def test_no_more_than_the_limit_run_at_once_and_waiting_for_a_retry_takes_no_place():
    async def slow(path, body):
        await asyncio.sleep(0.05)

    one, two = FakeServer(slow), FakeServer(slow)
    async with one, two, quick_pool(one.url, two.url, limit=8) as pool:
        await asyncio.gather(*(pool.post("/x", {}) for _ in range(40)))
        assert one.most + two.most == 8 and 15 <= len(one.bodies) <= 25
    three = FakeServer(in_turn(web.Response(status=500), "good"))
    async with three, quick_pool(three.url, limit=1, backoff_s=6) as pool:
        first = asyncio.create_task(pool.post("/x", {"n": 1}))
        await until(lambda: three.bodies)
        assert await pool.post("/x", {"n": 2}) == "good" and await first == "good"
        assert [body["n"] for body in three.bodies] == [1, 2, 1]


@in_a_loop
async def test_a_hanging_server_is_a_timeout_and_its_requests_end():
    async with FakeServer(hang) as server, quick_pool(server.url, timeout_s=1, retries=1) as pool:
        errors = await asyncio.gather(*(failure_of(pool.post("/x", {})) for _ in range(5)))
        # On a slow machine /health may be late too, and the server is lost then.
        assert {error.cause for error in errors} <= {"timeout", "no server is up"}
        assert all("timeout" in str(error) for error in errors)
        await until(lambda: not server.now)  # nothing goes on behind the caller's back


@pytest.mark.parametrize(("retries", "cause"), [(0, "connection refused"), (2, "no server is up")])
@in_a_loop
async def test_a_dead_server_is_named_with_its_cause(retries, cause):
    async with quick_pool(free_url(), retries=retries) as pool:
        error = await failure_of(pool.post("/x", {}))
        assert error.cause == cause and "connection refused" in str(error) and f"try {retries + 1}:" in str(error)
        assert ups(pool) == [False]


@pytest.mark.parametrize("where", ["in the request", "for a place", "for a server"])
@in_a_loop
async def test_the_deadline_ends_a_request_wherever_it_waits(where):
    async with FakeServer(hang) as server:
        url = free_url() if where == "for a server" else server.url
        async with quick_pool(url, timeout_s=20, limit=1 if where == "for a place" else 9) as pool:
            holder = asyncio.create_task(failure_of(pool.post("/x", {}, deadline=time.monotonic() + 40)))
            await asyncio.sleep(0.05)
            start = time.monotonic()
            error = await failure_of(pool.post("/x", {}, deadline=start + 1))
            assert 0.95 < time.monotonic() - start < 15
            assert error.cause == ("no server is up" if where == "for a server" else "deadline")
            assert ups(pool) == [where != "for a server"]  # the deadline says nothing about the server
            assert (await failure_of(pool.post("/x", {}, deadline=start - 1))).cause == error.cause
            holder.cancel()


@in_a_loop
async def test_a_server_that_dies_and_comes_back_is_used_again():
    one, two = FakeServer(lambda *_: 1), FakeServer(lambda *_: 2)
    async with one, contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(two)
        async with quick_pool(one.url, two.url, probe_interval_s=600) as pool:  # long before a round of probes
            assert {await pool.post("/x", {}) for _ in range(4)} == {1, 2}
            await stack.aclose()
            assert {await pool.post("/x", {}) for _ in range(6)} == {1} and ups(pool) == [True, False]
            await stack.enter_async_context(FakeServer(lambda *_: 2, port=two.port))
            await until(lambda: ups(pool) == [True, True])
            assert {await pool.post("/x", {}) for _ in range(6)} == {1, 2}


@in_a_loop
async def test_requests_wait_for_a_restart_while_every_server_is_down():
    url = free_url()
    async with quick_pool(url, free_url(), retries=1) as pool:
        deadline = time.monotonic() + 60
        waiting = [asyncio.create_task(pool.post("/x", {}, deadline=deadline)) for _ in range(20)]
        await asyncio.sleep(0.4)
        assert not any(task.done() for task in waiting)
        async with FakeServer(lambda *_: 1, port=int(url.rsplit(":", 1)[1])):
            assert await asyncio.gather(*waiting) == [1] * 20


@pytest.mark.parametrize("alone", [True, False])
@in_a_loop
async def test_a_server_that_timed_out_is_left_alone_while_another_is_up(alone):
    one, two = FakeServer(hang), FakeServer(lambda *_: 2)
    options = {"probe_interval_s": 600, "timeout_s": 1}
    async with one, two, contextlib.AsyncExitStack() as stack:
        urls = [one.url] if alone else [one.url, two.url]
        pool = await stack.enter_async_context(quick_pool(*urls, **options))
        requests = [pool.post("/x", {}, deadline=time.monotonic() + 5) for _ in range(2)]
        answers = await asyncio.gather(*requests, return_exceptions=True)
        assert alone or answers == [2, 2]
        await asyncio.sleep(2.5)
        assert (len(one.bodies) > 2) is alone
        assert alone or ups(pool) == [False, True]


@in_a_loop
async def test_a_server_whose_health_says_it_is_broken_gets_no_requests():
    one, two = FakeServer(lambda *_: 1), FakeServer(lambda *_: web.Response(status=500), health=503)
    async with one, two, quick_pool(one.url, two.url) as pool:
        assert [await pool.post("/x", {}) for _ in range(2)] == [1, 1]
        await until(lambda: ups(pool) == [True, False])
        asked = len(two.bodies)
        assert [await pool.post("/x", {}) for _ in range(4)] == [1] * 4 and len(two.bodies) == asked
        two.health = 404  # one without that route is as good as well
        await until(lambda: ups(pool) == [True, True])


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_one_pool_works_under_one_event_loop_after_another_and_remembers_health(caplog):
    url = free_url()
    pool = quick_pool(free_url(), url)
    up_before, answers = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()  # what earlier tests left behind is not of this pool

    async def step(closing):
        async with FakeServer(lambda *_: 1, port=int(url.rsplit(":")[-1])):
            up_before.append(ups(pool)[0])
            async with pool if closing else contextlib.nullcontext():
                answers.append(await asyncio.gather(*(pool.post("/x", {}) for _ in range(8))))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for closing in (True, False, True, False):
            asyncio.run(step(closing))
            gc.collect()
    assert answers == [[1] * 8] * 4 and up_before == [True, False, False, False]
    assert [server.in_flight for server in pool.servers] == [0, 0]
    assert "Unclosed" not in caplog.text and "never retrieved" not in caplog.text


@in_a_loop
async def test_two_loops_at_a_time_are_refused():
    async with FakeServer(lambda *_: 1) as server, quick_pool(server.url) as pool:
        await pool.post("/x", {})
        with pytest.raises(EmbedRLError, match="another event loop"):
            await asyncio.to_thread(lambda: asyncio.run(pool.get("/x")))


@in_a_loop
async def test_closing_fails_what_is_in_flight_or_waiting_and_blames_no_server():
    async with FakeServer(hang) as server:
        pools = quick_pool(server.url, limit=1, timeout_s=60), quick_pool(free_url())
        deadline = time.monotonic() + 60
        requests = [failure_of(pool.post("/x", {}, deadline=deadline)) for pool in pools for _ in range(3)]
        tasks = [asyncio.create_task(request) for request in requests]
        await until(lambda: server.now)
        for pool in pools:
            await pool.aclose()
        assert {error.cause for error in await asyncio.gather(*tasks)} == {"pool closed"}
        assert ups(pools[0]) == [True]
        server.answer = lambda *_: 1
        assert await pools[0].post("/x", {}) == 1  # a request after that opens it again
        await pools[0].aclose()


@in_a_loop
async def test_cancelled_requests_leave_nothing_behind():
    async with FakeServer(lambda *_: asyncio.sleep(0.2)) as server, quick_pool(server.url, limit=4) as pool:
        tasks = [asyncio.create_task(pool.post("/x", {})) for _ in range(12)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)
        assert pool.servers[0].in_flight == 0 and ups(pool) == [True]
        server.most = 0
        await asyncio.gather(*(pool.post("/x", {}) for _ in range(12)))
        assert server.most == 4


@in_a_loop
async def test_a_cancellation_at_the_moment_of_a_timeout_is_not_lost():
    async with FakeServer(hang) as server, quick_pool(server.url, timeout_s=0.05, retries=999) as pool:
        for early in range(40):
            task = asyncio.create_task(pool.post("/x", {}))
            await asyncio.sleep(0.045 + early * 0.0005)
            time.sleep(0.01)  # both are due when the loop comes round
            task.cancel()
            await asyncio.wait((task,), timeout=20)
            assert task.cancelled()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        *((url, "http://a:80") for url in ("http://a:80/v1", "http://a:80/v1/", "http://a:80/", "a:80", " a:80/v1 ")),
        ("https://host/openai/v1/", "https://host/openai"),
        ("[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_every_way_to_write_an_address_gives_the_same_one(url, expected):
    assert server_url(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        " http://",
        "ftp://a",
        "http://a:port",
        "http://a:99999",
        "http://a:0",
        "http://a b",
        "http://a?x=1",
        "http://user:secret@host:1",
    ],
)
def test_what_is_no_address_is_refused_and_credentials_are_not_repeated(url):
    with pytest.raises(ConfigError, match="URL must") as caught:
        server_url(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("urls", "change", "message"),
    [
        ([], {}, "one or more different"),
        (["a:1", "http://a:1/v1"], {}, "one or more different"),
        (["a:1"], {"api_key_env": "NO_SUCH_KEY"}, "embedrl.judge.api_key_env names NO_SUCH_KEY, which is not set"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(urls, change, message):
    section = SimpleNamespace(**{**QUICK, "retries": 3, "api_key_env": None, **change})
    with pytest.raises(ConfigError, match=message):
        ServerPool.from_config(section, urls, section="embedrl.judge", name="judge")


@pytest.mark.parametrize(
    ("key", "value"),
    [("limit", 0), ("timeout_s", 0), ("timeout_s", float("nan")), ("retries", -1), ("backoff_s", -1.0)],
)
def test_a_limit_that_cannot_work_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"{key} of a server pool must be .*; got {value}"):
        PoolSettings(**{"limit": 1, key: value})


def test_every_setting_reaches_the_pool_and_processes_share_the_limit():
    section = SimpleNamespace(limit=20, timeout_s=1.5, retries=2, backoff_s=0.25, api_key_env=None)
    pools = [ServerPool.from_config(section, ["a:1"], section="s", name="n", share=share) for share in (8, 64)]
    assert [pool.settings for pool in pools] == [PoolSettings(limit, 1.5, 2, 0.25) for limit in (2, 1)]
