# SPDX-License-Identifier: Apache-2.0
"""Batches of random rows."""

import pytest
import torch

from embedrl_verl.cli import main
from embedrl_verl.rewards import RewardBatch
from embedrl_verl.rewards.dump import dump_name, write_reward_dump
from embedrl_verl.rewards.functions import no_judge
from embedrl_verl.tcot import parse_tcot

WELL_FORMED = '<thinking>It says {"text_keywords": ["a"]}.</thinking><rethink>Yes.</rethink><answer>a</answer>'
BROKEN = "no tags at all"


@pytest.fixture(scope="session")
def make_batch():
    """Rows of random embeddings near their pair's direction, shuffled; `change` overrides arguments of `build`."""

    def make(pairs=5, rollouts=4, seed=0, noise=0.8, rows=None, **change):
        generator = torch.Generator().manual_seed(seed)
        side, pair, rollout = torch.cartesian_prod(torch.arange(2), torch.arange(pairs), torch.arange(rollouts)).T
        kept = torch.randperm(len(side), generator=generator) if rows is None else rows
        centre = torch.randn(pairs, 24, generator=generator)[pair]
        vectors = centre + noise * torch.randn(len(side), 24, generator=generator)
        arguments = {
            "side": side,
            "pair": pair,
            "rollout": rollout,
            "content": pair,
            "embeddings": torch.nn.functional.normalize(vectors, dim=1),
        }
        arguments = {name: value[kept] for name, value in arguments.items()}
        texts = [WELL_FORMED if (p + s) % 2 else BROKEN for p, s in zip(pair[kept], side[kept], strict=True)]
        arguments |= {"tcots": [parse_tcot(text) for text in texts], "required": ["text_keywords"] * len(kept)}
        return RewardBatch.build(**{**arguments, **change})

    return make


@pytest.fixture(scope="session")
def rows_of():
    """What a dump says of each row of a batch."""

    def rows(batch, **change):
        return [
            {
                "pair_id": f"p{pair}",
                "data_source": "s",
                "text": tcot.text,
                "num_images": 0,
                "num_frames": None,
                **change,
            }
            for pair, tcot in zip(batch.pair.tolist(), batch.tcots, strict=True)
        ]

    return rows


@pytest.fixture
def trial_batch(make_batch):
    """Two pairs with two rollouts a side: q0 q0 q1 q1 t0 t0 t1 t1."""
    tcots = [parse_tcot(WELL_FORMED if i % 2 else "words " * 200) for i in range(8)]
    return make_batch(2, 2, rows=torch.arange(8), tcots=tcots, lengths=torch.arange(8))


@pytest.fixture
def write(tmp_path, trial_batch, rows_of):
    """Dumps a step; without parts they are those of no_judge."""

    def dump(step, parts=None, *, function="the run's own", **change):
        parts = parts or no_judge.compute_score(trial_batch, **change.get("kwargs", {}))
        path = tmp_path / "rollouts" / dump_name(step)
        write_reward_dump(path, trial_batch, parts, rows=rows_of(trial_batch), function=function, **change)

    return dump


@pytest.fixture
def printed(capsys):
    """What `embedrl reward try WORDS` prints."""

    def run(*words):
        assert main(["reward", "try", *map(str, words)]) == 0
        return capsys.readouterr().out

    return run
