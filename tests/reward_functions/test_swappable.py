# SPDX-License-Identifier: Apache-2.0
"""What holds for every ready-made reward function: it can be swapped for any other without a thought."""

from pathlib import Path

import pytest
import torch

import embedrl_verl.rewards.functions as functions
from embedrl_verl.rewards import partly_known
from embedrl_verl.rewards.functions import NEEDS
from embedrl_verl.rewards.functions.length_shaped import BASES
from embedrl_verl.rewards.score import call_reward_function

NAMES = tuple(NEEDS)
REWARD = Path(__file__).resolve().parents[2] / "reward"
VARIANTS = [
    *((name, {}) for name in NAMES),
    ("gain", {"measure": "soft", "positives": "best", "loss_weight": 0.5, "alpha": 0.1}),
    ("outcome_only", {"accuracy": "all", "temperature": 0.1}),
    *(("length_shaped", {"base": base}) for base in BASES),
]


def test_the_table_of_functions_is_complete():
    assert REWARD.samefile(Path(functions.__file__).parent), "reward/ is a link to the package's folder"
    assert {path.stem for path in REWARD.glob("*.py")} - {"__init__"} == set(NAMES)
    assert set(BASES) == set(NAMES) - {"length_shaped", "constant"}


@pytest.mark.parametrize("name", NAMES)
def test_every_function_is_one_short_file_with_a_docstring(name):
    lines = (REWARD / f"{name}.py").read_text().splitlines()
    assert len(lines) <= 80 and lines[1].startswith('"""R = ')


@pytest.mark.parametrize(("name", "kwargs"), VARIANTS)
def test_permuting_the_rows_permutes_the_rewards_bit_for_bit(name, kwargs, load, make_rows):
    rows, function = make_rows(), load(name)
    base = function(rows.batch(), **kwargs)
    assert base["score"].dtype == torch.float32
    generator = torch.Generator().manual_seed(1)
    for _ in range(25):
        order = torch.randperm(len(base["score"]), generator=generator)
        got = function(rows.batch(order), **kwargs)
        assert got.keys() == base.keys()
        for part in base:
            assert got[part].nan_to_num(9).equal(base[part][order].nan_to_num(9)), part


@pytest.mark.parametrize(("name", "kwargs"), VARIANTS)
def test_swapping_the_sides_changes_no_row(name, kwargs, load, make_rows):
    rows = make_rows()

    async def same_judge(batch):
        number = batch.pair * 7 + batch.rollout * 3 + 1 - batch.side
        return (number % 2).float().masked_fill(number % 5 == 0, torch.nan)

    one = load(name)(rows.batch(), **kwargs)
    other = load(name)(rows.batch(side=1 - rows.arguments["side"], judge=same_judge), **kwargs)
    for part in one:
        assert one[part].nan_to_num(9).equal(other[part].nan_to_num(9)), part


@pytest.mark.parametrize("name", [name for name in NAMES if name != "constant"])
def test_exactly_the_rows_without_embedding_or_the_judges_answer_are_unknown(name, load, make_rows):
    rows = make_rows(failed=0.0)
    valid = torch.ones(len(rows.arguments["side"]), dtype=torch.bool).index_fill(0, torch.tensor([3, 30]), False)
    batch = rows.batch(valid=valid)
    parts = load(name)(batch)
    score, unknown = parts["score"], ~valid
    if "process" in parts:
        unknown = unknown | partly_known(parts["process"], batch.groups())
    assert score.isnan().equal(unknown)
    changed = rows.arguments["embeddings"].index_fill(0, torch.tensor([3, 30]), torch.nan)
    again = load(name)(rows.batch(embeddings=changed, valid=None))["score"]
    assert again.nan_to_num(9).equal(score.nan_to_num(9))


@pytest.mark.parametrize("name", NAMES)
def test_the_contract_accepts_every_function_on_any_batch(name, load, make_rows):
    for rows in (make_rows(), make_rows(pairs=1), make_rows(rollouts=1), make_rows(failed=1.0)):
        parts = call_reward_function(load(name), rows.batch(), name)
        assert all(value.shape == (len(rows.arguments["side"]),) for value in parts.values())
