# SPDX-License-Identifier: Apache-2.0
"""Format term of the reward, F in R = alpha F + beta J + gamma O (eq. 5)."""

from __future__ import annotations

from embedrl_verl.tcot.schema import TCoT


def format_reward(tcot: TCoT, required: str | None = None) -> float:
    """1.0 if the T-CoT is well formed and carries the evidence that its input calls for, else 0.0.

    Args:
        tcot: a parsed T-CoT.
        required: evidence key of the input's kind (`EVIDENCE_KEY_OF_KIND`); None asks for any of the three.

    Raises:
        ConfigError: `required` is not an evidence key.
    """
    carries = required is None or tcot.has_evidence(required)
    return float(tcot.is_well_formed and carries)
