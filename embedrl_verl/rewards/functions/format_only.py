# SPDX-License-Identifier: Apache-2.0
"""R = F: 1 for a well-formed T-CoT with the evidence that its input calls for, else 0 (method section 4).

reward.custom_reward_function.path=reward/format_only.py
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from embedrl_verl.rewards import RewardBatch


def compute_score(batch: RewardBatch) -> Mapping[str, Tensor]:
    """What form alone teaches: the run to hold a retrieval reward against.

    Returns:
        (N,) float32 each: "score" (NaN without embedding, so that the same rows train as with the other rewards) and
        "format".
    """
    form = batch.format()
    return {"score": form.masked_fill(~batch.valid, torch.nan), "format": form}
