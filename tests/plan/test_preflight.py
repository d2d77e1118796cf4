# SPDX-License-Identifier: Apache-2.0
"""A reward function's mistakes show before a run starts, and only with what the run has."""

import pytest
import torch
from omegaconf import OmegaConf

from embedrl_verl.errors import ConfigError
from embedrl_verl.plan.preflight import check_reward_function, probe_batch
from embedrl_verl.rewards.functions import NEEDS


def of_function(path, **kwargs):
    function = {"path": path, "name": "compute_score", "reward_kwargs": kwargs}
    return OmegaConf.create({"reward": {"custom_reward_function": function}})


def ready(name):
    return of_function(f"pkg://embedrl_verl.rewards.functions.{name}")


@pytest.mark.parametrize("name", NEEDS)
def test_every_function_passes_with_what_it_needs(name):
    check_reward_function(ready(name), judge=True, raw=True)


@pytest.mark.parametrize(
    ("name", "present", "message"),
    [
        ("paper", {"raw": True}, "needs a judge"),
        ("public_code", {}, "needs a judge"),
        ("gain", {"judge": True}, "set embedrl.reward.raw_embeddings=True"),
        ("gain", {}, "set embedrl.reward.raw_embeddings=True"),
    ],
)
def test_a_run_without_judge_or_raw_embeddings_is_told_so(name, present, message):
    with pytest.raises(ConfigError, match=message):
        check_reward_function(ready(name), **present)


def test_the_users_file_is_tried_with_its_arguments(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def compute_score(batch, *, weight=1):\n    return {'score': [weight / 0.5] * len(batch)}\n")
    check_reward_function(of_function(str(path), weight=2))
    with pytest.raises(ConfigError, match="reward_kwargs has no key wieght; its keys are weight"):
        check_reward_function(of_function(str(path), wieght=2))
    with pytest.raises(ConfigError, match="mine.py:compute_score failed in line 2: TypeError"):
        check_reward_function(of_function(str(path), weight="much"))
    path.write_text("async def compute_score(batch):\n    return {'score': [0.0]}\n")
    with pytest.raises(ConfigError, match=r"part 'score' must have one value per row, shape \(8,\); got \(1,\)"):
        check_reward_function(of_function(str(path)))
    path.write_text("def compute_score(batch)\n")
    with pytest.raises(ConfigError, match="mine.py cannot be imported: SyntaxError in line 1"):
        check_reward_function(of_function(str(path)))
    with pytest.raises(ConfigError, match="there is no reward function file"):
        check_reward_function(of_function(str(tmp_path / "gone.py")))


def test_the_probe_has_what_a_real_batch_has():
    plain, full = probe_batch(), probe_batch(judge=True, raw=True)
    assert plain.judge is None and plain.raw_similarity is None
    assert plain.lengths is not None and plain.lengths.unique().numel() > 1
    assert full.process().isnan().tolist() == [True] + [False] * 7
    for side in ("query", "target"):  # the rollouts of a prompt share their raw embedding
        way = full.direction(side, raw=True)
        for pair in (0, 1):
            rows = way.similarity[way.row_pair == pair]
            assert rows.equal(rows[:1].expand_as(rows)) and not rows.isnan().any()
    assert full.format().equal(torch.ones(8))
