# SPDX-License-Identifier: Apache-2.0
"""Batches to judge: every T-CoT answers with the number of its pair."""

import torch

from embedrl_verl.rewards import RewardBatch
from embedrl_verl.tcot import parse_tcot


def tcot_of(answer, thinking="It says"):
    return parse_tcot(
        f'<thinking>{thinking} {{"text_keywords": ["a"]}}.</thinking><rethink>Yes.</rethink><answer>{answer}</answer>'
    )


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
