# SPDX-License-Identifier: Apache-2.0
"""The agent loop `tcot`: one T-CoT per prompt, and the Embedder's input beside it.

After vLLM has answered, while other rollouts still run, the loop parses the T-CoT, cuts its evidence from the original
media and encodes what the Embedder will read. That encoding goes to TransferQueue partition `embed` under the row's own
key, so that pixels never travel through the trainer. A row that cannot be encoded keeps its rollout and says why in
`extra_fields["embedrl"]["failure"]`; the reward stage masks and counts it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import Any

import ray
import transfer_queue as tq
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from embedrl_verl.config import load_embedrl_config
from embedrl_verl.data.dataset import row_item
from embedrl_verl.data.media import LoadedItem, load_item
from embedrl_verl.data.schema import Item
from embedrl_verl.embedder import EmbedInput, EmbedProcessor
from embedrl_verl.errors import EmbedderError, MediaError
from embedrl_verl.tcot import TCoT, cut_evidence, parse_tcot

logger = logging.getLogger(__name__)

EMBED_PARTITION = "embed"
ROW_INFO = "embedrl"


def row_key(uid: str, session_id: int) -> str:
    """Key under which verl stores the single output of a session (extension of its `{uid}_{session}_{index}`)."""
    return f"{uid}_{session_id}_0"


@functools.lru_cache(maxsize=1)
def _processor(settings: Any) -> EmbedProcessor:
    """One EmbedProcessor per process: agent loops are created anew for every rollout."""
    return EmbedProcessor.from_settings(settings)


@functools.lru_cache(maxsize=64)
def _originals(item: Item, media_root: str | None, max_frames: int) -> LoadedItem:
    """Decoded originals of a prompt; its G rollouts share them."""
    return load_item(item, media_root, max_frames=max_frames)
