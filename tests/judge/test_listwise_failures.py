# SPDX-License-Identifier: Apache-2.0
"""Whatever a judge fails to say is unknown, by its cause, and never a miss."""

import asyncio
import dataclasses
import time
from functools import partial

import pytest
import torch
from aiohttp import web

from embedrl_verl.errors import EmbedRLError
from embedrl_verl.judge import JudgeSettings, ListwiseJudge
from tests.judge.batches import lines_of, make_batch
from tests.judge.fake_judge import chats, reading, run, says
from tests.serving.fakes import FakeServer, free_url, quick_pool


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
