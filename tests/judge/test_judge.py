# SPDX-License-Identifier: Apache-2.0
"""A judge's pick is 1 or 0 of its row; whatever it fails to say is unknown, by its cause, and never a miss."""

import asyncio
import contextlib
import math
import re
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
import torch
from aiohttp import web

from embedrl_verl.errors import EmbedRLError, MediaError
from embedrl_verl.judge import parse_choice
from embedrl_verl.judge.judge import AT_ONCE, is_whole_choice
from tests.judge.fakes import chats, judge_at, judged_line, make_batch, reading, reply, run, says
from tests.serving.fakes import FakeServer, free_url


def heads(server):
    """Of each request what stands before the judged text."""
    return [body["messages"][0]["content"].rsplit("\n", 1)[0] for body in chats(server)]


@pytest.mark.parametrize("vllm", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_a_judge_that_reads_hits_everywhere_and_one_that_avoids_nowhere(shared, vllm):
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    found, server = run(says(reading, vllm=vllm), make_batch(order=order), shared_lists=shared)
    assert found.scores.tolist() == [1.0] * 48 and found.scores.dtype == torch.float32
    assert all(listed.own[found.picks[row] - 1] for listed in found.lists for row in listed.rows)
    assert not found.causes and found.requests == 48 + 1 + (not vllm) and len(chats(server)) == 48

    def wrong(body):
        return "2" if reading(body) == "1" else "1"

    found, _ = run(says(wrong), make_batch(rollouts=1), shared_lists=shared)
    assert found.scores.tolist() == [0.0] * 12


def test_scores_belong_to_their_rows_however_the_batch_is_ordered():
    def fickle(body):
        return "1" if "4" in judged_line(body) else reading(body)

    base, _ = run(says(fickle), make_batch(pairs=9))
    order = torch.randperm(72, generator=torch.Generator().manual_seed(3))
    permuted, _ = run(says(fickle), make_batch(pairs=9, order=order))
    assert torch.equal(base.scores[order], permuted.scores) and 0 < base.scores.mean() < 1
    assert torch.equal(base.picks[order], permuted.picks)


def test_a_judge_that_always_says_one_hits_at_the_blind_rate():
    hits, batch = 0, make_batch(pairs=40, rollouts=2)
    for step in range(5):
        found, _ = run(says(lambda body: "1"), batch, step=step, shared_lists=False)
        metrics = found.metrics()
        hits += int(found.scores.sum())
        assert metrics["judge/picked_at/1"] == 1.0 and metrics["judge/picked_at/2"] == 0.0
        assert metrics["judge/hit_at/1"] == metrics["judge/own_at/1"] == metrics["judge/hit_rate/mean"]
        assert metrics["judge/blind_rate/mean"] == pytest.approx(2 / 6)
        assert metrics["judge/hit_above_blind"] == pytest.approx(metrics["judge/hit_rate/mean"] - 1 / 3)
    assert abs(hits - 800 / 3) < 2.576 * math.sqrt(800 * 2 / 9)  # the 99% interval of a binomial


@pytest.mark.parametrize(("server", "vllm"), [({"vllm": True}, True), ({"gateway": True}, True), ({}, False)])
def test_the_request_is_what_the_settings_say_and_constrained_for_vllm_only(server, vllm):
    settings = {"extra_body": {"top_p": 0.5}, "max_tokens": 3, "temperature": 0.25, "style": "paper"}
    instructions = [f"Find it, {row // 4}." for row in range(48)]
    _, found = run(says(lambda body: "1", **server), instructions=instructions, steps=2, **settings)
    asked = chats(found)
    assert len(found.bodies) == 2 * 48 + 1 + ("vllm" not in server)  # what it is is asked for once
    assert {body["model"] for body in asked} == {"served"}
    assert {(body["top_p"], body["max_tokens"], body["temperature"]) for body in asked} == {(0.5, 3, 0.25)}
    choices = {"choice": [str(n) for n in range(1, 9)]} if vllm else None
    assert all(body.get("structured_outputs") == choices and ("top_k" in body) is vllm for body in asked)
    wishes = Counter(re.search(r"Find it, (\d+)\.", body["messages"][0]["content"])[1] for body in asked)
    assert wishes == {str(group): 2 * 4 for group in range(12)}
    _, server = run(says(reading, vllm=vllm), constrained=False, model="mine")
    assert not any("structured_outputs" in body for body in chats(server))
    assert {body["model"] for body in chats(server)} == {"mine"}


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="48 rows; got 3"):
        run(says(reading), instructions=["a"] * 3)


def test_judge_and_pool_import_no_trainer_and_no_model_library():
    code = (
        "import sys, embedrl_verl.judge, embedrl_verl.serving\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules} & {'verl', 'ray', 'transformers', 'vllm'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_rollouts_of_a_list_meet_one_server_whose_prefix_cache_holds_it():
    async def main(live):
        async with contextlib.AsyncExitStack() as stack:
            servers = [await stack.enter_async_context(FakeServer(says(reading))) for _ in range(4)]
            urls = [server.url for server in servers[:live]] + [free_url() for _ in servers[live:]]
            found = await judge_at(*urls, pool={"limit": 32}).judge(make_batch(pairs=8, rollouts=8), step=0)
            assert not found.causes
            return [heads(server) for server in servers]

    seen = asyncio.run(main(4))
    every = set().union(*seen)
    assert len(every) == 16 and all(sum(listed in one for one in seen) == 1 for listed in every)
    assert {len(one) for one in seen} == {32}
    assert sum(map(len, asyncio.run(main(3)))) == 128


@pytest.mark.parametrize(
    ("chat", "cause"),
    [
        (lambda body: reply("no idea"), "names no listed number"),
        (lambda body: reply("99"), "names no listed number"),
        (lambda body: reply(None), "names no listed number"),
        (lambda body: {"choices": []}, "malformed response"),
        (lambda body: [1], "malformed response"),
        (lambda body: web.Response(text="<html>"), "not JSON"),
        (lambda body: web.Response(status=500), "HTTP 500"),
        (lambda body: web.Response(status=422), "HTTP 422"),
        (lambda body: asyncio.sleep(30), "timeout"),
    ],
)
def test_garbage_errors_and_time_outs_are_unknown_by_cause_and_never_scored(chat, cause, caplog):
    pool = {"retries": 1, "timeout_s": 1 if cause == "timeout" else 20}
    batch = make_batch(pairs=3, rollouts=1)
    steps = 2 if "HTTP" in cause else 1
    found, _ = run(says(chat=chat), batch, pool=pool, max_unknown_share=1.0, steps=steps)
    assert found.scores.isnan().all() and found.picks.tolist() == [0] * 6 and found.causes == {cause: 6}
    metrics = found.metrics()
    assert metrics["judge/unknown_rate"] == 1.0 and metrics[f"judge/unknown/{cause.replace(' ', '_')}"] == 6
    assert not any("hit" in name or "blind" in name for name in metrics)
    said = sum("rows are unknown" in record.getMessage() for record in caplog.records)
    assert said == (1 if "HTTP" in cause else said), "what a server said is logged once a run"


def test_a_failure_that_passes_is_retried():
    failed = set()

    def chat(body):
        text = body["messages"][0]["content"]
        if text not in failed:
            failed.add(text)
            return web.Response(status=503)
        return reply(reading(body))

    found, _ = run(says(chat=chat), make_batch(pairs=3, rollouts=1))
    assert found.scores.tolist() == [1.0] * 6 and found.retries == 6 and found.metrics()["judge/retries"] == 6


def test_some_unknown_rows_leave_the_others_alone():
    def pick(body):
        return "?" if "2" in judged_line(body) else reading(body)

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


def test_the_deadline_ends_the_stage_and_a_dead_judge_stops_it_with_its_cause():
    async def slow(body):
        await asyncio.sleep(30 if "2" in judged_line(body) else 0)
        return reply(reading(body))

    start = time.monotonic()
    found, _ = run(says(chat=slow), deadline_s=8)
    assert found.causes == {"deadline": 8} and time.monotonic() - start < 25
    start = time.monotonic()
    with pytest.raises(EmbedRLError, match="48 x no server is up"):
        asyncio.run(judge_at(free_url(), deadline_s=2).judge(make_batch(), step=0))
    assert time.monotonic() - start < 25


def test_rows_without_a_list_are_no_failures():
    content = torch.zeros(6, dtype=torch.int64).repeat_interleave(4).repeat(2)
    valid = torch.ones(48, dtype=torch.bool)
    valid[:5] = False
    found, _ = run(says(reading), make_batch(valid=valid), max_unknown_share=0.0)
    # Rows of the first pair lost all their partners or their own embedding, one row of the second its embedding.
    assert found.metrics()["judge/rows_without_list"] == 9 and not found.causes
    assert found.scores.isnan().sum() == 9
    with pytest.raises(EmbedRLError, match="39 of 39 rows unknown"):  # a share of the rows that have a list
        run(says(lambda body: "?"), make_batch(valid=valid), max_unknown_share=0.9)
    found, server = run(says(reading), make_batch(content=content), max_unknown_share=0.0)
    assert found.metrics()["judge/rows_without_list"] == 48 and not server.bodies


def test_a_refused_constraint_names_its_switch_and_a_refused_request_does_not():
    def picky(body):
        if "structured_outputs" in body:
            return web.json_response({"error": {"message": "no grammar backend"}}, status=400)
        return reply("1")

    with pytest.raises(EmbedRLError, match=r"embedrl.judge.constrained=False.*no grammar backend"):
        run(says(vllm=True, chat=picky))
    found, _ = run(says(vllm=True, chat=lambda body: web.Response(status=400)), max_unknown_share=1.0)
    assert found.causes == {"HTTP 400": 48}


def refused(status, message=""):
    return lambda *_: web.json_response({"error": {"message": message}}, status=status)


@pytest.mark.parametrize(
    ("answer", "settings", "message"),
    [
        (lambda *_: {"data": []}, {}, "embedrl.judge.model"),
        (refused(404), {}, r"48 x HTTP 404.*needs embedrl.judge.model"),
        (refused(503), {"model": "mine"}, "48 x HTTP 503"),
        (says(chat=refused(404, "no `typo`")), {}, r"48 x HTTP 404\. .*The first failure: .*no `typo`"),
        (says(chat=refused(401)), {}, "embedrl.judge.api_key_env"),
    ],
)
def test_a_judge_that_stops_the_run_passes_on_what_its_server_said_and_what_may_fix_it(answer, settings, message):
    with pytest.raises(EmbedRLError, match=message):
        run(answer, pool={"retries": 0}, **settings)


def test_a_server_that_lists_no_models_is_asked_for_the_named_one():
    def answer(path, body):
        return web.Response(status=404) if path in ("/v1/models", "/version") else reply(reading(body))

    found, server = run(answer, model="mine", steps=2)
    assert found.scores.mean() == 1 and len(chats(server)) == 2 * 48


@pytest.mark.parametrize(("text", "score"), [("Candidate 1 shows a dog, and", None), ("1", None), ("3", 3)])
def test_an_answer_that_was_cut_off_is_unknown_unless_it_is_a_whole_number(text, score):
    batch = make_batch(pairs=6, rollouts=8)  # 12 candidates: a 1 may be a 12
    found, _ = run(says(chat=lambda body: reply(text, finish_reason="length")), batch, max_unknown_share=1.0)
    assert set(found.picks.tolist()) == {score or 0}
    assert dict(found.causes) == ({} if score else {"answer cut off": len(batch)})


@pytest.mark.parametrize("wanted", [True, False])
def test_images_are_asked_for_once_a_list_some_at_a_time_and_outside_of_the_loop(wanted):
    asked, threads, now, most, lock = [], set(), 0, 0, threading.Lock()

    def images(row):
        nonlocal now, most
        asked.append(row)
        threads.add(threading.current_thread())
        with lock:
            now += 1
            most = max(most, now)
        until = time.monotonic() + 20
        while most < AT_ONCE and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.02)
        with lock:
            now -= 1
        return [f"data:image/png;base64,{row:04d}"] if row % 2 == 0 else None

    found, server = run(says(lambda body: "1"), show=images, images=wanted)
    if not wanted:
        assert not asked
        return
    assert most == AT_ONCE and threading.main_thread() not in threads
    assert sorted(asked) == sorted(x.rows[0] for x in found.lists)
    contents = [body["messages"][0]["content"] for body in chats(server)]
    shown = Counter(content[0]["image_url"]["url"] for content in contents if isinstance(content, list))
    assert shown == {f"data:image/png;base64,{x.rows[0]:04d}": 4 for x in found.lists}


def test_an_unreadable_image_makes_its_list_unknown_and_no_other():
    def images(row):
        if row == 0:
            raise MediaError("a.png must be an image; got 3 bytes. Replace the file")
        return None

    found, _ = run(says(reading), show=images, images=True, max_unknown_share=0.5)
    (unknown,) = [listed for listed in found.lists if listed.rows[0] == 0]
    assert dict(found.causes) == {"image unreadable": len(unknown.rows)}
    assert {row for row in range(48) if math.isnan(found.scores[row])} == set(unknown.rows)
    with pytest.raises(EmbedRLError, match=r"4 x image unreadable.*The first failure: a\.png must be"):
        run(says(reading), show=images, images=True, max_unknown_share=0.0)


ONE = """3| 3 |3.|(3)|[3]|**3**|#3|Candidate 3|Answer: 3|answer:3|The answer is 3.|03|3 - the same number
I pick 3, and I mean 3|<candidate>3</candidate>|3, because it fits|\t3\t"""
NONE = """| |three|0|6|-3|3.5|1, 2|1,2|1 or 2|1-3|12|1 2|33|3 of 6|3 of 1999|none|³|３|3/4|1..2"""


def test_one_listed_number_is_a_choice_and_anything_else_is_none():
    for text in re.split(r"[|\n]", ONE):
        assert parse_choice(text, 5) == 3, text
    for text in [*NONE.split("|"), "9" * 5000, "3" + "0" * 5000]:
        assert parse_choice(text, 5) is None, text
    assert [parse_choice(str(number), 12) for number in range(14)] == [None, *range(1, 13), None]
    start = time.perf_counter()
    for text in ("1," * 100_000, "-" * 200_000, "1.1" * 60_000, "answer " * 30_000):
        assert parse_choice(text, 5) in (None, 1)
    assert time.perf_counter() - start < 5, "long garbage is read in linear time"


def test_a_text_that_was_cut_off_is_a_choice_only_if_no_longer_number_begins_with_it():
    assert is_whole_choice(" 3", 12) and is_whole_choice("12", 12) and is_whole_choice("1", 9)
    assert not any(is_whole_choice(text, 12) for text in ("1", "", "Candidate 3", "13", "3 z", "0"))
