# SPDX-License-Identifier: Apache-2.0
"""The judge's place in the trainer: which servers it asks, when they are awake, and which keys reach it."""

from __future__ import annotations

import asyncio
import weakref
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from embedrl_verl.config.schema import JudgeConfig
from embedrl_verl.data.schema import Item
from embedrl_verl.errors import ConfigError
from embedrl_verl.judge import stage as module
from embedrl_verl.judge.judge import check_judge
from embedrl_verl.judge.stage import JudgeStage
from embedrl_verl.tcot import parse_tcot
from embedrl_verl.trainer.reward_stage import Row

URLS = ("http://judge-a:8000", "http://judge-b:8000")


class Manager:
    """verl's reward-model manager, as far as its servers' sleep goes."""

    def __init__(self, *, sleeps: bool = True) -> None:
        self.server_addresses = ["10.0.0.1:8001", "10.0.0.2:8001"]
        self.config = SimpleNamespace(rollout=SimpleNamespace(free_cache_engine=sleeps))
        self.calls: list[str] = []

    def wake_up(self) -> None:
        self.calls.append("wake_up")

    def sleep(self) -> None:
        self.calls.append("sleep")


def stage(config: JudgeConfig, servers: Manager | None = None, *, shares_devices: bool = True) -> JudgeStage:
    return JudgeStage(config, servers, shares_devices=shares_devices, media_root=None, max_frames=8)


def test_the_servers_are_those_of_the_urls_or_verls_own_asked_directly() -> None:
    assert stage(JudgeConfig(urls=URLS)).urls == URLS
    assert stage(JudgeConfig(), Manager()).urls == ("http://10.0.0.1:8001", "http://10.0.0.2:8001")


def test_servers_on_the_actors_devices_are_awake_only_while_they_judge_also_after_an_error() -> None:
    manager = Manager()
    judge = stage(JudgeConfig(), manager)
    with judge.awake():
        assert manager.calls == ["wake_up"]
    with pytest.raises(RuntimeError), judge.awake():
        raise RuntimeError
    assert manager.calls == ["wake_up", "sleep"] * 2


def test_servers_on_devices_of_their_own_are_woken_once_and_stay_awake() -> None:
    manager = Manager()
    judge = stage(JudgeConfig(), manager, shares_devices=False)
    for _ in range(2):
        with judge.awake():
            pass
    assert manager.calls == ["wake_up"]


@pytest.mark.parametrize("shares_devices", [True, False])
@pytest.mark.parametrize("sleeps", [True, False])
def test_verls_servers_live_as_long_as_the_judge(sleeps, shares_devices) -> None:
    """Ray ends the servers of a manager that nobody holds."""
    manager = Manager(sleeps=sleeps)
    judge, alive = stage(JudgeConfig(), manager, shares_devices=shares_devices), weakref.ref(manager)
    del manager
    assert alive() is not None and judge.urls


@pytest.mark.parametrize("config", [JudgeConfig(urls=URLS), JudgeConfig()])
def test_servers_that_keep_their_memory_are_left_alone(config) -> None:
    manager = None if config.urls else Manager(sleeps=False)
    with stage(config, manager).awake():
        pass
    assert manager is None or manager.calls == []


def test_a_key_is_read_from_its_variable_and_a_variable_that_is_not_set_is_refused(monkeypatch) -> None:
    config = JudgeConfig(urls=URLS, api_key_env="SOME_KEY")
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ConfigError, match="embedrl.judge.api_key_env names SOME_KEY, which is not set"):
        stage(config)
    monkeypatch.setenv("SOME_KEY", "secret")
    assert stage(config)._judge.pool._api_key == "secret"


def test_the_pool_has_the_limits_of_the_configuration() -> None:
    config = JudgeConfig(urls=URLS, limit=7, timeout_s=1.5, retries=2, backoff_s=0.25)
    limits = stage(config)._judge.pool.settings
    assert (limits.limit, limits.timeout_s, limits.retries, limits.backoff_s) == (7, 1.5, 2, 0.25)


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        (("ftp://judge",), "embedrl.judge.urls: a server's URL must read"),
        (("http://judge", "judge/v1"), "embedrl.judge.urls: a pool needs one or more different"),
    ],
)
def test_a_judge_that_cannot_work_is_refused_before_anything_is_started(urls, message) -> None:
    check_judge(JudgeConfig(api_key_env="SET_WHERE_THE_TRAINER_RUNS"))
    with pytest.raises(ConfigError, match=message):
        check_judge(JudgeConfig(urls=urls))


def test_each_row_is_judged_with_its_inputs_instruction_and_a_prompt_leaves_the_queue_once(monkeypatch) -> None:
    tcot = parse_tcot("anything")
    prompts = [("p0", 0, "Find it."), ("p0", 1, ""), ("p1", 0, "Find another."), ("p1", 1, "Describe it.")]
    rows = [
        Row(f"{pair}{side}_{g}_0", pair, side, g, 0, "text_keywords", "s", tcot, 0, 0, 0, None, 5)
        for pair, side, _ in prompts
        for g in (0, 1)
    ]
    asked, told = [], {}

    def get(keys, partition_id, select_fields):
        asked.extend(keys)
        wanted = {f"{pair}{side}_0_0": instruction for pair, side, instruction in prompts}
        items = [asdict(Item(text="x", instruction=wanted[key])) for key in keys]
        return {module.ITEM: SimpleNamespace(tolist=lambda: items)}

    async def judge(batch, **arguments):
        told.update(arguments)
        return SimpleNamespace(scores=None)

    monkeypatch.setattr(module.tq, "kv_batch_get", get)
    here = stage(JudgeConfig(urls=URLS))
    monkeypatch.setattr(here._judge, "judge", judge)
    asyncio.run(here.of(rows, "train", 3)(None))  # type: ignore[arg-type]
    assert told["instructions"] == ["Find it."] * 2 + [None] * 2 + ["Find another."] * 2 + ["Describe it."] * 2
    assert sorted(asked) == ["p00_0_0", "p01_0_0", "p10_0_0", "p11_0_0"]
