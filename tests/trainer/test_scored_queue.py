# SPDX-License-Identifier: Apache-2.0
"""What is unknown neither trains nor moves the others: scores through the real TransferQueue and verl's own GRPO."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import processes

NAN = float("nan")
LENGTHS = [3, 5, 1, 4, 2, 6, 3, 4, 5, 2, 3, 4]
CASES = {
    "all known": [0.1, 0.4, 0.2, 0.9, 0.3, 0.5, 0.2, 0.8, 0.7, 0.6, 0.1, 0.0],
    "one unknown": [0.1, NAN, 0.2, 0.9, 0.3, 0.5, 0.2, 0.8, 0.7, 0.6, 0.1, 0.0],
    "two of four": [0.1, NAN, 0.2, NAN, 0.3, 0.5, 0.2, 0.8, 0.7, 0.6, 0.1, NAN],
    "one left": [NAN, NAN, 0.2, NAN, 0.3, 0.5, 0.2, 0.8, 0.7, 0.6, 0.1, 0.0],
    "none left": [NAN, NAN, NAN, NAN, 0.3, 0.5, 0.2, 0.8, 0.7, 0.6, 0.1, 0.0],
}
"""Scores of three prompts of four rollouts."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("queue")
    scores = {case: [None if math.isnan(one) else one for one in values] for case, values in CASES.items()}
    (folder / "cases.json").write_text(json.dumps({"lengths": LENGTHS, "scores": scores}))
    script = [str(Path(__file__).with_name("scored_queue.py")), str(folder / "cases.json"), str(folder / "out.pt")]
    code, text = processes.run(script, folder / "log.txt", timeout_s=300)
    assert code == 0, text[-4000:]
    return torch.load(folder / "out.pt", weights_only=True)


def groups_of(case: str) -> list[list[int]]:
    """Known rows of each prompt."""
    return [[i for i in range(4 * k, 4 * k + 4) if not math.isnan(CASES[case][i])] for k in range(3)]


def trained(case: str) -> set[int]:
    """Rows with somebody to be compared with."""
    return {i for group in groups_of(case) if len(group) > 1 for i in group}


@pytest.mark.parametrize("case", CASES)
def test_the_advantage_of_a_known_row_is_that_of_its_group_without_the_unknown_ones(written, case):
    for group in groups_of(case):
        if len(group) < 2:
            continue
        scores = torch.tensor([CASES[case][i] for i in group])
        right = (scores - scores.mean()) / (scores.std() + 1e-6)
        for i, value in zip(group, right, strict=True):
            torch.testing.assert_close(written[case]["advantages"][i], value.expand(LENGTHS[i]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_exactly_the_other_rows_are_masked_and_have_no_advantage(written, case):
    found = written[case]
    for i in range(12):
        wanted = torch.full((LENGTHS[i],), int(i in trained(case)))
        assert found["response_mask"][i].equal(wanted) and found["loss_mask"][i].equal(wanted), i
        if i not in trained(case):
            assert not found["advantages"][i].any(), i
    assert found["metrics"]["embedrl/rows_without_advantage"] == 12 - len(trained(case))


@pytest.mark.parametrize("case", CASES)
def test_the_reward_is_on_the_last_token_and_an_unknown_one_stands_at_its_groups_mean(written, case):
    everywhere = [value for value in CASES[case] if not math.isnan(value)]
    for i, row in enumerate(written[case]["rm_scores"]):
        assert row.shape == (LENGTHS[i],) and not row[:-1].any()
        known = [CASES[case][j] for j in groups_of(case)[i // 4]] or everywhere
        wanted = sum(known) / len(known) if math.isnan(CASES[case][i]) else CASES[case][i]
        assert row[-1].item() == pytest.approx(wanted)


def test_rows_that_train_keep_their_prompts_group(written):
    for case in CASES:
        for i, uid in enumerate(written[case]["uid"]):
            assert uid == (f"{case}{i // 4}" if i in trained(case) else f"{case}{i // 4}_{i % 4}_0")
