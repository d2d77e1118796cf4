# SPDX-License-Identifier: Apache-2.0
"""verl reward manager `embedder_guided`: the per-row part in `run_single`, the whole batch in `score_batch`.

verl calls a reward manager one row at a time, but a retrieval reward exists only within a batch. So verl's registry
key `reward.reward_manager.name` selects this class, `reward.custom_reward_function.*` selects the function, and the
EG-RL trainer's reward stage calls `score_batch` once a step.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from verl import DataProto
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
from verl.experimental.reward_loop.reward_manager.registry import register

from embedrl_verl.errors import ConfigError
from embedrl_verl.rewards import RewardBatch
from embedrl_verl.rewards.contract import call_reward_function
from embedrl_verl.tcot import format_reward, parse_tcot


@register("embedder_guided")
class EmbedderGuidedRewardManager(RewardManagerBase):  # type: ignore[misc]
    """Scores T-CoTs: format a row, retrieval a batch.

    Raises:
        ConfigError: used without an EG-RL trainer, or without a reward function.
    """

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **_router: Any) -> None:
        mode = str(config.trainer.v1.trainer_mode)
        if not mode.startswith("egrl_"):
            raise ConfigError(
                "reward.reward_manager.name=embedder_guided rewards whole batches and needs an EG-RL trainer; "
                f"got trainer.v1.trainer_mode={mode}. Set trainer.v1.trainer_mode=egrl_sync"
            )
        if not config.reward.custom_reward_function.path:
            raise ConfigError(
                "reward.custom_reward_function.path must name a file with compute_score(batch, **reward_kwargs); "
                "got null. Use one of the files in reward/"
            )
        super().__init__(config, tokenizer, compute_score)

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """Format part of one row: {"reward_score": 0.0 or 1.0, "reward_extra_info": {...}}."""
        if len(data) != 1:
            raise ConfigError(f"run_single takes one row; got {len(data)}")
        row = data[0]
        length = int(row.batch["attention_mask"][-row.batch["responses"].shape[-1] :].sum())
        text = self.tokenizer.decode(row.batch["responses"][:length], skip_special_tokens=True)
        tcot = parse_tcot(text)
        score = format_reward(tcot, row.non_tensor_batch.get("embedrl_required"))
        return {"reward_score": score, "reward_extra_info": {"format": score, "well_formed": tcot.is_well_formed}}

    def score_batch(self, batch: RewardBatch) -> dict[str, Tensor]:
        """Call the user's reward function on the whole batch and check what it returns.

        Returns:
            "score" (N,) float32, NaN where unknown, and every other part the function reports, each (N,).

        Raises:
            ConfigError: as `call_reward_function`.
        """
        named = self.config.reward.custom_reward_function
        return call_reward_function(self.compute_score, batch, f"{named.path}:{named.name}")
