# SPDX-License-Identifier: Apache-2.0
"""RewardBatch links rows by pair and side, never by position, and keeps the caller's order."""

import asyncio
import math
from dataclasses import replace

import pytest
import torch

from embedrl_verl.errors import ConfigError
from embedrl_verl.rewards import RewardBatch, batch_metrics, outcome_reward
from embedrl_verl.rewards import batch as module
from embedrl_verl.rewards.retrieval import retrieval
from embedrl_verl.tcot import format_reward, parse_tcot
from tests.rewards import plain

NAN = math.nan


def _build(batch, order, embeddings, **change):
    """The same rows in another order."""
    arguments = {
        "side": batch.side[order],
        "pair": batch.pair[order],
        "rollout": batch.rollout[order],
        "content": batch.content[order],
        "tcots": [batch.tcots[i] for i in order.tolist()],
        "required": [batch.required[i] for i in order.tolist()],
        "embeddings": embeddings[order],
        "valid": batch.valid[order],
    }
    return RewardBatch.build(**{**arguments, **change})


def _embeddings(rows, dim=24, seed=0):
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def _everything(batch):
    found = batch.retrieval()
    return [batch.format(), *found.reward, found.hit, found.false_negatives, *batch.ranks(by_pair=True)]


@pytest.mark.parametrize("rollouts", [1, 2, 4, 8])
def test_error_1_200_permutations_of_rows_permute_every_result_bit_for_bit(make_batch, rollouts):
    """Rewards went to the wrong rows for more than one rollout: here order carries no meaning at all."""
    embeddings = _embeddings(2 * 6 * rollouts)
    valid = torch.rand(len(embeddings), generator=torch.Generator().manual_seed(1)) < 0.9
    base = make_batch(6, rollouts, embeddings=embeddings, valid=valid)
    wanted = _everything(base)
    generator = torch.Generator().manual_seed(2)
    for _ in range(200 if rollouts == 4 else 20):
        order = torch.randperm(len(embeddings), generator=generator)
        for got, expected in zip(_everything(_build(base, order, embeddings)), wanted, strict=True):
            assert got.nan_to_num(9).equal(expected[order].nan_to_num(9))


def test_error_7_padding_the_batch_with_other_pairs_rows_elsewhere_keeps_the_similarities(make_batch):
    """The same rows give the same similarities in a batch of any size, so workers and shards cannot matter."""
    embeddings = _embeddings(40)
    whole = make_batch(5, 4, embeddings=embeddings)
    kept = (whole.pair < 3).nonzero()[:, 0]
    part = _build(whole, kept, embeddings)
    inner = whole.similarity[whole.pair[whole.query_rows] < 3][:, whole.pair[whole.target_rows] < 3]
    assert part.similarity.equal(inner)


def test_swapping_the_sides_transposes(make_batch):
    embeddings = _embeddings(40)
    batch = make_batch(5, 4, embeddings=embeddings)
    swapped = _build(batch, torch.arange(40), embeddings, side=1 - batch.side)
    assert swapped.similarity.equal(batch.similarity.T)
    assert swapped.query_rows.equal(batch.target_rows)
    for one, other in zip(_everything(swapped), _everything(batch), strict=True):
        assert one.equal(other)


def test_both_directions_are_the_double_loop(make_batch):
    embeddings = _embeddings(48)
    valid = torch.rand(48, generator=torch.Generator().manual_seed(1)) < 0.8
    content = torch.tensor([[0, 0], [9, 0], [1, 1], [1, 2], [2, 3], [2, 3]])
    batch = make_batch(6, 4, embeddings=embeddings, valid=valid)
    batch = _build(batch, torch.arange(48), embeddings, content=content[batch.pair])
    got = batch.retrieval().reward
    for number, side in enumerate(("query", "target")):
        way = batch.direction(side)
        assert (batch.side[way.rows] == number).all() and (batch.side[way.cols] == 1 - number).all()
        similarity = (embeddings[way.rows].double() @ embeddings[way.cols].double().T).float()
        wanted = plain.outcome(replace(way, similarity=similarity))
        torch.testing.assert_close(torch.stack(got)[:, way.rows].double(), wanted, rtol=0, atol=3e-7, equal_nan=True)
        again = outcome_reward(way.similarity, way.row_pair, way.col_pair, **plain.masks(way))
        assert again.outcome.nan_to_num(9).equal(got.outcome[way.rows].nan_to_num(9))


def test_equal_arguments_are_computed_once_and_nobody_can_change_anothers_result(make_batch, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "retrieval", lambda way, **k: calls.append(k) or retrieval(way, **k))
    batch = make_batch()
    first = batch.retrieval()
    wanted = [part.clone() for part in (*first.reward, *first[1:])]
    for part in (*first.reward, *first[1:]):
        part.fill_(7)
    batch_metrics(batch, {"score": batch.retrieval(temperature=0.5, accuracy="share").reward.outcome})
    assert len(calls) == 2  # one a direction
    found = batch.retrieval()
    assert all(a.equal(b) for a, b in zip((*found.reward, *found[1:]), wanted, strict=True))
    other = batch.retrieval(temperature=0.1).reward.margin
    assert len(calls) == 4 and not other.equal(found.reward.margin)


def test_hit_is_the_best_positive_above_every_negative(make_batch):
    batch = make_batch(noise=2.0)
    hit = batch.retrieval().hit
    for side in ("query", "target"):
        way = batch.direction(side)
        own = way.row_pair[:, None] == way.col_pair
        best = way.similarity.masked_fill(~own, -9).amax(dim=1) > way.similarity.masked_fill(own, -9).amax(dim=1)
        assert hit[way.rows].equal(best.float())
    assert 0 < hit.mean() < 1


def test_a_tie_with_a_negative_is_no_hit(make_batch):
    same = torch.eye(24)[:1].repeat(40, 1)
    assert make_batch(embeddings=same).retrieval().hit.tolist() == [0.0] * 40


def test_a_row_without_embedding_is_nan_everywhere(make_batch):
    embeddings = _embeddings(40)
    embeddings[7] = NAN
    batch = make_batch(5, 4, embeddings=embeddings)
    assert batch.valid.tolist() == [i != 7 for i in range(40)]
    row = (batch.query_rows == 7) if batch.side[7] == 0 else (batch.target_rows == 7)
    similarity = batch.similarity if batch.side[7] == 0 else batch.similarity.T
    assert similarity[row].isnan().all() and not similarity[~row].isnan().any()
    assert batch.retrieval().reward.outcome.isnan().nonzero().tolist() == [[7]]


def test_a_pair_whose_other_side_is_missing_is_unknown_and_the_rest_goes_on(make_batch):
    whole = make_batch(4, 3)
    embeddings = _embeddings(24)
    kept = (~((whole.pair == 2) & (whole.side == 1))).nonzero()[:, 0]
    batch = _build(whole, kept, embeddings)
    outcome = batch.retrieval().reward.outcome
    assert outcome.isnan().equal(batch.pair == 2)
    assert batch.similarity.shape == (12, 9)


def test_format_is_that_of_the_rows_evidence_key(make_batch):
    batch = make_batch()
    batch = _build(batch, torch.arange(40), _embeddings(40), required=["bbox_2d"] + ["text_keywords"] * 39)
    assert batch.format().tolist() == [format_reward(t, r) for t, r in zip(batch.tcots, batch.required, strict=True)]
    assert batch.format()[0] == 0 and 0 < batch.format().sum() < 40


def test_a_group_is_one_side_of_one_pair(make_batch):
    batch = make_batch(5, 4)
    batch = _build(batch, torch.arange(40), _embeddings(40), pair=batch.pair * 2 - 3)
    same = (batch.pair[:, None] == batch.pair) & (batch.side[:, None] == batch.side)
    assert (batch.groups()[:, None] == batch.groups()).equal(same)


def _judge(values):
    async def judge(batch):
        await asyncio.sleep(0)
        return values

    return judge


def test_the_judge_is_awaited(make_batch):
    scores = torch.tensor([1.0, NAN] * 20)
    batch = make_batch(judge=_judge(scores))
    assert batch.process().nan_to_num(9).equal(scores.nan_to_num(9))


def test_a_judge_of_another_shape_and_no_judge_are_refused(make_batch):
    with pytest.raises(ValueError, match=r"shape \(40,\); got \(3,\)"):
        make_batch(judge=_judge(torch.zeros(3))).process()
    with pytest.raises(ConfigError, match="needs a judge, and there is none"):
        make_batch().process()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": torch.zeros(40, 3)}, r"length 1; row 0 has length 0.*instead of a zero vector"),
        ({"embeddings": torch.zeros(39, 3)}, r"embeddings must be \(N, D\) with N = 40 as side has; got \(39, 3\)"),
        ({"embeddings": torch.zeros(40)}, r"embeddings must be \(N, D\) .*; got \(40,\)"),
        ({"pair": torch.zeros(3)}, r"pair must be \(N,\) with N = 40 as side has; got \(3,\)"),
        ({"side": torch.full((40,), 2)}, "side must be 0 .query. or 1 .target.; row 0 has 2"),
        ({"rollout": torch.zeros(40)}, r"each rollout may occur once; pair 0, query, rollout 0 occurs 4 times"),
        ({"content": torch.zeros(3, 2)}, r"content must be \(N,\) or \(N, K\) with N = 40 .* got \(3, 2\)"),
        ({"content": torch.arange(80).view(40, 2)}, "the same content ids; pair 0 has several"),
        ({"content": torch.arange(40)}, "the same content ids; pair 0 has several"),
        ({"tcots": [parse_tcot("")]}, "tcots must have one entry for each of 40 rows; got 1"),
        ({"required": []}, "required must have one entry for each of 40 rows; got 0"),
        ({"valid": torch.ones(3, dtype=torch.bool)}, r"valid must be \(N,\) with N = 40 .* got \(3,\)"),
    ],
)
def test_wrong_input_is_refused(make_batch, change, message):
    with pytest.raises(ValueError, match=message):
        make_batch(**change)


def test_an_unknown_side_is_refused(make_batch):
    with pytest.raises(ValueError, match="query or target; got 'both'"):
        make_batch().direction("both")


@pytest.mark.parametrize("missing", [3, 6])
def test_the_raw_direction_knows_what_has_a_raw_embedding(make_batch, missing):
    """Whatever became of the row's T-CoT: a row is ranked by its raw input alone."""
    raw = _embeddings(40, seed=5)
    raw[missing] = NAN
    valid = torch.arange(40) != 7
    batch = make_batch(5, 4, embeddings=_embeddings(40), valid=valid, raw_embeddings=raw)
    assert batch.side[[3, 6]].tolist() == [0, 1]
    assert batch.raw_valid().tolist() == [i != missing for i in range(40)]
    for side in ("query", "target"):
        way, plain = batch.direction(side, raw=True), batch.direction(side)
        assert way.row_valid.equal(way.rows != missing) and way.col_valid.equal(way.cols != missing)
        wanted = (raw[way.rows].double() @ raw[way.cols].double().T).float()
        torch.testing.assert_close(way.similarity, wanted, rtol=0, atol=1e-7, equal_nan=True)
        assert way.row_pair.equal(plain.row_pair) and way.col_content.equal(plain.col_content)
    assert batch.ranks(raw=True).rank.isnan().nonzero().tolist() == [[missing]]
    assert batch.ranks().rank.isnan().nonzero().tolist() == [[7]]
    both = batch.ranks(raw=True, among=valid).rank
    assert both.isnan().nonzero().flatten().tolist() == [missing, 7]
    part = _build(batch, valid.nonzero()[:, 0], _embeddings(40), raw_embeddings=raw[valid])
    assert both[valid].nan_to_num(9).equal(part.ranks(raw=True).rank.nan_to_num(9))


def test_without_raw_embeddings_the_raw_direction_says_what_to_set(make_batch):
    for call in (lambda b: b.direction("query", raw=True), lambda b: b.ranks(raw=True), lambda b: b.raw_valid()):
        with pytest.raises(ConfigError, match="set embedrl.reward.raw_embeddings=True"):
            call(make_batch())
