# SPDX-License-Identifier: Apache-2.0
import asyncio
import contextlib
import dataclasses
import math
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial

import pytest
import torch
from aiohttp import web

from embedrl_verl.errors import ConfigError, EmbedRLError, MediaError
from embedrl_verl.judge import JudgeSettings, ListwiseJudge
from embedrl_verl.judge.listwise import IMAGE_LOADS
from tests.judge.batches import lines_of, make_batch
from tests.serving.fakes import FakeServer, free_url, quick_pool


def reading(body):
    """The right number: the list has the judged answer on that line."""
    shown, judged = lines_of(body["messages"][0]["content"])
    return next(number for number, text in shown.items() if text == re.search(r"\d+", judged)[0])


def says(pick, *, vllm=False, chat=None):
    """A server whose judge answers `pick(body)`; with `chat`, that is asked for the response instead."""

    def answer(path, body):
        if path == "/v1/models":
            return {"data": [{"id": "served"}]}
        if path == "/version":
            return {"version": "0.24.0"} if vllm else web.Response(status=404)
        if chat is not None:
            return chat(body)
        return {"choices": [{"message": {"content": pick(body)}}]}

    return answer


def chats(server):
    return [body for body in server.bodies if body is not None]


async def judged(server, batch=None, pool=None, step=0, call=None, **settings):
    judge = ListwiseJudge(quick_pool(server.url, **(pool or {})), JudgeSettings(**{"style": "compact", **settings}))
    return await judge.judge(make_batch() if batch is None else batch, step=step, **(call or {}))


def run(answer, *arguments, **settings):
    """Judge with a server that answers so; also gives the server."""

    async def main():
        async with FakeServer(answer) as server:
            return await judged(server, *arguments, **settings), server

    return asyncio.run(main())


@pytest.mark.parametrize("vllm", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_a_judge_that_reads_hits_everywhere_and_one_that_avoids_nowhere(shared, vllm):
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    batch = make_batch(order=order)
    found, server = run(says(reading, vllm=vllm), batch, shared_lists=shared)
    assert found.scores.tolist() == [1.0] * 48 and found.scores.dtype == torch.float32
    assert all(pick in own for pick, own in zip(found.picks.tolist(), found.own_positions, strict=True))
    assert not found.causes and found.requests == 48 + 1 + 1 and len(chats(server)) == 48

    def wrong(body):
        return "2" if reading(body) == "1" else "1"

    found, _ = run(says(wrong), make_batch(rollouts=1), shared_lists=shared)
    assert found.scores.tolist() == [0.0] * 12


def test_scores_belong_to_their_rows_however_the_batch_is_ordered():
    def fickle(body):
        return "1" if "4" in lines_of(body["messages"][0]["content"])[1] else reading(body)

    base, _ = run(says(fickle), make_batch(pairs=9))
    order = torch.randperm(72, generator=torch.Generator().manual_seed(3))
    permuted, _ = run(says(fickle), make_batch(pairs=9, order=order))
    assert torch.equal(base.scores[order], permuted.scores) and 0 < base.scores.mean() < 1
    assert torch.equal(base.picks[order], permuted.picks)


def test_a_judge_that_always_says_one_hits_at_the_blind_rate():
    hits, blind, rows = 0, 0.0, 0
    batch = make_batch(pairs=40, rollouts=2)

    async def steps():
        nonlocal hits, blind, rows
        async with FakeServer(says(lambda body: "1")) as server:
            for step in range(10):
                found = await judged(server, batch, step=step, shared_lists=False)
                metrics = found.metrics()
                hits, rows = hits + int(found.scores.sum()), rows + len(batch)
                blind += metrics["judge/blind_rate/mean"] / 10
                assert metrics["judge/picked_at/1"] == 1.0 and metrics["judge/picked_at/2"] == 0.0
                assert metrics["judge/hit_at/1"] == metrics["judge/own_at/1"] == metrics["judge/hit_rate/mean"]
                assert metrics["judge/hit_above_blind"] == pytest.approx(metrics["judge/hit_rate/mean"] - 1 / 3)

    asyncio.run(steps())
    assert blind == pytest.approx(2 / 6) and rows == 1600
    assert abs(hits - rows * blind) < 2.576 * math.sqrt(rows * blind * (1 - blind))  # the 99% interval of a binomial


def test_the_request_is_what_the_settings_say():
    settings = {"extra_body": {"top_p": 0.5}, "max_tokens": 3, "temperature": 0.25, "style": "paper"}
    call = {"instructions": [f"Find it, {row // 4}." for row in range(48)]}
    _, server = run(says(lambda body: "1", vllm=True), call=call, **settings)
    asked = chats(server)
    assert {body["model"] for body in asked} == {"served"} and len(server.bodies) == 48 + 2
    assert {(body["top_p"], body["max_tokens"], body["temperature"]) for body in asked} == {(0.5, 3, 0.25)}
    assert all(body["structured_outputs"] == {"choice": [str(n) for n in range(1, 9)]} for body in asked)
    wishes = Counter(re.search(r"Find it, (\d+)\.", body["messages"][0]["content"])[1] for body in asked)
    assert wishes == {str(group): 4 for group in range(12)}


def test_decoding_is_constrained_for_vllm_only_and_only_if_wanted():
    for vllm, constrained in ((True, False), (False, True)):
        found, server = run(says(reading, vllm=vllm), constrained=constrained, model="mine")
        assert not any("structured_outputs" in body for body in chats(server))
        assert {body["model"] for body in chats(server)} == {"mine"} and found.scores.mean() == 1
        assert len(server.bodies) == 48 + constrained  # /version alone


def test_model_and_software_are_asked_for_once_under_successive_event_loops():
    judge, asked = None, []

    async def step(number, port):
        nonlocal judge
        async with FakeServer(says(reading, vllm=True), port=port) as server:
            if judge is None:
                judge = ListwiseJudge(quick_pool(server.url), JudgeSettings(style="compact"))
            found = await judge.judge(make_batch(), step=number)
            asked.append(len(server.bodies))
            assert found.scores.mean() == 1
            return server.port

    asyncio.run(step(1, asyncio.run(step(0, 0))))
    assert asked == [50, 48]


@pytest.mark.parametrize(
    ("chat", "cause"),
    [
        (lambda body: {"choices": [{"message": {"content": "no idea"}}]}, "names no listed number"),
        (lambda body: {"choices": [{"message": {"content": "99"}}]}, "names no listed number"),
        (lambda body: {"choices": [{"message": {"content": None}}]}, "names no listed number"),
        (lambda body: {"choices": []}, "malformed response"),
        (lambda body: [1], "malformed response"),
        (lambda body: web.Response(text="<html>"), "not JSON"),
        (lambda body: web.Response(status=500), "HTTP 500"),
        (lambda body: web.Response(status=422), "HTTP 422"),
        (lambda body: asyncio.sleep(30), "timeout"),
    ],
)
def test_garbage_errors_and_time_outs_are_unknown_by_cause_and_never_scored(chat, cause):
    pool = {"retries": 1, "timeout_s": 1 if cause == "timeout" else 20}
    found, _ = run(says(None, chat=chat), make_batch(pairs=3, rollouts=1), pool=pool, max_unknown_share=1.0)
    assert found.scores.isnan().all() and found.picks.tolist() == [0] * 6 and found.causes == {cause: 6}
    metrics = found.metrics()
    assert metrics["judge/unknown_rate"] == 1.0 and metrics[f"judge/unknown/{cause.replace(' ', '_')}"] == 6
    assert not any("hit" in name or "blind" in name for name in metrics)


def test_a_failure_that_passes_is_retried():
    failed = set()

    def chat(body):
        text = body["messages"][0]["content"]
        if text not in failed:
            failed.add(text)
            return web.Response(status=503)
        return {"choices": [{"message": {"content": reading(body)}}]}

    found, _ = run(says(None, chat=chat), make_batch(pairs=3, rollouts=1))
    assert found.scores.tolist() == [1.0] * 6 and found.retries == 6 and found.metrics()["judge/retries"] == 6


def test_some_unknown_rows_leave_the_others_alone():
    def pick(body):
        return "?" if "2" in lines_of(body["messages"][0]["content"])[1] else reading(body)

    found, _ = run(says(pick), max_unknown_share=0.2)
    unknown = make_batch().pair == 2
    assert torch.equal(found.scores.isnan(), unknown) and (found.scores[~unknown] == 1).all()
    metrics = found.metrics()
    assert metrics["judge/unknown_rate"] == pytest.approx(1 / 6) and metrics["judge/hit_rate/query"] == 1
    for name in ("picked_at", "own_at"):  # shares of the rows that were judged: 8 places, 4 of them own
        total = sum(value for key, value in metrics.items() if f"/{name}/" in key)
        assert total == pytest.approx(1 if name == "picked_at" else 4)
    with pytest.raises(EmbedRLError, match=r"8 of 48 rows unknown.*max_unknown_share=0.1.*8 x names no listed number"):
        run(says(pick), max_unknown_share=0.1)


def test_a_dead_judge_stops_the_step_with_its_cause():
    pool = quick_pool(free_url())
    start = time.monotonic()
    with pytest.raises(EmbedRLError, match="48 x no server is up"):
        asyncio.run(ListwiseJudge(pool, JudgeSettings(deadline_s=2)).judge(make_batch(), step=0))
    assert time.monotonic() - start < 25


def test_the_deadline_ends_the_stage():
    async def slow(body):
        await asyncio.sleep(30 if "2" in lines_of(body["messages"][0]["content"])[1] else 0)
        return {"choices": [{"message": {"content": reading(body)}}]}

    start = time.monotonic()
    found, _ = run(says(None, chat=slow), deadline_s=8)
    assert found.causes == {"deadline": 8} and time.monotonic() - start < 25


def test_rows_without_a_list_are_no_failures():
    content = torch.zeros(6, dtype=torch.int64).repeat_interleave(4).repeat(2)
    valid = torch.ones(48, dtype=torch.bool)
    valid[:5] = False
    found, _ = run(says(reading), make_batch(valid=valid), max_unknown_share=0.0)
    # Rows of the first pair lost all their partners or their own embedding, one row of the second its embedding.
    assert found.metrics()["judge/rows_without_list"] == 9 and not found.causes
    assert found.scores.isnan().sum() == 9 and found.own_positions[0] == ()
    with pytest.raises(EmbedRLError, match="39 of 39 rows unknown"):  # a share of the rows that have a list
        run(says(lambda body: "?"), make_batch(valid=valid), max_unknown_share=0.9)
    found, server = run(says(reading), make_batch(content=content), max_unknown_share=0.0)
    assert found.metrics()["judge/rows_without_list"] == 48 and not server.bodies


def test_a_refused_constraint_names_its_switch_and_a_refused_request_does_not():
    def picky(body):
        if "structured_outputs" in body:
            return web.json_response({"error": {"message": "no grammar backend"}}, status=400)
        return {"choices": [{"message": {"content": "1"}}]}

    with pytest.raises(EmbedRLError, match=r"embedrl.judge.constrained=False.*no grammar backend"):
        run(says(None, vllm=True, chat=picky))
    found, _ = run(says(None, vllm=True, chat=lambda body: web.Response(status=400)), max_unknown_share=1.0)
    assert found.causes == {"HTTP 400": 48}


def test_a_server_without_models_is_refused():
    with pytest.raises(EmbedRLError, match=r"embedrl.judge.model"):
        run(lambda path, body: {"data": []})


@pytest.mark.parametrize("wanted", [True, False])
def test_images_are_asked_for_once_a_list_and_outside_of_the_loop(wanted):
    asked, threads = [], set()

    def images(row):
        asked.append(row)
        threads.add(threading.current_thread())
        return [f"data:image/png;base64,{row:04d}"] if row % 2 == 0 else None

    found, server = run(says(lambda body: "1"), images=wanted, call={"images": images})
    if not wanted:
        assert not asked
        return
    assert sorted(asked) == sorted(x.rows[0] for x in found.lists) and threading.main_thread() not in threads
    shown = Counter(
        body["messages"][0]["content"][0]["image_url"]["url"]
        for body in chats(server)
        if isinstance(body["messages"][0]["content"], list)
    )
    assert shown == {f"data:image/png;base64,{x.rows[0]:04d}": 4 for x in found.lists}


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="48 rows; got 3"):
        run(says(reading), call={"instructions": ["a"] * 3})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hard_pairs", 0),
        ("style", "long"),
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("deadline_s", 0.0),
        ("max_unknown_share", 1.5),
        ("extra_body", {"messages": []}),
        ("model", ""),
    ],
)
def test_settings_that_cannot_work_are_refused_by_key(key, value):
    with pytest.raises(ConfigError, match=f"embedrl.judge.{key}"):
        JudgeSettings(**{key: value})


@contextlib.contextmanager
def patient_server(together):
    """A judge in a thread of its own that always says 1, but nothing to anybody until `together` ask at once."""

    until = time.monotonic() + 60

    async def chat(body):
        while ready[0].most < together and time.monotonic() < until:
            await asyncio.sleep(0.01)
        return {"choices": [{"message": {"content": "1"}}]}

    async def serve():
        async with FakeServer(says(None, chat=chat)) as server:
            ready.append(server)
            await asyncio.to_thread(stop.wait)

    ready, stop = [], threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    while not ready:
        time.sleep(0.01)
    try:
        yield ready[0]
    finally:
        stop.set()
        thread.join()


def test_512_rollouts_run_at_the_limit_and_no_request_blocks_the_event_loop():
    batch = make_batch(pairs=32, rollouts=8)

    with patient_server(64) as server:
        found = asyncio.run(judged(server, batch, style="paper", pool={"limit": 64, "timeout_s": 120}))
    # A call that blocks the event loop would wait for the other 63 in vain. Times: benchmarks/bench_judge.py.
    assert server.most == 64 and found.requests == 514 and not found.causes


def test_judge_and_pool_import_no_trainer_and_no_model_library():
    code = (
        "import sys, embedrl_verl.judge, embedrl_verl.serving\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules} & {'verl', 'ray', 'transformers', 'vllm'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(("text", "score"), [("Candidate 1 shows a dog, and", None), ("1", None), ("3", 3)])
def test_an_answer_that_was_cut_off_is_unknown_unless_it_is_a_whole_number(text, score):
    def chat(body):
        return {"choices": [{"message": {"content": text}, "finish_reason": "length"}]}

    batch = make_batch(pairs=6, rollouts=8)  # 12 candidates: a 1 may be a 12
    judgement, _ = run(says(None, chat=chat), batch, max_unknown_share=1.0)
    assert set(judgement.picks.tolist()) == {score or 0}
    assert dict(judgement.causes) == ({} if score else {"answer cut off": len(batch)})


def test_a_judge_that_stops_the_run_passes_on_what_its_server_said():
    def chat(body):
        return web.json_response({"error": {"message": "The model `typo` does not exist."}}, status=404)

    with pytest.raises(EmbedRLError, match=r"x HTTP 404\. .*The first failure: .*The model `typo` does not exist"):
        run(says(None, chat=chat))

    def no_models(path, body):
        return web.Response(status=404)

    with pytest.raises(EmbedRLError, match="needs embedrl.judge.model"):
        run(no_models)
    with pytest.raises(EmbedRLError, match="embedrl.judge.api_key_env"):
        run(says(None, chat=lambda body: web.Response(status=401)))


def test_a_passing_failure_of_the_version_route_does_not_end_constrained_decoding():
    broken = [True]

    def answer(path, body):
        if path == "/version" and broken[0]:
            return web.Response(status=503)
        return says(reading, vllm=True)(path, body)

    async def main():
        async with FakeServer(answer) as server:
            judge = ListwiseJudge(quick_pool(server.url), JudgeSettings(style="compact"))
            await judge.judge(make_batch(), step=0)
            free = len(chats(server))
            broken[0] = False
            await judge.judge(make_batch(), step=1)
            return free, chats(server)

    free, bodies = asyncio.run(main())
    assert free and not any("structured_outputs" in body for body in bodies[:free])
    assert len(bodies) > free and all("structured_outputs" in body for body in bodies[free:])


def test_the_rollouts_of_a_list_meet_one_server_whose_prefix_cache_holds_it():
    def head(body):
        return body["messages"][0]["content"].rsplit("\n", 1)[0]

    async def main(live):
        async with contextlib.AsyncExitStack() as stack:
            servers = [await stack.enter_async_context(FakeServer(says(reading))) for _ in range(4)]
            urls = [server.url for server in servers[:live]] + [free_url() for _ in servers[live:]]
            judge = ListwiseJudge(quick_pool(*urls, limit=32), JudgeSettings(style="compact"))
            judgement = await judge.judge(make_batch(pairs=8, rollouts=8), step=0)
            return judgement, [[head(body) for body in chats(server)] for server in servers]

    judgement, heads = asyncio.run(main(4))
    all_heads = set().union(*heads)
    assert not judgement.causes and len(all_heads) == 16
    for listed in all_heads:
        assert sum(listed in seen for seen in heads) == 1
    assert {len(seen) for seen in heads} == {32}
    judgement, heads = asyncio.run(main(3))
    assert not judgement.causes and sum(map(len, heads)) == 128


async def impatient(pool, get, path, **options):
    """Only /version is given up after a second: on a busy machine 48 answers may take longer."""
    usual = pool.settings
    if path == "/version":
        pool.settings = dataclasses.replace(usual, timeout_s=1)
    try:
        return await get(path, **options)
    finally:
        pool.settings = usual


def _after_two_steps(version, **pool):
    async def answer(path, body):
        if path != "/version":
            return says(reading)(path, body)
        seen.append(path)
        return await version()

    async def main():
        async with FakeServer(answer) as server:
            judge = ListwiseJudge(quick_pool(server.url, **pool), JudgeSettings(style="compact"))
            judge.pool.get = partial(impatient, judge.pool, judge.pool.get)
            return [await judge.judge(make_batch(), step=step) for step in (0, 1)]

    seen = []
    return asyncio.run(main()), len(seen)


def test_a_version_route_that_hangs_leaves_no_row_unknown_and_is_asked_again():
    found, asked = _after_two_steps(lambda: asyncio.sleep(30), timeout_s=60, retries=0)
    assert not any(judgement.causes for judgement in found) and asked == 2


def test_a_version_route_that_gives_a_page_is_no_vllm_and_is_not_asked_again():
    async def page():
        return web.Response(text="<html>hello</html>")

    found, asked = _after_two_steps(page, retries=0)
    assert not any(judgement.causes for judgement in found) and asked == 1


def test_what_a_server_said_is_logged_once_a_run(caplog):
    async def main():
        async with FakeServer(says(None, chat=lambda body: web.Response(status=404))) as server:
            judge = ListwiseJudge(quick_pool(server.url), JudgeSettings(style="compact", max_unknown_share=1.0))
            for step in (0, 1):
                assert (await judge.judge(make_batch(), step=step)).causes["HTTP 404"] == 48

    asyncio.run(main())
    assert sum("rows are unknown" in record.getMessage() for record in caplog.records) == 1


def test_images_of_some_lists_are_loaded_at_the_same_time():
    now, most, lock = [0], [0], threading.Lock()

    def images(row):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        until = time.monotonic() + 20
        while most[0] < IMAGE_LOADS and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return ["data:image/png;base64,AA"]

    run(says(lambda body: "1"), images=True, call={"images": images})
    assert most[0] == IMAGE_LOADS


def test_an_unreadable_image_makes_its_list_unknown_and_no_other():
    def images(row):
        if row == 0:
            raise MediaError("a.png must be an image; got 3 bytes. Replace the file")
        return None

    found, _ = run(says(reading), images=True, call={"images": images}, max_unknown_share=0.5)
    (unknown,) = [listed for listed in found.lists if listed.rows[0] == 0]
    assert dict(found.causes) == {"image unreadable": len(unknown.rows)}
    assert {row for row in range(48) if math.isnan(found.scores[row])} == set(unknown.rows)
    with pytest.raises(EmbedRLError, match=r"4 x image unreadable.*The first failure: a\.png must be"):
        run(says(reading), images=True, call={"images": images}, max_unknown_share=0.0)
