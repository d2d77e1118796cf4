# SPDX-License-Identifier: Apache-2.0
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

from embedrl_verl.judge import JudgeSettings, ListwiseJudge
from tests.judge.batches import lines_of, make_batch
from tests.judge.fake_judge import chats, judged, reading, run, says
from tests.serving.fakes import FakeServer, free_url, quick_pool


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
        assert len(server.bodies) == 49  # /version too
        assert all(("top_k" in body) is vllm for body in chats(server))


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


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="48 rows; got 3"):
        run(says(reading), call={"instructions": ["a"] * 3})


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
