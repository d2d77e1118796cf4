# SPDX-License-Identifier: Apache-2.0
"""Batches to judge: every T-CoT answers with the number of its pair."""

import re

import torch

from embedrl_verl.judge import load_judge_style
from embedrl_verl.rewards import RewardBatch
from embedrl_verl.tcot import parse_tcot


def tcot_of(answer, thinking="It says"):
    return parse_tcot(
        f'<thinking>{thinking} {{"text_keywords": ["a"]}}.</thinking><rethink>Yes.</rethink><answer>{answer}</answer>'
    )


def lines_of(text, style="compact"):
    """Numbered texts of a one-line prompt, and its last line."""
    *lines, last = text.splitlines()
    candidate = re.escape(load_judge_style(style).candidate)
    pattern = candidate.replace(r"\$number", r"(?P<number>\d+)").replace(r"\$text", "(?P<text>.*)")
    found = [re.fullmatch(pattern, line) for line in lines]
    return {match["number"]: match["text"] for match in found}, last


def make_batch(pairs=6, rollouts=4, seed=0, noise=0.8, order=None, **change):
    """Rows of random embeddings near their pair's direction in the given `order` (a tensor of rows)."""
    generator = torch.Generator().manual_seed(seed)
    side, pair, rollout = torch.cartesian_prod(torch.arange(2), torch.arange(pairs), torch.arange(rollouts)).T
    centre = torch.randn(pairs, 24, generator=generator)[pair]
    vectors = centre + noise * torch.randn(len(side), 24, generator=generator)
    arguments = {
        "side": side,
        "pair": pair,
        "rollout": rollout,
        "content": pair,
        "embeddings": torch.nn.functional.normalize(vectors, dim=1),
        "valid": torch.ones_like(side, dtype=torch.bool),
    } | change
    order = torch.arange(len(side)) if order is None else order
    arguments = {name: value[order] for name, value in arguments.items()}
    tcots = [tcot_of(p) for p in arguments["pair"].tolist()]
    return RewardBatch.build(**arguments, tcots=tcots, required=["text_keywords"] * len(order))
