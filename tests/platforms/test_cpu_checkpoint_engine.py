# SPDX-License-Identifier: Apache-2.0
"""The checkpoint engine of the CPU platform brings every weight to every rollout worker, bit for bit."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from verl.checkpoint_engine import CheckpointEngineRegistry

from embedrl_verl.platforms import cpu_checkpoint_engine
from embedrl_verl.platforms.cpu_checkpoint_engine import GlooCheckpointEngine

BUCKET = 1000  # bytes; one of the tensors below needs several


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setattr(cpu_checkpoint_engine.ray.util, "get_node_ip_address", lambda: "127.0.0.1")


def weights(seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "odd": normal(3).to(torch.bfloat16),  # 6 bytes
        "after": normal(5, 7),
        "large": normal(40, 13),
        "scalar": normal(1)[0],
        "whole": torch.arange(-2, 60),
        "full": normal(BUCKET // 4),  # exactly one bucket
        "last": normal(2, 2, 2).to(torch.float16),
    }


def engines(count, *, master):
    return [GlooCheckpointEngine(BUCKET, is_master=master and i == 0, timeout_s=20) for i in range(count)]


def sync(actors, rollouts, sent):
    """One update as verl's CheckpointEngineManager does it: what each rollout engine received (kept while later tensors
    come in), and what the other actor ranks left in their generators."""
    metadata = [engine.prepare() for engine in (*actors, *rollouts)]
    of_actors, of_rollouts = GlooCheckpointEngine.build_topology(len(actors), len(rollouts), metadata)

    async def receive(engine):
        return {name: tensor async for name, tensor in engine.receive_weights(global_steps=1)}

    def send(engine):
        generator = iter(sent.items())
        asyncio.run(engine.send_weights(generator, global_steps=1))
        return list(generator)

    def job(engine, index, kwargs, is_actor):
        engine.init_process_group(**{name: values[index] for name, values in kwargs.items()})
        return send(engine) if is_actor else asyncio.run(receive(engine))

    with ThreadPoolExecutor(len(actors) + len(rollouts)) as pool:
        left = [pool.submit(job, engine, i, of_actors, True) for i, engine in enumerate(actors)]
        received = [pool.submit(job, engine, i, of_rollouts, False) for i, engine in enumerate(rollouts)]
    for engine in (*actors, *rollouts):
        engine.finalize()
    return [one.result() for one in received], [one.result() for one in left]


def test_it_is_registered_under_its_name():
    assert CheckpointEngineRegistry.get("gloo") is GlooCheckpointEngine
    built = CheckpointEngineRegistry.new("gloo", is_master=True, bucket_size=1 << 20)
    assert built.prepare()[1] > 0


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


def test_a_peer_that_never_comes_is_an_error():
    sender = GlooCheckpointEngine(BUCKET, is_master=True, timeout_s=1)
    kwargs, _ = GlooCheckpointEngine.build_topology(1, 1, [sender.prepare(), None])
    with pytest.raises(RuntimeError):
        sender.init_process_group(**{name: values[0] for name, values in kwargs.items()})
