# SPDX-License-Identifier: Apache-2.0
"""The reward functions in reward/: loaded by path as verl does, equal to the formulas, clear about a missing judge."""

import importlib.util
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from embedrl_verl.errors import ConfigError
from embedrl_verl.rewards import RewardBatch
from embedrl_verl.rewards.score import call_reward_function
from embedrl_verl.tcot import parse_tcot

REWARD = Path(__file__).resolve().parents[2] / "reward"
NAMES = ("paper", "no_judge", "public_code", "constant")
NAN = math.nan
WELL_FORMED = '<thinking>It says {"text_keywords": ["a"]}.</thinking><rethink>Yes.</rethink><answer>a</answer>'


def _load(name):
    """As verl loads a file: under a made-up name that is not in sys.modules."""
    spec = importlib.util.spec_from_file_location(f"custom_module_{name}", REWARD / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.compute_score


def _picks(values):
    async def judge(batch):
        return torch.tensor(values)

    return judge


def _batch(picks=None, valid=None, rollouts=2, far=()):
    """Two pairs; rows q0.. q1.. t0.. t1..; every other row is well formed; rows in `far` point away from their pair."""
    side, pair, rollout = torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(rollouts)).T
    vectors = torch.eye(8)[pair] + 0.3 * torch.rand(len(side), 8, generator=torch.Generator().manual_seed(0))
    vectors[list(far)] *= -1
    return RewardBatch.build(
        side=side,
        pair=pair,
        rollout=rollout,
        content=pair,
        tcots=[parse_tcot(WELL_FORMED if i % 2 else "") for i in range(len(side))],
        required=["text_keywords"] * len(side),
        embeddings=torch.nn.functional.normalize(vectors, dim=1),
        valid=valid,
        judge=None if picks is None else _picks(picks),
    )


PICKS = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def _score(name, *, picks=None, **kwargs):
    batch_kwargs = {k: kwargs.pop(k) for k in ("valid", "far") if k in kwargs}
    return _load(name)(_batch(picks, **batch_kwargs), **kwargs)


def test_paper_is_equation_5():
    parts = _score("paper", picks=PICKS)
    wanted = 0.05 * parts["format"] + 0.8 * torch.tensor(PICKS) + 0.2 * parts["accuracy"] * parts["margin"]
    torch.testing.assert_close(parts["score"], wanted)
    assert parts["process"].tolist() == PICKS
    assert parts["format"].tolist() == [0.0, 1.0] * 4


def test_no_judge_is_format_and_outcome():
    parts = _score("no_judge")
    torch.testing.assert_close(parts["score"], 0.05 * parts["format"] + 0.8 * parts["outcome"])
    assert "process" not in parts
    assert parts["outcome"].min() > 0


def test_public_code_is_its_formula():
    parts = _score("public_code", picks=PICKS)
    acc, margin = parts["accuracy"], parts["margin"]
    wanted = 0.05 * parts["format"] + 0.8 * 0.5 * acc * margin + 0.2 * torch.tensor(PICKS) * margin
    assert margin.min() > 0
    torch.testing.assert_close(parts["score"], wanted)


@pytest.mark.parametrize("name", ["paper", "public_code"])
def test_error_5_a_right_pick_is_never_a_penalty(name):
    """In the public code a negative margin turned the judge's correct pick into a penalty."""
    right = _score(name, picks=[1.0] * 8, far=[0])
    wrong = _score(name, picks=[0.0] * 8, far=[0])
    assert right["margin"][0] < 0
    assert (right["score"] >= wrong["score"]).all()


@pytest.mark.parametrize("name", ["paper", "public_code"])
def test_a_positive_beta_without_a_judge_says_how_to_go_on(name):
    with pytest.raises(ConfigError, match=r"needs a judge.* Use the reward no_judge, set .*beta=0") as caught:
        _score(name)
    assert caught.value.exit_code == 2


def test_beta_zero_needs_no_judge():
    parts = _score("paper", beta=0)
    torch.testing.assert_close(parts["score"], 0.05 * parts["format"] + 0.2 * parts["outcome"])


@pytest.mark.parametrize("name", ["paper", "public_code"])
def test_a_row_without_the_judges_answer_is_unknown_beside_rows_that_have_one(name):
    """Row 1 shares its group with row 0. The others' rewards are what they would be with any answer to row 1."""
    silent = _score(name, picks=[1.0, NAN, *PICKS[2:]])
    only_it = [False, True] + [False] * 6
    assert silent["process"].isnan().tolist() == silent["score"].isnan().tolist() == only_it
    hit = _score(name, picks=[1.0, 1.0, *PICKS[2:]])
    assert silent["score"].nan_to_num(nan=float(hit["score"][1])).equal(hit["score"])


def test_a_group_without_any_answer_of_the_judge_is_compared_by_the_other_terms():
    gone = _score("paper", picks=[NAN, NAN, *PICKS[2:]])
    torch.testing.assert_close(gone["score"][:2], (0.05 * gone["format"] + 0.2 * gone["outcome"])[:2])
    gone = _score("paper", picks=[NAN] * 8)
    torch.testing.assert_close(gone["score"], 0.05 * gone["format"] + 0.2 * gone["outcome"])


def test_a_row_without_embedding_is_unknown_and_a_lost_partner_leaves_the_format():
    valid = torch.tensor([True, False, True, True, True, True, False, False])
    parts = _score("no_judge", valid=valid)
    assert parts["score"].isnan().equal(~valid)
    assert parts["outcome"][2:4].isnan().all()  # both targets of pair 1 failed
    torch.testing.assert_close(parts["score"][2:4], 0.05 * parts["format"][2:4])


def test_constant_has_no_signal():
    assert _score("constant")["score"].tolist() == [0.0] * 8
    assert _score("constant", value=0.5)["score"].tolist() == [0.5] * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bta": 1}, "reward_kwargs has no key bta; its keys are alpha, beta, gamma, accuracy, temperature"),
        ({"alpha": -1}, "alpha must be a finite number of at least 0; got -1"),
        ({"gamma": "much"}, "gamma must be a finite number of at least 0; got 'much'"),
        ({"temperature": 0}, "temperature must be positive and finite; got 0"),
        ({"accuracy": "best"}, "accuracy must be one of share, all; got 'best'"),
        ({"alpha": 0, "gamma": 0}, "at least one of alpha, beta and gamma must be positive"),
    ],
)
def test_reward_kwargs_are_checked(change, message):
    with pytest.raises(ConfigError, match=message):
        call_reward_function(partial(_load("no_judge"), **change), _batch(), "no_judge.py:compute_score")


def test_reward_kwargs_reach_the_outcome():
    assert not _score("no_judge", temperature=0.01)["margin"].equal(_score("no_judge")["margin"])
    far = _score("no_judge", far=[4])["accuracy"]
    assert far[0] == 0.5
    assert _score("no_judge", far=[4], accuracy="all")["accuracy"][0] == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_file_and_package_name_the_same_function(name):
    """Both ways that verl's reward.custom_reward_function.path can name it."""
    packaged = importlib.import_module(f"embedrl_verl.rewards.functions.{name}")
    assert Path(packaged.__file__).samefile(REWARD / f"{name}.py")
