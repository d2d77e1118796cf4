# SPDX-License-Identifier: Apache-2.0
"""The asynchronous replay buffer: whole groups of one source, oldest first, and it never waits for nothing."""

import itertools
import random

import pytest
import verl.trainer.ppo.v1.replay_buffer as verls

from embedrl_verl.errors import ConfigError, EmbedderError
from embedrl_verl.trainer import replay_buffer
from embedrl_verl.trainer.replay_buffer import PairReplayBuffer, tag_prompts
from tests.trainer.fake_queue import FakeQueue

G = 2  # rollouts of a prompt


class World:
    """Trainer and agent loops around a buffer: submits pairs from a stream of (source, pair), ends them on demand."""

    def __init__(self, monkeypatch, stream=(), *, threshold=None, strategy="drop", together=1):
        self.queue, self.step, self.stream, self.size = FakeQueue(), 1, iter(stream), 2 * together
        self.numbers, self.refills, self.polls, self.at_poll = itertools.count(), [], 0, lambda: None
        for module in (verls, replay_buffer):
            monkeypatch.setattr(module, "tq", self.queue)
        monkeypatch.setattr(verls.time, "sleep", self.poll)
        self.buffer = replay_buffer.replay_buffer(
            "colocate_async",
            trainer_config={},
            max_off_policy_threshold=threshold,
            max_off_policy_strategy=strategy,
            sampler_kwargs={"poll_interval": 0.5},
            refill_fn=self.refill,
        )

    def poll(self, seconds):
        self.polls += 1
        assert self.polls < 5000, "the buffer waits for ever"
        self.at_poll()

    def refill(self, prompts):
        assert prompts > 0 and prompts % self.size == 0, "a refill of whole groups"
        self.refills.append(prompts)
        for _ in range(prompts // self.size):
            self.submit(*[next(self.stream) for _ in range(self.size // 2)])

    def submit(self, *pairs):
        """One group of (source, pair id); returns its uids, query and target of each pair."""
        uids = [f"u{next(self.numbers)}" for _ in range(2 * len(pairs))]
        ids, sources = [pair for _, pair in pairs for _ in "qt"], [source for source, _ in pairs for _ in "qt"]
        for uid, tag in zip(
            uids, tag_prompts(uids, ids, ["query", "target"] * len(pairs), sources, len(uids)), strict=True
        ):
            self.queue.put("train", uid, is_prompt=True, status="pending", global_steps=self.step, **tag.as_tags())
        return uids

    def end(self, *uids, status="finished"):
        for uid in uids:
            for session in range(G):
                self.queue.put("embed", f"{uid}_{session}_0")
                self.queue.put("train", f"{uid}_{session}_0", status="success", global_steps=self.step)
            self.queue.put("train", uid, status=status)

    def running(self):
        return [
            key for key, tag in self.queue.partitions["train"].items() if tag.get("status") in ("pending", "running")
        ]

    def sample(self, prompts):
        """Uids of a sampled batch; its rows leave the queue as after a step."""
        batch, metrics = self.buffer.sample(global_steps=self.step, partition_id="train", batch_size=prompts)
        self.queue.kv_clear(batch.keys, "train")
        self.queue.kv_clear(batch.keys, "embed")
        self.metrics = metrics
        return {key.split("_")[0] for key in batch.keys}


def test_an_incomplete_pair_waits_for_its_partner(monkeypatch):
    world = World(monkeypatch)
    (q0, t0), (q1, t1) = world.submit(("a", "0")), world.submit(("a", "1"))
    world.end(q0, q1, t1)
    assert world.buffer.get_sampleable_count(1, "train") == 2
    assert world.sample(2) == {q1, t1}, "the pair that is whole, though the other one's query is older"
    world.at_poll = lambda: world.end(t0)
    assert world.sample(2) == {q0, t0} and world.polls == 1


def test_the_oldest_groups_of_the_source_with_the_oldest_one_come_first(monkeypatch):
    world = World(monkeypatch)
    b0, a0 = world.submit(("b", "0")), world.submit(("a", "1"))
    world.step = 2
    a1, b1, a2 = world.submit(("a", "2")), world.submit(("b", "3")), world.submit(("a", "4"))
    for pair in (a2, a1, a0, b0):
        world.end(*pair)
    world.queue.put("train", a0[1], global_steps=3)  # generated anew after a resume; the pair is as old as its query
    assert world.sample(4) == {*a0, *a1}, "b's is older, but alone"
    world.end(*b1)
    assert world.sample(4) == {*b0, *b1}
    assert world.queue.partitions["embed"].keys() == {f"{uid}_{g}_0" for uid in a2 for g in range(G)}


def test_a_batch_never_holds_the_same_pair_twice(monkeypatch):
    world = World(monkeypatch)
    first, again = world.submit(("a", "0")), world.submit(("a", "0"))
    world.end(*first, *again)
    other = world.submit(("a", "1"))
    world.at_poll = lambda: world.end(*other)
    assert world.sample(4) == {*first, *other}
    assert world.buffer.get_sampleable_count(1, "train") == 2


def test_a_failed_side_costs_the_whole_pair_once_its_partner_has_ended(monkeypatch):
    """While the partner runs its rows may still come in, so the pair stays; then both are gone, and one pair is asked
    for instead."""
    world = World(monkeypatch, [("a", "2")])
    (q0, t0), one = world.submit(("a", "0")), world.submit(("a", "1"))
    world.end(q0, status="failure")
    world.end(*one)
    assert world.sample(2) == {*one}
    assert world.refills == [] and q0 in world.queue.partitions["train"]
    steps = iter([lambda: world.end(t0), lambda: world.end(*world.running())])
    world.at_poll = lambda: next(steps)()
    assert world.sample(2) == {"u4", "u5"}
    assert world.refills == [2] and world.metrics["training/rollout_failure/evicted_samples"] == 2
    assert not world.queue.partitions["train"] and not world.queue.partitions["embed"]


def test_stale_pairs_are_dropped_whole_and_replaced(monkeypatch):
    world = World(monkeypatch, [("a", "9")], threshold=2)
    old = world.submit(("a", "0"))
    world.end(*old)
    world.step = 3
    world.at_poll = lambda: world.end(*world.running())
    assert world.sample(2) == {"u2", "u3"}
    assert world.refills == [2] and world.metrics["training/off_policy/evicted_samples"] == 2
    assert world.metrics["training/off_policy/evicted_samples_staleness/max"] == 3


def test_one_stale_side_is_enough(monkeypatch):
    """After a resume a finished query keeps its step, while its target is generated anew."""
    world = World(monkeypatch, [("a", "9")], threshold=2)
    q0, t0 = world.submit(("a", "0"))
    world.step = 3
    world.queue.put("train", t0, global_steps=3)
    world.end(q0, t0)
    world.at_poll = lambda: world.end(*world.running())
    assert world.sample(2).isdisjoint({q0, t0})


def test_waiting_lets_prompts_at_the_threshold_finish_first(monkeypatch):
    world = World(monkeypatch, threshold=2, strategy="wait")
    old = world.submit(("a", "0"))
    world.step = 2
    new = world.submit(("a", "1"))
    world.end(*new)
    world.at_poll = lambda: world.end(*old)
    assert world.sample(2) == {*old} and world.polls == 1 and world.refills == []


def test_when_no_source_can_fill_a_batch_more_pairs_are_asked_for(monkeypatch):
    """One leftover of each of three sources and nothing in flight: at most S (N - 1) + 1 groups are needed."""
    stream = [("a", "3"), ("b", "4"), ("c", "5"), ("b", "6")]
    world = World(monkeypatch, stream)
    for source in "abc":
        world.end(*world.submit((source, source)))
    world.at_poll = lambda: world.end(*world.running())
    assert len(world.sample(6)) == 6
    assert sum(world.refills) <= 2 * (3 * (3 - 1) + 1 - 3) and world.refills[0] == 4


def test_pairs_that_share_a_batch_are_one_group(monkeypatch):
    world = World(monkeypatch, [("a", str(i)) for i in range(10, 30)], together=2)
    first, second = world.submit(("a", "0"), ("a", "1")), world.submit(("a", "2"), ("a", "3"))
    world.end(*second, *first[:3])
    world.end(first[3], status="failure")
    assert world.sample(4) == {*second}
    assert world.refills == [4] and first[0] not in world.queue.partitions["train"]


def test_a_number_of_prompts_can_be_waited_for_over_all_sources(monkeypatch):
    """verl asks for that before it takes lent devices back."""
    world = World(monkeypatch, [("c", "2")])
    world.end(*world.submit(("a", "0")), *world.submit(("b", "1")))
    assert len(world.buffer.wait_for_sampleable(1, "train", 4)[0]) == 4
    world.at_poll = lambda: world.end(*world.running())
    assert len(world.buffer.wait_for_sampleable(1, "train", 6)[0]) == 6 and world.refills == [2]


def test_failures_without_end_stop_the_run(monkeypatch):
    world = World(monkeypatch, (("a", str(i)) for i in itertools.count(10)))
    world.submit(("a", "0"))
    world.at_poll = lambda: world.end(*world.running(), status="failure")
    with pytest.raises(EmbedderError, match=r"4 prompts have failed since the last batch, more than the 2"):
        world.sample(2)


def test_validation_samples_prompts_as_verl_does(monkeypatch):
    world = World(monkeypatch)
    for uid, status in (("v0", "finished"), ("v1", "failure"), ("v2", "finished")):
        world.queue.put("val", uid, is_prompt=True, status=status, global_steps=1)
        world.queue.put("val", f"{uid}_0_0", status="success")
    batch, _ = world.buffer.sample(global_steps=9, partition_id="val", batch_size=3)
    assert sorted(batch.keys) == ["v0_0_0", "v1_0_0", "v2_0_0"]


def test_a_prompt_without_a_pair_is_refused(monkeypatch):
    world = World(monkeypatch)
    world.queue.put("train", "x", is_prompt=True, status="finished", global_steps=1)
    with pytest.raises(EmbedderError, match="prompt x in the rollout queue must name its pair"):
        world.sample(2)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_batches_hold_whole_groups_of_one_source(monkeypatch, seed):
    """Prompts of random sources end in random order, some fail, steps go by: 30 batches, none split, none missing."""
    rng = random.Random(seed)
    together, groups, sources = rng.choice([1, 1, 2]), rng.choice([1, 2, 3]), rng.choice(["a", "ab", "abcd"])

    def stream():
        """Blocks of one batch and one source, as the pair sampler gives them; 12 pairs a source, epoch after epoch."""
        pairs = {source: itertools.cycle(range(12)) for source in sources}
        while True:
            source = rng.choice(sources)
            for _ in range(groups * together):
                yield source, f"{source}{next(pairs[source])}"

    world = World(
        monkeypatch,
        stream(),
        threshold=rng.choice([None, 2, 4]),
        strategy=rng.choice(["drop", "wait"]),
        together=together,
    )
    tags, submit = {}, world.submit

    def record(*pairs):
        uids = submit(*pairs)
        tags.update({uid: dict(world.queue.partitions["train"][uid]) for uid in uids})
        return uids

    world.submit = record

    def work():
        for uid in world.running():
            if rng.random() < 0.4:
                world.end(uid, status="failure" if rng.random() < 0.03 else "finished")

    world.at_poll = work
    size, trained = groups * world.size, set()
    world.refill(size)
    for step in range(1, 31):
        world.step = step
        world.refill(size)
        batch = world.sample(size)
        found = [tags[uid] for uid in batch]
        assert len(batch) == size and trained.isdisjoint(batch)
        trained |= batch
        assert len({tag["data_source"] for tag in found}) == 1
        assert len({(tag["embedrl_pair_id"], tag["embedrl_side"]) for tag in found}) == size
        for group in {tag["embedrl_group"] for tag in found}:
            assert batch >= {uid for uid, tag in tags.items() if tag["embedrl_group"] == group}
    left = set(world.queue.partitions["train"])
    rows = {key for key in world.queue.partitions["embed"] if key.split("_")[0] not in left}
    assert not rows, "no Embedder input outlives its prompt"


def test_the_synchronous_buffer_is_verls_own_but_for_its_interval():
    kwargs = {"trainer_config": {}, "max_off_policy_threshold": None, "max_off_policy_strategy": "drop"}
    buffer = replay_buffer.replay_buffer("sync", sampler_kwargs={"poll_interval": 0.1}, **kwargs)
    assert type(buffer) is verls.ReplayBuffer and buffer.poll_interval == 0.1
    assert isinstance(
        replay_buffer.replay_buffer("colocate_async", sampler_kwargs={"poll_interval": 0.1}, **kwargs), PairReplayBuffer
    )
    with pytest.raises(ConfigError, match="poll_interval"):
        replay_buffer.replay_buffer("sync", sampler_kwargs={}, **kwargs)
