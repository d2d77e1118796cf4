# SPDX-License-Identifier: Apache-2.0
"""The judge of a run: which servers it has, when they are awake, and what it is shown of a batch.

Servers are verl's own (`reward.reward_model.enable`: on the actor's devices, where they sleep outside the reward stage,
or on their own), or those of `embedrl.judge.urls`. verl's servers are asked directly, not through its router, which has
limits and retries of its own and hides why a request failed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transfer_queue as tq

from embedrl_verl.config.schema import JudgeConfig
from embedrl_verl.data.dataset import row_item
from embedrl_verl.data.media import load_item
from embedrl_verl.data.schema import Item
from embedrl_verl.judge import Judgement, image_urls
from embedrl_verl.judge.judge import make_judge
from embedrl_verl.rewards import Judge, RewardBatch

ITEM = "embedrl_item"


class JudgeStage:
    """The judge of a run.

    Args:
        config: the section `embedrl.judge`.
        servers: verl's reward-model manager, or None with `urls` (`config.rules` has refused both).
        shares_devices: the manager's servers live on the actor's devices.
        media_root, max_frames: as the data set's, to load the images that the judge is shown.
    """

    def __init__(
        self, config: JudgeConfig, servers: Any, *, shares_devices: bool, media_root: str | None, max_frames: int
    ) -> None:
        self._servers = servers  # Ray ends servers that nobody holds
        self._sleeper = servers if servers is not None and servers.config.rollout.free_cache_engine else None
        if self._sleeper is not None and not shares_devices:
            self._sleeper.wake_up()  # verl puts them to sleep at the start; nobody else needs their devices
            self._sleeper = None
        urls = config.urls or tuple(f"http://{address}" for address in servers.server_addresses)
        self._images = config.images
        self._media = (media_root, max_frames)
        self._judge = make_judge(config, urls)
        self._judgement: Judgement | None = None

    @property
    def urls(self) -> tuple[str, ...]:
        """The servers' addresses."""
        return self._judge.pool.urls

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """The servers hold their weights inside; outside they leave the devices to the actor. Not inside a loop."""
        if self._sleeper is None:
            yield
            return
        self._sleeper.wake_up()
        try:
            yield
        finally:
            self._sleeper.sleep()

    def metrics(self) -> dict[str, float]:
        """Numbers of the last batch, once; nothing if the reward did not ask the judge."""
        judgement, self._judgement = self._judgement, None
        return {} if judgement is None else judgement.metrics()

    def of(self, rows: Sequence[Any], partition_id: str, step: int) -> Judge:
        """The judge of one batch; `rows` are the batch's, of which `key`, `pair_id` and `side` are read."""
        identity = [row.pair_id for row in rows]
        items = _items(rows, partition_id)
        instructions = [item.instruction or None for item in items]
        images = self._image_source(items) if self._images else None

        async def judge(batch: RewardBatch) -> torch.Tensor:
            self._judgement = await self._judge.judge(
                batch, step=step, identity=identity, images=images, instructions=instructions
            )
            return self._judgement.scores

        return judge

    def _image_source(self, items: Sequence[Item]) -> Callable[[int], list[str]]:
        """Row -> its input's images as data URLs."""
        root, max_frames = self._media

        def images(row: int) -> list[str]:
            loaded = load_item(items[row], root, max_frames=max_frames)
            return image_urls([*loaded.images, *loaded.frames])

        return images


def _items(rows: Sequence[Any], partition_id: str) -> list[Item]:
    """The input of each row. The rollouts of a prompt have the same one, which leaves the queue once."""
    first = {(row.pair_id, row.side): row.key for row in reversed(rows)}
    data = tq.kv_batch_get(keys=list(first.values()), partition_id=partition_id, select_fields=[ITEM])
    items = {prompt: row_item({ITEM: item}) for prompt, item in zip(first, data.get(ITEM).tolist(), strict=True)}
    return [items[row.pair_id, row.side] for row in rows]
