# SPDX-License-Identifier: Apache-2.0
"""The reward stage counts failures and never turns one into a number."""

import pytest
import torch

from embedrl_verl.errors import EmbedderError
from embedrl_verl.rewards import RewardBatch
from embedrl_verl.tcot import parse_tcot
from embedrl_verl.trainer.batch_reward import Row, score_rows

WELL_FORMED = '<thinking>It is {"text_keywords": ["a"]}.</thinking><rethink>Yes.</rethink><answer>a</answer>'


def _rows(pairs=2, rollouts=2, failures=()):
    rows = []
    for pair in range(pairs):
        for side in (0, 1):
            for session in range(rollouts):
                key = f"uid{pair}{side}_{session}_0"
                failure = "image missing" if key in failures else None
                tcot = parse_tcot(WELL_FORMED)
                rows.append(Row(key, f"p{pair}", side, session, pair, "text_keywords", "s", tcot, 0, failure, 5))
    return rows


class _FakeEmbedder:
    """Vectors by pair; rows in `bad` fail."""

    def __init__(self, bad=()):
        self.bad = bad
        self.asked = []

    def __call__(self, keys, partition_id):
        assert partition_id == "embed"
        self.asked = list(keys)
        vectors = torch.stack([torch.eye(3)[int(key[3])] for key in keys])
        failed = {i: "not finite" for i, key in enumerate(keys) if key in self.bad}
        vectors[list(failed)] = float("nan")
        return vectors, failed


def _margin(batch: RewardBatch):
    """Mean similarity to all valid rows of the other side; NaN for a row without embedding."""
    score = torch.full((batch.valid.numel(),), float("nan"))
    for rows, similarity in ((batch.query_rows, batch.similarity), (batch.target_rows, batch.similarity.T)):
        score[rows] = similarity.nanmean(dim=1)
    score[~batch.valid] = float("nan")
    return {"score": score}


def test_a_failed_row_is_unknown_and_is_not_embedded():
    rows = _rows(failures=("uid00_1_0",))
    embedder = _FakeEmbedder()
    scored = score_rows(rows, embedder, _margin, max_failed_share=0.5, expected_rows=len(rows))
    assert "uid00_1_0" not in embedder.asked
    unknown = [row.key for row, value in zip(rows, scored.parts["score"], strict=True) if torch.isnan(value)]
    assert unknown == ["uid00_1_0"]
    assert scored.failures == {1: "image missing"}
    assert scored.describe(1)["reward"] == {"score": None}
    assert scored.describe(0)["side"] == "query"


def test_rows_that_fail_in_the_embedder_are_unknown_too():
    rows = _rows()
    scored = score_rows(rows, _FakeEmbedder(bad=("uid11_0_0",)), _margin, max_failed_share=0.5, expected_rows=8)
    assert list(scored.failures.values()) == ["not finite"]
    assert int(torch.isnan(scored.parts["score"]).sum()) == 1


def test_too_many_failures_stop_the_step_and_name_their_causes():
    rows = _rows(failures=("uid00_1_0", "uid00_0_0"))
    with pytest.raises(EmbedderError) as caught:
        score_rows(rows, _FakeEmbedder(), _margin, max_failed_share=0.2, expected_rows=9)
    message = str(caught.value)
    assert "3 of 9 rows" in message
    assert "2 x image missing" in message
    assert "1 x the rollout failed" in message
    assert "max_failed_share=0.2" in message
