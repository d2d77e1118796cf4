# SPDX-License-Identifier: Apache-2.0
"""The T-CoT language: parsing, well-formedness, box and frame conventions, evidence cut from media, prompts."""

from embedrl_verl.kinds import EVIDENCE_KEY_OF_KIND
from embedrl_verl.tcot.boxes import boxes_to_pixels
from embedrl_verl.tcot.evidence import Evidence, cut_evidence
from embedrl_verl.tcot.form import format_reward
from embedrl_verl.tcot.parse import parse_tcot
from embedrl_verl.tcot.prompts import build_prompt
from embedrl_verl.tcot.schema import Box, TCoT

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
