# SPDX-License-Identifier: Apache-2.0
"""The checkpoint engine of the CPU platform brings every weight to every rollout worker, bit for bit."""

import asyncio
import threading

import pytest
import torch
from verl.checkpoint_engine import CheckpointEngineRegistry

from embedrl_verl.platforms import cpu_checkpoint_engine
from embedrl_verl.platforms.cpu_checkpoint_engine import GlooCheckpointEngine

BUCKET = 1000  # bytes; the tensors below need several, and one of them more than one


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setattr(cpu_checkpoint_engine.ray.util, "get_node_ip_address", lambda: "127.0.0.1")


def weights(seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "odd": normal(3).to(torch.bfloat16),  # the next tensor would start at byte 6
        "after": normal(5, 7),
        "large": normal(40, 13),
        "scalar": normal(1)[0],
        "whole": torch.arange(-2, 60),
        "full": normal(BUCKET // 4),  # exactly one bucket
        "last": normal(2, 2, 2).to(torch.float16),
    }


def in_threads(jobs):
    """Run all jobs at once and return their results, or raise the first error."""
    results: list = [None] * len(jobs)

    def run(index):
        try:
            results[index] = jobs[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def sync(actors, rollouts, sent):
    """One update as verl's CheckpointEngineManager does it: what each rollout engine received, and what the other actor
    ranks took out of their generators."""
    metadata = [engine.prepare() for engine in (*actors, *rollouts)]
    actor_kwargs, rollout_kwargs = GlooCheckpointEngine.build_topology(len(actors), len(rollouts), metadata)

    async def receive(engine):
        return {name: tensor.clone() async for name, tensor in engine.receive_weights(global_steps=1)}

    def job(engine, index, kwargs, is_actor):
        engine.init_process_group(**{name: values[index] for name, values in kwargs.items()})
        if not is_actor:
            return asyncio.run(receive(engine))
        generator = iter(sent.items())
        asyncio.run(engine.send_weights(generator, global_steps=1))
        return list(generator)

    jobs = [lambda e=e, i=i: job(e, i, actor_kwargs, True) for i, e in enumerate(actors)]
    jobs += [lambda e=e, i=i: job(e, i, rollout_kwargs, False) for i, e in enumerate(rollouts)]
    results = in_threads(jobs)
    for engine in (*actors, *rollouts):
        engine.finalize()
    return results[len(actors) :], results[: len(actors)]


def engines(count, *, master):
    return [GlooCheckpointEngine(BUCKET, is_master=master and i == 0, timeout_s=20) for i in range(count)]


def test_it_is_registered_under_its_name():
    assert CheckpointEngineRegistry.get("gloo") is GlooCheckpointEngine
    built = CheckpointEngineRegistry.new("gloo", is_master=True, bucket_size=1 << 20)
    assert built.prepare().port > 0


@pytest.mark.parametrize(("actors", "rollouts"), [(1, 1), (2, 3)])
def test_every_rollout_worker_gets_every_tensor(actors, rollouts):
    sent = weights(0)
    received, left = sync(engines(actors, master=True), engines(rollouts, master=False), sent)
    assert len(received) == rollouts
    for found in received:
        assert list(found) == list(sent)
        for name, tensor in sent.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert left == [[]] * actors, "every actor rank takes part in gathering every weight"


def test_the_next_update_may_have_more_servers():
    actors, rollouts = engines(1, master=True), engines(1, master=False)
    sync(actors, rollouts, weights(0))
    new = weights(1)
    received, _ = sync(actors, [*rollouts, *engines(1, master=False)], new)
    assert all(torch.equal(found[name], new[name]) for found in received for name in new)


def test_tensors_that_were_handed_on_stay_as_they_are():
    """The reader may keep a tensor while later buckets come in."""
    actors, rollouts, sent = engines(1, master=True), engines(1, master=False), weights(0)
    actor_kwargs, rollout_kwargs = GlooCheckpointEngine.build_topology(1, 1, [actors[0].prepare(), None])

    def send():
        actors[0].init_process_group(**{name: values[0] for name, values in actor_kwargs.items()})
        asyncio.run(actors[0].send_weights(iter(sent.items())))

    async def keep():
        return [pair async for pair in rollouts[0].receive_weights()]

    def receive():
        rollouts[0].init_process_group(**{name: values[0] for name, values in rollout_kwargs.items()})
        return asyncio.run(keep())

    kept = in_threads([send, receive])[1]
    assert all(torch.equal(tensor, sent[name]) for name, tensor in kept)


def test_a_peer_that_never_comes_is_an_error():
    sender = GlooCheckpointEngine(BUCKET, is_master=True, timeout_s=1)
    kwargs, _ = GlooCheckpointEngine.build_topology(1, 1, [sender.prepare(), None])
    with pytest.raises(RuntimeError):
        sender.init_process_group(**{name: values[0] for name, values in kwargs.items()})
