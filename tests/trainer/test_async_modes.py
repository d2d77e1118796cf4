# SPDX-License-Identifier: Apache-2.0
"""What the asynchronous trainer modes add to verl's: whole groups in, resumed queues clean, rollouts out of the way."""

import asyncio
import inspect
import logging
from collections import Counter

import pytest
import verl.trainer.ppo.v1.trainer_base as verls
from omegaconf import OmegaConf
from verl.trainer.ppo.v1 import get_trainer_cls, trainer_separate_async
from verl.workers.rollout.replica import TokenOutput

from embedrl_verl.data.dataset import TCoTDataset
from embedrl_verl.errors import EmbedderError
from embedrl_verl.trainer import modes_async
from embedrl_verl.trainer.agent_loop import ResumingClient, continuation_seed
from embedrl_verl.trainer.modes_async import EGRLTrainerColocateAsync, EGRLTrainerSeparateAsync
from embedrl_verl.trainer.replay_buffer import PromptTag, tag_prompts
from tests.trainer.fake_queue import FakeQueue


@pytest.fixture
def queue(monkeypatch):
    fake = FakeQueue()
    for module in (verls, modes_async):
        monkeypatch.setattr(module, "tq", fake)
    return fake


def trainer_of(cls=EGRLTrainerColocateAsync, *, batch=8, mini_batches=1, together=1):
    """A trainer without its processes, fed by an endless loader of groups."""
    trainer = object.__new__(cls)
    trainer.config = OmegaConf.create(
        {
            "data": {
                "train_batch_size": batch,
                "gen_batch_size": 2 * together,
                "embedrl": {"pairs_together": together},
            },
            "skip": {"rollout_tq": {"enable": False}},
            "trainer": {"logger": []},
        }
    )
    trainer.trainer_mode, trainer.global_steps, trainer.parameter_sync_step = "colocate_async", 3, mini_batches
    trainer._restored_tq_prompt_count, trainer.train_dataloader_it = 0, None
    pairs = [f"p{i}" for i in range(together)]
    columns = {
        "raw_prompt": [[{"role": "user", "content": side}] for _ in pairs for side in ("query", "target")],
        "embedrl_pair_id": [pair for pair in pairs for _ in "qt"],
        "embedrl_side": ["query", "target"] * together,
        "data_source": ["s"] * 2 * together,
    }
    trainer.train_dataloader = [dict(columns) for _ in range(100)]
    trainer.agent_loop_manager = type("Manager", (), {"generate_sequences": lambda self, batch: None})()
    return trainer


def test_both_modes_are_registered_over_verls_trainers():
    for mode, parent in (("colocate_async", "PPOTrainerColocateAsync"), ("separate_async", "PPOTrainerSeparateAsync")):
        cls = get_trainer_cls(f"egrl_{mode}")
        assert cls.parent_mode == mode and parent in {base.__name__ for base in cls.__mro__}


@pytest.mark.parametrize(("warmup", "together", "expected"), [(1, 1, 8), (1.4, 1, 10), (0.2, 1, 0), (1.6, 2, 12)])
def test_warming_up_submits_whole_groups(queue, warmup, together, expected):
    trainer = trainer_of(together=together)
    trainer._add_async_warmup_batches(warmup)
    tags = [PromptTag.of(uid, tag) for uid, tag in queue.partitions["train"].items()]
    assert len(tags) == expected
    assert set(Counter(tag.group for tag in tags).values()) <= {2 * together}


def test_after_a_resume_warming_up_fills_with_whole_groups(queue):
    trainer = trainer_of()
    trainer._restored_tq_prompt_count = 6
    trainer._add_async_warmup_batches(1.4)
    assert len(queue.partitions["train"]) == 4


def test_a_submitted_prompt_carries_its_group_beside_verls_tags(queue):
    trainer = trainer_of(together=2)
    assert trainer._add_prompts_to_generate(3) == 4, "rounded up to a whole group"
    uids = list(queue.partitions["train"])
    for uid, side, pair in zip(uids, ["query", "target"] * 2, ["p0", "p0", "p1", "p1"], strict=True):
        tag = queue.partitions["train"][uid]
        assert PromptTag.of(uid, tag) == PromptTag(uids[0], 4, pair, side, "s")
        assert (tag["is_prompt"], tag["status"], tag["global_steps"]) == (True, "pending", 3)


@pytest.mark.parametrize(
    ("pairs", "sides", "sources"),
    [
        ("aab", ["query", "target", "query"], "sss"),
        ("abba", ["query", "target"] * 2, "ssss"),
        ("aa", ["query", "query"], "ss"),
        ("aa", ["query", "target"], "st"),
    ],
)
def test_prompts_that_are_no_whole_pairs_of_one_source_are_refused(pairs, sides, sources):
    with pytest.raises(EmbedderError, match=r"groups of 1 whole pair\(s\) of one data source"):
        tag_prompts([f"u{i}" for i in range(len(pairs))], list(pairs), sides, list(sources), 2)


def test_the_age_of_a_batch_counts_steps_since_submission():
    ages = modes_async.off_policy_age([{"global_steps": step} for step in (3, 3, 5, 1)], 5)
    assert ages == {f"embedrl/off_policy_age/{name}": value for name, value in (("mean", 2), ("max", 4), ("min", 0))}


def test_a_restored_queue_keeps_whole_groups_and_nothing_else(queue):
    def prompt(uids, pair, statuses):
        for uid, tag, status in zip(
            uids, tag_prompts(["x", "y"], [pair] * 2, ["query", "target"], ["s"] * 2, 2), statuses, strict=True
        ):
            if uid:
                tags = {**tag.as_tags(), "embedrl_group": pair}
                queue.put("train", uid, is_prompt=True, status=status, global_steps=1, **tags)
                queue.put("train", f"{uid}_0_0", status="success", global_steps=1)
                queue.put("embed", f"{uid}_0_0")

    prompt(("done1", "done2"), "a", ("finished", "finished"))
    prompt(("half1", "half2"), "b", ("finished", "running"))
    prompt(("lost1", None), "c", ("finished", "finished"))
    queue.put("train", "trained_0_0", status="success", global_steps=1)
    queue.put("embed", "trained_0_0")
    queue.put("train", "late", status="finished")
    assert modes_async.clear_leftovers() == 4
    left = {key.split("_")[0] for key in queue.partitions["train"]}
    assert left == {"done1", "done2", "half1", "half2"}
    assert set(queue.partitions["embed"]) == {"done1_0_0", "done2_0_0", "half1_0_0"}


class _Prompts(TCoTDataset):
    """8 pairs of each of two sources."""

    def __init__(self):
        self.pair_sources, self.fingerprint = ["a"] * 8 + ["b"] * 8, "x"

    def __len__(self):
        return 2 * len(self.pair_sources)

    def __getitem__(self, index):
        pair = index // 2
        side, source = ("query", "target")[index % 2], self.pair_sources[pair]
        return {"raw_prompt": [], "embedrl_pair_id": str(pair), "embedrl_side": side, "data_source": source}


def test_prompts_are_fetched_by_groups_in_blocks_of_one_mini_batch(queue, monkeypatch):
    """16 prompts a step in 4 mini-batches: 4 prompts of one source follow one another, and are fetched pair by pair."""

    def as_verl(trainer):
        trainer.train_dataset = trainer.val_dataset = _Prompts()
        trainer.total_training_steps = None

    monkeypatch.setattr(verls.PPOTrainer, "_init_dataloader", as_verl)
    trainer = trainer_of(EGRLTrainerSeparateAsync, batch=16, mini_batches=4)
    actor, run = (
        {"optim": {"total_training_steps": None}, "strategy": "fsdp2"},
        {"total_training_steps": None, "total_epochs": 3},
    )
    trainer.config = OmegaConf.merge(trainer.config, {"actor_rollout_ref": {"actor": actor}, "trainer": run})
    trainer.config.data.update({"gen_batch_size": 1, "dataloader_num_workers": 0, "seed": 0, "shuffle": True})
    trainer._init_dataloader()
    assert (trainer.steps_per_epoch, trainer.total_training_steps) == (2, 6)
    assert trainer.config.actor_rollout_ref.actor.optim.total_training_steps == 24
    assert trainer._add_prompts_to_generate(2) == 2 and trainer._add_prompts_to_generate(14) == 14
    sources = [tag["data_source"] for tag in queue.partitions["train"].values()]
    assert all(len(set(sources[start : start + 4])) == 1 for start in range(0, 16, 4)) and len(set(sources)) == 2


class _Manager:
    """verl's checkpoint manager; writes down what is asked of it."""

    def __init__(self, replicas):
        self.replicas, self.calls = replicas, []

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append(name)


def test_validation_stops_training_rollouts_before_it_takes_the_devices_and_lets_them_go_on():
    manager = _Manager(["one"])
    pauses = modes_async._PausesRollouts(manager)
    pauses.sleep_replicas()
    pauses.update_weights()
    assert manager.calls == ["abort_replicas", "sleep_replicas", "update_weights", "resume_generation_replicas"]


def test_without_servers_on_the_training_devices_validation_leaves_them_alone():
    """verl's own update would ask the actor for a server that it does not have."""
    manager = _Manager([])
    modes_async._PausesRollouts(manager).sleep_replicas()
    modes_async._PausesRollouts(manager).update_weights()
    assert manager.calls == []


def test_upstream_still_logs_a_line_that_logging_refuses():
    """The day this fails, EGRLTrainerSeparateAsync._setup can go."""
    assert "flush=True" in inspect.getsource(trainer_separate_async.PPOTrainerSeparateAsync._setup)
    log = logging.getLogger("test_async_modes")
    log.setLevel(logging.INFO)
    with pytest.raises(TypeError):
        log.info("x", flush=True)


# ------------------------------------------------------------------ interrupted rollouts


class _Server:
    """Answers with the tokens 1, 2, ... of a response of 6, but is interrupted after `first` tokens, then after 0."""

    def __init__(self, first):
        self.requests, self.limits = [], [first, 0, 99]
        self.generate = self

    async def remote(self, *, prompt_ids, sampling_params, **kwargs):
        self.requests.append({"prompt_ids": prompt_ids, **kwargs, **sampling_params})
        start, limit = len(prompt_ids) - 3, self.limits[len(self.requests) - 1]
        tokens = list(range(start + 1, min(6, start + limit) + 1))
        stop = "completed" if start + len(tokens) == 6 else "aborted"
        steps = {"global_steps": 10 + len(self.requests)}
        return TokenOutput(token_ids=tokens, log_probs=[-t for t in tokens], stop_reason=stop, extra_fields=steps)


@pytest.fixture
def interrupted(monkeypatch):
    """A rollout that two weight updates interrupt: the requests that a server sees, and the answer."""
    server = _Server(first=4)
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"response_length": 20, "name": "vllm"}}})
    client = ResumingClient(config)
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: sleep(0))

    async def acquire(request_id, **fields):
        return "server", server

    monkeypatch.setattr(client, "_acquire_server", acquire)
    monkeypatch.setattr(client, "_release_server", lambda *args, **kwargs: None)

    def run(**sampling_params):
        server.requests.clear()
        return asyncio.run(
            client.generate("r", prompt_ids=[7, 8, 9], sampling_params=sampling_params, image_data=["image"])
        )

    return run, server.requests


def test_an_interrupted_rollout_comes_back_whole(interrupted):
    run, requests = interrupted
    output = run(seed=5, temperature=1.0)
    assert output.token_ids == [1, 2, 3, 4, 5, 6] and output.log_probs == [-1, -2, -3, -4, -5, -6]
    assert [request["prompt_ids"] for request in requests] == [[7, 8, 9], *([[7, 8, 9, 1, 2, 3, 4]] * 2)]
    assert all(request["image_data"] == ["image"] for request in requests)
    assert [request["max_tokens"] for request in requests] == [20, 16, 16]
    assert (output.extra_fields["min_global_steps"], output.extra_fields["max_global_steps"]) == (11, 13)


def test_a_continuation_never_meets_the_random_numbers_of_its_beginning(interrupted):
    run, requests = interrupted
    run(seed=5)
    seeds = [request["seed"] for request in requests]
    assert seeds[0] == 5, "as in synchronous training"
    assert seeds[1] == seeds[2] != 5, "nothing had been drawn in between"
    assert seeds[1] == continuation_seed(5, 4) and 0 <= seeds[1] < 2**31
    assert len({continuation_seed(5, n) for n in range(100)}) == 100
    run(temperature=1.0)
    assert all("seed" not in request for request in requests)
