# SPDX-License-Identifier: Apache-2.0
"""The agent loop `tcot`: one T-CoT per prompt, and the Embedder's input beside it.

After vLLM has answered, while other rollouts still run, the loop parses the T-CoT, cuts its evidence from the original
media and encodes what the Embedder will read, or has it embedded at once (`embedrl.embedder.backend`). Encoding or
vector goes to TransferQueue partition `embed` under the row's own key, so that pixels never travel through the trainer.
A row without it keeps its rollout and says why in `extra_fields["embedrl"]["failure"]`; the reward stage masks and
counts it.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient

from embedrl_verl.config import EmbedRLConfig, load_embedrl_config
from embedrl_verl.config.schema import MediaConfig
from embedrl_verl.data.dataset import media_root_of, row_item
from embedrl_verl.data.lengths import served_prompt_ids
from embedrl_verl.data.media import LoadedItem, load_item
from embedrl_verl.data.schema import Item
from embedrl_verl.embedder import EmbedInput
from embedrl_verl.embedder.positions import bind_positions
from embedrl_verl.embedder.streaming import RowBackend, row_backend
from embedrl_verl.errors import EmbedderError, MediaError
from embedrl_verl.families import Family, facts_of, resolve_family
from embedrl_verl.serving.vllm import processor_arguments
from embedrl_verl.tcot import parse_tcot
from embedrl_verl.trainer.reward_stage import EMBED_PARTITION, ROW_INFO, raw_key

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Settings:
    """What a process needs of the configuration; `config` is kept so that its id stays its own."""

    config: Any
    embedrl: EmbedRLConfig
    backend: RowBackend
    family: Family
    media_root: str | None
    max_frames: int
    seed: int


_SETTINGS: dict[int, _Settings] = {}


def _settings(config: Any, processor: Any) -> _Settings:
    """The settings of this run; an agent loop is made for every rollout, these are not."""
    known = _SETTINGS.get(id(config))
    if known is None:
        embedrl, data = load_embedrl_config(config), MediaConfig.from_config(config.data)
        processes = int(config.actor_rollout_ref.rollout.agent.num_workers)
        known = _SETTINGS[id(config)] = _Settings(
            config=config,
            embedrl=embedrl,
            backend=row_backend(embedrl.embedder, max_frames=data.max_frames, processes=processes),
            family=resolve_family(data.family, processor),
            media_root=media_root_of(config.data),
            max_frames=data.max_frames,
            seed=int(config.data.get("seed") or 0),
        )
    return known


def request_seed(seed: int, row: Mapping[str, Any]) -> int:
    """Seed of one rollout, 0 to 2^31 - 1, the same in every run: of the run's seed and the rollout's place in it."""
    names = ("global_steps", "embedrl_pair_id", "embedrl_side", "session_id")
    place = "/".join(str(value) for value in (seed, *(row[name] for name in names)))
    return int.from_bytes(hashlib.sha256(place.encode()).digest()[:4], "big") >> 1


@functools.lru_cache(maxsize=64)
def _originals(item: Item, media_root: str | None, max_frames: int) -> LoadedItem:
    """Decoded originals of a prompt; its G rollouts share them."""
    return load_item(item, media_root, max_frames=max_frames)


class _ClipClient:
    """verl's server client for prompts with a clip, which vLLM then reads as the actor does.

    It sends the ids that vLLM can expand itself (`served_prompt_ids` says which case needs it) and the clips' times
    (`processor_arguments`). An agent loop lives for one rollout, so the wrapper never meets another prompt.
    """

    def __init__(self, client: Any, family: Family, prompt_ids: list[int] | None) -> None:
        self._client, self._family = client, family
        self._prompt_ids = prompt_ids

    async def generate(self, *, prompt_ids: list[int], **kwargs: Any) -> Any:
        """As the client's own."""
        if clips := [metadata for _, metadata in kwargs.get("video_data") or ()]:
            arguments = kwargs.get("mm_processor_kwargs") or {}
            kwargs["mm_processor_kwargs"] = {**arguments, **processor_arguments(self._family, clips)}
        return await self._client.generate(prompt_ids=self._prompt_ids or prompt_ids, **kwargs)


def continuation_seed(seed: int, generated: int) -> int:
    """Seed of a request whose response has `generated` tokens so far, 0 to 2^31 - 1; the rollout's own for none."""
    if generated == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{generated}".encode()).digest()[:4], "big") >> 1


class _SeedOfEachAttempt(LLMServerClient):  # type: ignore[misc]
    """One request of a rollout. `max_tokens` is what is left of the response's budget, which verl's client pins."""

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **kwargs: Any
    ) -> Any:
        """As verl's."""
        if "seed" in sampling_params:
            budget = int(self.config.actor_rollout_ref.rollout.response_length)
            seed = continuation_seed(sampling_params["seed"], budget - sampling_params["max_tokens"])
            sampling_params = {**sampling_params, "seed": seed}
        return await super().generate(request_id, prompt_ids=prompt_ids, sampling_params=sampling_params, **kwargs)


class ResumingClient(FullyAsyncLLMServerClient, _SeedOfEachAttempt):  # type: ignore[misc]
    """verl's client for rollouts that a weight update interrupts, with a new seed for every continuation.

    verl aborts a running request, updates the weights and sends prompt + tokens so far as a new request, until the
    response is whole. With its first seed (`embedrl.rollout.request_seeds`) a continuation would meet the random
    numbers again that chose the first tokens: it would depend on them in a way the policy does not know.
    """


class TCoTAgentLoop(SingleTurnAgentLoop):  # type: ignore[misc]
    """verl's single-turn loop, followed by the row's evidence and Embedder input."""

    server_manager: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = _settings(self.config, self.processor)
        bind_positions(self.processor, self._settings.family)  # the worker's, which computes the actor's positions

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        """Generate one T-CoT; `extra_fields["embedrl"]` has it parsed, with media counts, evidence and failure."""
        settings = self._settings
        if row_item(row).video is not None:
            ids = None
            if facts_of(settings.family).clip_time == "stamps":
                ids = served_prompt_ids(list(row["raw_prompt"]), self.processor, self.apply_chat_template_kwargs)
            self.server_manager = _ClipClient(self.server_manager, settings.family, ids)
        if settings.embedrl.rollout.request_seeds:
            sampling_params = {**sampling_params, "seed": request_seed(settings.seed, row)}
        # One of a prompt's rollouts brings its raw input, while vLLM works.
        wanted = settings.embedrl.reward.raw_embeddings and int(row["session_id"]) == 0
        raw = asyncio.create_task(self._store_raw(row)) if wanted else None
        output: AgentLoopOutput = await super().run(sampling_params, **row)
        if raw is not None:
            await raw
        resized = [image.size for image in (output.multi_modal_data or {}).get("images") or []]
        info, prepared = await self.loop.run_in_executor(None, self._prepare, row, output.response_ids, resized)
        if info["failure"] is None:
            # verl stores a session's single output as {uid}_{session}_{index}, index 0.
            info["failure"] = await self._store(f"{row['uid']}_{row['session_id']}_0", prepared)
        output.extra_fields[ROW_INFO] = info
        return output

    def _prepare(
        self, row: dict[str, Any], response_ids: list[int], resized: list[tuple[int, int]]
    ) -> tuple[dict[str, Any], Any]:
        """Parse, cut evidence and encode (in a thread). `resized`: (width, height) of the images the Reasoner saw."""
        settings, item = self._settings, row_item(row)
        text = self.tokenizer.decode(response_ids, skip_special_tokens=True)
        images = len(item.images)
        info: dict[str, Any] = {"num_images": images, "num_frames": 0, "evidence": 0, "failure": None}
        prepared = None
        try:
            loaded = _originals(item, settings.media_root, settings.max_frames)
            info["num_frames"] = len(loaded.frames)
            inputs = EmbedInput.with_tcot(loaded, text, settings.family, settings.embedrl.evidence, resized)
            assert inputs.tcot is not None
            info |= {"tcot": inputs.tcot.to_plain(), "evidence": len(inputs.evidence)}
            prepared = settings.backend.prepare(inputs, str(row["embedrl_side"]))
        except (MediaError, EmbedderError) as error:
            logger.warning("row %s has no Embedder input: %s", row.get("uid"), error)
            info["failure"] = str(error)
            info.setdefault("tcot", parse_tcot(text, num_images=images or None).to_plain())
        return info, prepared

    async def _store(self, key: str, prepared: Any) -> str | None:
        """Put what the reward stage needs of a row into the queue; returns why the row has failed, if it has."""
        try:
            await self._settings.backend.store(key, EMBED_PARTITION, prepared)
        except EmbedderError as error:
            logger.warning("row %s has no embedding: %s", key, error)
            return str(error)
        return None

    async def _store_raw(self, row: dict[str, Any]) -> None:
        """Put the input without T-CoT into the queue. Without it the prompt's rows have no raw similarity, no more."""
        settings = self._settings

        def prepare() -> Any:
            loaded = _originals(row_item(row), settings.media_root, settings.max_frames)
            return settings.backend.prepare(EmbedInput(loaded), str(row["embedrl_side"]))

        try:
            prepared = await self.loop.run_in_executor(None, prepare)
        except (MediaError, EmbedderError) as error:
            logger.warning("prompt %s has no raw embedding: %s", row.get("uid"), error)
        else:
            await self._store(raw_key(row["uid"]), prepared)
