# SPDX-License-Identifier: Apache-2.0
"""The T-CoT language: parsing, well-formedness, evidence (one file a kind), prompts."""

from embedrl_verl.kinds import EVIDENCE_KEY_OF_KIND
from embedrl_verl.tcot.evidence import Evidence, cut_evidence
from embedrl_verl.tcot.evidence.boxes import Box, boxes_to_pixels
from embedrl_verl.tcot.form import TCoT, format_reward
from embedrl_verl.tcot.parse import parse_tcot
from embedrl_verl.tcot.prompts import build_prompt

__all__ = [
    "EVIDENCE_KEY_OF_KIND",
    "Box",
    "Evidence",
    "TCoT",
    "boxes_to_pixels",
    "build_prompt",
    "cut_evidence",
    "format_reward",
    "parse_tcot",
]
