# SPDX-License-Identifier: Apache-2.0
"""What is logged of a step: means over known rows by side, and counts of what is unknown."""

import math

import pytest
import torch

from embedrl_verl.rewards import batch_metrics

NAN = math.nan


def test_parts_are_averaged_over_known_rows_by_side(make_batch):
    batch = make_batch(2, 1, rows=torch.arange(4))  # query rows 0 1, target rows 2 3
    parts = {"score": torch.tensor([1.0, NAN, 0.5, 0.0]), "format": torch.tensor([1.0, 0.0, 1.0, 1.0])}
    got = batch_metrics(batch, parts, evidence=torch.tensor([3, 1, 0, 0]))
    assert got["embedrl/reward/query"] == 1.0
    assert got["embedrl/reward/target"] == 0.25
    assert got["embedrl/reward/mean"] == 0.5
    assert got["embedrl/unknown/reward"] == 1.0
    assert (got["embedrl/format/query"], got["embedrl/unknown/format"]) == (0.5, 0.0)
    assert (got["embedrl/evidence/query"], got["embedrl/evidence/target"]) == (2.0, 0.0)
    assert (got["embedrl/rows"], got["embedrl/failed_rows"], got["embedrl/rows_without_partner"]) == (4.0, 0.0, 0.0)
    assert all(type(value) is float for value in got.values())


def test_failures_missing_partners_and_masks_are_counted(make_batch):
    valid = torch.tensor([True, True, False, True])
    batch = make_batch(2, 1, rows=torch.arange(4), content=torch.zeros(4), valid=valid)
    got = batch_metrics(batch, {"score": torch.full((4,), NAN)})
    assert got["embedrl/failed_rows"] == 1.0
    assert got["embedrl/rows_without_partner"] == 1.0  # query 0 lost its only target, row 2
    assert got["embedrl/unknown/reward"] == 4.0
    assert not any(name.startswith("embedrl/reward/") for name in got)
    assert got["embedrl/false_negatives/query"] == 0.5  # query 0 masks target row 3; query 1 has no valid other
    assert got["embedrl/false_negatives/target"] == 1.0
    assert "embedrl/evidence/mean" not in got


def test_hit_and_form_are_logged_for_any_reward_function(make_batch):
    batch = make_batch(noise=2.0)
    got = batch_metrics(batch, {})
    assert got["embedrl/hit@1/mean"] == pytest.approx(float(batch.retrieval().hit.mean()))
    well_formed = torch.tensor([tcot.is_well_formed for tcot in batch.tcots])
    assert got["embedrl/well_formed/query"] == pytest.approx(float(well_formed[batch.side == 0].float().mean()))


def test_a_part_of_another_shape_is_refused(make_batch):
    with pytest.raises(ValueError, match=r"part 'format' must have shape \(40,\); got \(3,\)"):
        batch_metrics(make_batch(), {"format": torch.zeros(3)})
