# SPDX-License-Identifier: Apache-2.0
"""A batch with everything a reward may ask for: a judge, response lengths and raw embeddings."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from embedrl_verl.rewards import RewardBatch
from embedrl_verl.tcot import parse_tcot

REWARD = Path(__file__).resolve().parents[2] / "reward"
WELL_FORMED = '<thinking>It says {"text_keywords": ["a"]}.</thinking><rethink>Yes.</rethink><answer>a</answer>'


def _load(name):
    spec = importlib.util.spec_from_file_location(f"custom_module_{name}", REWARD / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.compute_score


async def _judge(batch):
    """Answers by who the row is, not by where it stands; every fifth is unknown."""
    number = batch.pair * 7 + batch.rollout * 3 + batch.side
    return (number % 2).float().masked_fill(number % 5 == 0, torch.nan)


@dataclass
class Rows:
    """Arguments of `RewardBatch.build`; `batch` builds it from the rows in some order."""

    arguments: dict

    def batch(self, order=None, **change):
        order = torch.arange(len(self.arguments["side"])) if order is None else order
        values = {**self.arguments, **change}
        shared = {name: values.pop(name) for name in ("judge",)}
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                values[name] = value[order]
            elif value is not None:
                values[name] = [value[i] for i in order.tolist()]
        return RewardBatch.build(**values, **shared)


@pytest.fixture(scope="session")
def load():
    """The function in reward/<name>.py, loaded by path."""
    return _load


@pytest.fixture(scope="session")
def make_rows():
    """6 pairs x 2 sides x 4 rollouts; every third row is malformed, some failed, two pairs show the same content."""

    def make(pairs=6, rollouts=4, seed=0, noise=0.5, failed=0.1):
        generator = torch.Generator().manual_seed(seed)
        side, pair, rollout = torch.cartesian_prod(torch.arange(2), torch.arange(pairs), torch.arange(rollouts)).T
        centre = torch.randn(pairs, 16, generator=generator)
        raw = centre[:, None] + 1.6 * torch.randn(pairs, 2, 16, generator=generator)
        vectors = centre[pair] + noise * torch.randn(len(side), 16, generator=generator)
        return Rows(
            {
                "side": side,
                "pair": pair,
                "rollout": rollout,
                "content": pair.clamp(max=max(pairs - 2, 0)),
                "tcots": [parse_tcot("" if i % 3 == 0 else WELL_FORMED) for i in range(len(side))],
                "required": ["text_keywords"] * len(side),
                "embeddings": torch.nn.functional.normalize(vectors, dim=1),
                "valid": torch.rand(len(side), generator=generator) >= failed,
                "lengths": torch.randint(1, 1500, (len(side),), generator=generator),
                "raw_embeddings": torch.nn.functional.normalize(raw[pair, side], dim=1),
                "judge": _judge,
            }
        )

    return make
