# SPDX-License-Identifier: Apache-2.0
"""Names under which the agent loop and the reward stage exchange a row's data."""

EMBED_PARTITION = "embed"
"""TransferQueue partition of the Embedder's inputs; keys are those of verl's rows."""

ROW_INFO = "embedrl"
"""Key in a row's `extra_fields`: the T-CoT's text, media counts, evidence and why the row failed (or None)."""


def raw_key(uid: str) -> str:
    """Key, in partition `embed`, of a prompt's input without any T-CoT."""
    return f"{uid}_raw"
