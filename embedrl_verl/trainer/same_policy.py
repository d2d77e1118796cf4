# SPDX-License-Identifier: Apache-2.0
"""The policy that samples is the policy that trains: the correlation of their probabilities is watched."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from embedrl_verl.errors import EmbedRLError

logger = logging.getLogger(__name__)

CORRELATION = "training/rollout_actor_probs_pearson_corr"
"""verl's metric: of the rollout's and the actor's probabilities of the tokens of a batch."""
WARN_BELOW = 0.99


class PolicyWatch:
    """Warns, and stops a synchronous run, when rollouts and actor have come apart.

    One low step is warned of, since a batch of few or nearly certain tokens has a low correlation by chance; two in a
    row are no chance.
    """

    def __init__(self, least: float, *, synchronous: bool) -> None:
        """
        Args:
            least: correlation below which a synchronous run stops.
            synchronous: rollouts are the actor's own; else they may be some updates old, which is only warned of.
        """
        self.least, self.synchronous = least, synchronous
        self._low_before = self._said_unwatched = False

    def check(self, metrics: Mapping[str, float], step: int) -> None:
        """Look at the metrics of a step.

        Raises:
            EmbedRLError: the correlation is below `least` for the second step in a row.
        """
        value = float(metrics.get(CORRELATION, float("nan")))
        if math.isnan(value):
            if not self._said_unwatched:
                logger.warning(
                    "EG-RL: step %d has no %s (log-probs of the rollout are off, or all probabilities are equal); "
                    "whether rollouts are the actor's own is not watched there",
                    step,
                    CORRELATION,
                )
            self._said_unwatched = True
            return
        low_before, self._low_before = self._low_before, value < self.least
        if value >= max(WARN_BELOW, self.least):
            return
        message = (
            f"step {step}: the probabilities of the rollout and of the actor correlate by {value:.3f} ({CORRELATION}); "
            "1 is the same policy"
        )
        if self.synchronous and self._low_before and low_before:
            raise EmbedRLError(
                f"{message}, and below embedrl.rollout.min_probs_correlation={self.least:g} for two steps in a row the "
                "run stops: it would train on the rollouts of another policy. Look for weights that do not reach vLLM "
                "(adapters of the vision part, quantisation), other prompts or positions, another temperature, or "
                "sampling that cuts probabilities (rollout.top_k, rollout.top_p)"
            )
        logger.warning("EG-RL: %s", message)
