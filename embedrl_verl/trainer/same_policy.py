# SPDX-License-Identifier: Apache-2.0
"""The policy that samples is the policy that trains: the correlation of their probabilities is watched."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from embedrl_verl.errors import EmbedRLError

logger = logging.getLogger(__name__)

CORRELATION = "training/rollout_actor_probs_pearson_corr"
"""verl's metric: of the rollout's and the actor's probabilities of the tokens of a batch."""
WARN_BELOW = 0.99


def check_same_policy(metrics: Mapping[str, float], step: int, *, least: float, synchronous: bool) -> None:
    """Warn, or stop the run, when rollouts and actor have come apart.

    Args:
        metrics: of the step; without the metric (log-probs of the rollout are off), or with one that is not a number
            (no spread in the probabilities), nothing is checked.
        least: correlation below which a synchronous run stops.
        synchronous: rollouts are the actor's own; else they may be some updates old, which is only warned of.

    Raises:
        EmbedRLError: the correlation is below `least`.
    """
    value = float(metrics.get(CORRELATION, float("nan")))
    if not value < WARN_BELOW:
        return
    message = (
        f"step {step}: the probabilities of the rollout and of the actor correlate by {value:.3f} ({CORRELATION}); 1 "
        "is the same policy"
    )
    if synchronous and value < least:
        raise EmbedRLError(
            f"{message}, and below embedrl.rollout.min_probs_correlation={least:g} the run stops: it would train on "
            "the rollouts of another policy. Look for weights that do not reach vLLM (adapters of the vision part, "
            "quantisation), other prompts or positions, or another temperature"
        )
    logger.warning("EG-RL: %s", message)
