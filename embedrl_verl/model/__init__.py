# SPDX-License-Identifier: Apache-2.0
"""Reasoner and Embedder as one model (`EmbedRLModel`), and the parts of it: what is asked, what writes, what embeds."""

from embedrl_verl.model.pair import EmbedRLModel
from embedrl_verl.model.tcots import Ask, Written, ask_for

__all__ = ["Ask", "EmbedRLModel", "Written", "ask_for"]
