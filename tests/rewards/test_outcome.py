# SPDX-License-Identifier: Apache-2.0
"""outcome_reward is the double loop of the method, for any order, grouping, mask and tie."""

import math

import pytest
import torch

from embedrl_verl.data.identity import shares_content
from embedrl_verl.rewards import candidates, outcome_reward
from embedrl_verl.rewards.outcome import retrieval

NAN = math.nan


def _random(seed, row_sizes, col_sizes, ties=False, dtype=torch.float32):
    """Similarity of pairs with so many rows and columns each, in shuffled order, with failures and shared contents."""
    generator = torch.Generator().manual_seed(seed)
    row_pair = torch.arange(len(row_sizes)).repeat_interleave(torch.tensor(row_sizes))
    col_pair = torch.arange(len(col_sizes)).repeat_interleave(torch.tensor(col_sizes))
    row_pair = row_pair[torch.randperm(len(row_pair), generator=generator)] * 7 - 3
    col_pair = col_pair[torch.randperm(len(col_pair), generator=generator)] * 7 - 3
    similarity = torch.rand(len(row_pair), len(col_pair), generator=generator, dtype=dtype) * 2 - 1
    lead = torch.rand(len(row_pair), 1, generator=generator, dtype=dtype) * 2  # some rows retrieve all of their pair
    similarity += lead * (row_pair[:, None] == col_pair)
    if ties:
        similarity = (similarity * 3).round() / 3
    masks = {
        "col_content": torch.randint(0, max(3, len(col_sizes)), (40, 2), generator=generator)[(col_pair + 3) // 7],
        "col_valid": torch.rand(len(col_pair), generator=generator) < 0.85,
        "row_valid": torch.rand(len(row_pair), generator=generator) < 0.85,
    }
    return similarity, row_pair, col_pair, masks


@pytest.fixture
def assert_equal_to_the_loop(plain_outcome):
    def check(similarity, row_pair, col_pair, masks, tolerance=2e-7, **choices):
        got = torch.stack(outcome_reward(similarity, row_pair, col_pair, **masks, **choices))
        wanted = plain_outcome(similarity, row_pair, col_pair, **masks, **choices)
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=tolerance, equal_nan=True)
        return got

    return check


@pytest.mark.parametrize("rollouts", [1, 2, 4, 8])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("accuracy", ["share", "all"])
def test_equal_to_the_double_loop(rollouts, ties, accuracy, assert_equal_to_the_loop):
    similarity, row_pair, col_pair, masks = _random(rollouts, [rollouts] * 9, [rollouts] * 9, ties)
    for chosen in ({}, {"col_content": masks["col_content"]}, masks):
        got = assert_equal_to_the_loop(similarity, row_pair, col_pair, chosen, accuracy=accuracy)
        assert got[0].nan_to_num().unique().numel() > 1  # not vacuous: some rows hit, some miss
        assert_equal_to_the_loop(similarity.T, col_pair, row_pair, {}, accuracy=accuracy)


@pytest.mark.parametrize("seed", range(20))
def test_uneven_groups_and_missing_partners(seed, assert_equal_to_the_loop):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 7, (2, 8), generator=generator).tolist()
    similarity, row_pair, col_pair, masks = _random(seed, *sizes, ties=seed % 2 == 0)
    assert_equal_to_the_loop(similarity, row_pair, col_pair, masks)
    assert_equal_to_the_loop(similarity, row_pair, col_pair, {}, accuracy="all", temperature=0.02)


def test_several_blocks_are_one_matrix(monkeypatch):
    similarity, row_pair, col_pair, masks = _random(3, [4] * 12, [3] * 12, ties=True)
    whole = outcome_reward(similarity, row_pair, col_pair, **masks)
    monkeypatch.setattr(candidates, "BLOCK_CELLS", 5 * similarity.shape[1])
    for part, block in zip(outcome_reward(similarity, row_pair, col_pair, **masks), whole, strict=True):
        assert part.nan_to_num(9).equal(block.nan_to_num(9))


def test_float64_is_computed_in_float64(assert_equal_to_the_loop):
    similarity, row_pair, col_pair, masks = _random(5, [4] * 6, [4] * 6, dtype=torch.float64)
    got = assert_equal_to_the_loop(similarity, row_pair, col_pair, masks, tolerance=1e-11)
    assert got.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_short_ids_are_read_exactly(dtype):
    similarity, row_pair, col_pair, masks = _random(7, [3] * 6, [2] * 6, dtype=torch.float32)
    similarity = similarity.to(dtype)
    got = outcome_reward(similarity, row_pair.int(), col_pair.to(torch.int16), **masks)
    assert got.outcome.dtype == torch.float32
    for half, single in zip(got, outcome_reward(similarity.float(), row_pair, col_pair, **masks), strict=True):
        assert half.nan_to_num(9).equal(single.nan_to_num(9))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_any_scale_of_the_scores_is_exact(scale, assert_equal_to_the_loop):
    similarity, row_pair, col_pair, _ = _random(6, [2] * 6, [2] * 6, dtype=torch.float64)
    assert_equal_to_the_loop(similarity * scale, row_pair, col_pair, {}, tolerance=1e-11 * scale)


def test_200_permutations_of_rows_and_columns_permute_the_rewards_bit_for_bit():
    similarity, row_pair, col_pair, masks = _random(1, [8] * 24, [8] * 24)
    similarity += 1e-4 * torch.randn(similarity.shape, generator=torch.Generator().manual_seed(0))
    base = outcome_reward(similarity, row_pair, col_pair, **masks)
    generator = torch.Generator().manual_seed(2)
    sums = set()
    for _ in range(200):
        rows = torch.randperm(len(row_pair), generator=generator)
        cols = torch.randperm(len(col_pair), generator=generator)
        shuffled = {name: mask[rows if name == "row_valid" else cols] for name, mask in masks.items()}
        shuffled_similarity = similarity[rows][:, cols]
        got = outcome_reward(shuffled_similarity, row_pair[rows], col_pair[cols], **shuffled)
        for part, expected in zip(got, base, strict=True):
            assert part.nan_to_num(9).equal(expected[rows].nan_to_num(9))
        sums.add(shuffled_similarity.exp().sum(dim=1)[rows.argsort()[0]].item())
    assert len(sums) > 1  # not vacuous: a plain float sum does depend on the order


def test_a_transposed_view_gives_the_bits_of_its_copy():
    similarity, row_pair, col_pair, _ = _random(2, [3] * 9, [5] * 9)
    view = outcome_reward(similarity.T, col_pair, row_pair)
    copy = outcome_reward(similarity.T.contiguous(), col_pair, row_pair)
    assert all(a.nan_to_num(9).equal(b.nan_to_num(9)) for a, b in zip(view, copy, strict=True))


def test_a_tie_counts_against_the_row():
    pair = torch.tensor([0, 1])
    acc, margin, outcome = outcome_reward(torch.tensor([[0.5, 0.5], [0.2, 0.5]]), pair, pair)
    assert acc.tolist() == [0.0, 1.0]
    assert outcome.tolist() == pytest.approx([0.0, 0.3])
    assert margin.tolist() == pytest.approx([0.0, 0.3])


def test_share_counts_the_positives_on_top_and_all_wants_every_one():
    row, col = torch.tensor([0]), torch.tensor([0, 0, 0, 1, 1])
    similarity = torch.tensor([[0.9, 0.8, 0.1, 0.5, 0.4]])
    assert outcome_reward(similarity, row, col).accuracy.tolist() == pytest.approx([2 / 3])
    assert outcome_reward(similarity, row, col, accuracy="all").accuracy.tolist() == [0.0]
    assert outcome_reward(similarity[:, :2], row, col[:2], accuracy="all").accuracy.tolist() == [1.0]


def test_negatives_are_weighted_by_a_softmax_at_half():
    row, col = torch.tensor([0]), torch.tensor([0, 1, 2])
    margin = outcome_reward(torch.tensor([[0.9, 0.4, -0.2]]), row, col).margin
    a, b = math.exp(0.8), math.exp(-0.4)
    assert margin.tolist() == pytest.approx([0.9 - (a * 0.4 - b * 0.2) / (a + b)])


def test_without_negatives_the_margin_is_the_mean_of_the_positives():
    acc, margin, outcome = outcome_reward(torch.tensor([[0.4, 0.2]]), torch.tensor([5]), torch.tensor([5, 5]))
    assert (acc.item(), margin.item(), outcome.item()) == pytest.approx((1.0, 0.3, 0.3))


# Errors of the public code that must not come back (method section 6).


@pytest.mark.parametrize("rollouts", [1, 2, 4, 8])
def test_error_1_rewards_stay_with_their_rows_for_every_number_of_rollouts(rollouts):
    """Rewards were returned q, p, q, p while the batch was q x n, p x n."""
    pair = torch.arange(3).repeat_interleave(rollouts)
    similarity = torch.where(pair[:, None] == pair, 0.9, 0.1)
    similarity[0] = -similarity[0]  # only the first rollout of pair 0 retrieves badly
    outcome = outcome_reward(similarity, pair, pair).outcome
    assert outcome[0] <= 0 < outcome[1:].min()
    order = torch.arange(3 * rollouts).reshape(3, rollouts).T.flatten()  # interleaved: p0 p1 p2 p0 p1 p2 ...
    interleaved = outcome_reward(similarity[order][:, order], pair[order], pair[order]).outcome
    assert interleaved.equal(outcome[order])


def test_error_3_a_failed_row_is_nobodys_candidate_and_unknown_itself():
    """A failed request became a zero vector, scored as real."""
    pair = torch.tensor([0, 0, 1, 1])
    similarity = torch.tensor([[0.9, 0.0, 0.3, 0.2], [0.8, 0.0, 0.1, 0.4], [0.1, 0.0, 0.7, 0.6], [0.2, 0.0, 0.5, 0.9]])
    valid = torch.tensor([True, False, True, True])
    masked = outcome_reward(similarity, pair, pair, col_valid=valid, row_valid=valid)
    assert masked.outcome.isnan().tolist() == [False, True, False, False]
    kept = [0, 2, 3]
    without = outcome_reward(similarity[kept][:, kept], pair[kept], pair[kept])
    assert masked.outcome[kept].equal(without.outcome)
    assert not masked.outcome[kept].equal(outcome_reward(similarity, pair, pair).outcome[kept])


def test_error_6_pairs_with_the_same_answer_are_not_negatives_of_each_other():
    pair = torch.tensor([0, 1, 2])
    content = torch.tensor([4, 4, 9])  # pairs 0 and 1 have the same answer
    similarity = torch.tensor([[0.8, 0.9, 0.1], [0.9, 0.8, 0.1], [0.3, 0.2, 0.6]])
    naive = outcome_reward(similarity, pair, pair)
    masked = outcome_reward(similarity, pair, pair, col_content=content)
    assert naive.accuracy.tolist() == [0.0, 0.0, 1.0]
    assert masked.accuracy.tolist() == [1.0, 1.0, 1.0]
    assert masked.margin.tolist()[:2] == pytest.approx([0.7, 0.7])


def test_a_failed_partner_still_says_what_the_answer_is():
    """Content is known from the record, also when one of the pair's own columns failed."""
    col_pair, content = torch.tensor([0, 0, 1, 2]), torch.tensor([4, 4, 4, 9])
    similarity = torch.tensor([[0.5, NAN, 0.9, 0.1]])
    valid = torch.tensor([True, False, True, True])
    got = outcome_reward(similarity, torch.tensor([0]), col_pair, col_content=content, col_valid=valid)
    assert (got.accuracy.item(), got.margin.item()) == pytest.approx((1.0, 0.4))


# Unknowns.


def test_a_row_without_a_valid_partner_is_unknown():
    row, col = torch.tensor([0, 1, 2]), torch.tensor([0, 1])
    got = outcome_reward(torch.rand(3, 2), row, col, col_valid=torch.tensor([False, True]))
    assert [part.isnan().tolist() for part in got] == [[True, False, True]] * 3


def test_a_nan_cell_is_an_unknown_candidate_of_that_row_only(assert_equal_to_the_loop):
    similarity, row_pair, col_pair, masks = _random(8, [3] * 5, [3] * 5)
    holes = torch.rand(similarity.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    holes[2] = True
    got = assert_equal_to_the_loop(similarity.masked_fill(holes, NAN), row_pair, col_pair, masks)
    assert got[:, 2].isnan().all()
    untouched = ~holes.any(dim=1)
    whole = outcome_reward(similarity, row_pair, col_pair, **masks).outcome
    assert got[2][untouched].nan_to_num(9).equal(whole[untouched].nan_to_num(9))


def test_values_of_masked_cells_do_not_matter():
    similarity, row_pair, col_pair, masks = _random(9, [3] * 5, [3] * 5)
    expected = outcome_reward(similarity, row_pair, col_pair, **masks).outcome.nan_to_num(9)
    for value in (NAN, math.inf, -math.inf, 0.0):
        changed = similarity.masked_fill(~masks["row_valid"][:, None] | ~masks["col_valid"], value)
        assert outcome_reward(changed, row_pair, col_pair, **masks).outcome.nan_to_num(9).equal(expected)


@pytest.mark.parametrize(("rows", "cols"), [(0, 3), (3, 0), (0, 0)])
def test_an_empty_side_gives_unknown_rows(rows, cols):
    ids = torch.arange(3)
    got = outcome_reward(torch.zeros(rows, cols), ids[:rows], ids[:cols], col_content=ids[:cols])
    assert all(part.shape == (rows,) and part.isnan().all() for part in got)


@pytest.mark.parametrize("cell", [(0, 0), (0, 2)])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_score_is_refused_where_it_would_count(cell, value):
    ids = torch.tensor([0, 0, 1, 1])
    similarity = torch.full((4, 4), 0.5)
    similarity[cell] = value
    with pytest.raises(ValueError, match="row 0 of 4 has an infinite one"):
        outcome_reward(similarity, ids, ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"similarity": torch.zeros(2, 2, dtype=torch.int64)}, "float tensor"),
        ({"similarity": torch.zeros(2)}, r"got shape \(2,\)"),
        ({"row_pair": torch.zeros(3, dtype=torch.int64)}, r"row_pair must have shape \(2,\)"),
        ({"col_pair": torch.zeros(2)}, "col_pair must be an integer tensor; got torch.float32"),
        ({"col_content": torch.zeros(3, dtype=torch.int64)}, "col_content must have shape"),
        ({"col_valid": torch.zeros(2, dtype=torch.int64)}, "col_valid must be bool"),
        ({"row_valid": torch.zeros(1, dtype=torch.bool)}, "row_valid must have shape"),
        ({"temperature": 0.0}, "temperature must be positive and finite; got 0.0"),
        ({"accuracy": "some"}, "accuracy must be one of share, all; got 'some'"),
    ],
)
def test_wrong_input_is_refused(change, message):
    ids = torch.tensor([0, 1])
    arguments = {"similarity": torch.zeros(2, 2), "row_pair": ids, "col_pair": ids, **change}
    with pytest.raises(ValueError, match=message):
        outcome_reward(**arguments)


CAPTIONS = [[1, 10], [1, 20], [2, 30]]  # query and target of three pairs: two captions of photo 1, one of photo 2
AXES = torch.eye(4)


@pytest.mark.parametrize("rollouts", [1, 3])
def test_two_captions_of_one_photo_are_rewarded_as_one_in_both_directions(rollouts):
    pair = torch.arange(3).repeat_interleave(rollouts)
    similarity = AXES[[0, 0, 1]][pair] @ AXES[[0, 0, 1]][pair].T
    content = torch.tensor(CAPTIONS)[pair]
    for scores in (similarity, similarity.T):
        assert outcome_reward(scores, pair, pair, col_content=content).outcome.tolist() == [1.0] * len(pair)
        assert outcome_reward(scores, pair, pair, col_content=content[:, 1]).outcome.tolist()[0] == 0.0


def test_an_equal_query_hides_the_target_whatever_its_similarity_and_the_query_in_return():
    pair, content = torch.arange(3), torch.tensor(CAPTIONS)
    similarity = torch.tensor([[0.2, 0.9, 0.1], [0.8, 0.3, 0.1], [0.7, 0.6, 0.5]])
    for scores in (similarity, similarity.T):
        alone = [outcome_reward(scores[[i, 2]][:, [i, 2]], pair[[i, 2]], pair[[i, 2]]).margin[0] for i in (0, 1)]
        got = outcome_reward(scores, pair, pair, col_content=content)
        assert got.margin[:2].tolist() == torch.stack(alone).tolist()
    assert outcome_reward(similarity, pair, pair, col_content=content).outcome[2] == 0.0  # both captions are ahead


def test_equality_does_not_go_on_from_pair_to_pair():
    """q1-t1, q1-t2, q2-t2: the first and the last are negatives of each other."""
    pair, content = torch.arange(3), torch.tensor([[1, 10], [1, 20], [2, 20]])
    similarity = torch.full((3, 3), 0.5)
    similarity[0, 2] = similarity[2, 0] = 0.9
    for scores in (similarity, similarity.T):
        found = retrieval(scores, pair, pair, col_content=content)
        assert found.hit.tolist() == [0.0, 1.0, 0.0] and found.false_negatives.tolist() == [1, 2, 1]


@pytest.mark.parametrize("seed", range(5))
def test_the_false_negatives_are_those_of_the_one_relation(seed):
    similarity, row_pair, col_pair, masks = _random(seed, [3] * 9, [2] * 9)
    similarity[:, ::5] = NAN
    pairs, content = col_pair.unique(), masks["col_content"]
    of_pair = torch.stack([content[col_pair == pair][0] for pair in pairs])
    same = shares_content(of_pair[torch.searchsorted(pairs, row_pair)], content)
    wanted = same & (row_pair[:, None] != col_pair) & masks["col_valid"] & masks["row_valid"][:, None]
    found = retrieval(similarity, row_pair, col_pair, **masks)
    assert found.false_negatives.tolist() == wanted.sum(dim=1).tolist() and wanted.any()


@pytest.mark.parametrize("seed", range(5))
def test_a_pair_with_fewer_contents_than_another_loses_no_candidate(seed, assert_equal_to_the_loop):
    """Columns of one pair may differ in content; and a pair may have no column at all."""
    similarity, row_pair, col_pair, _ = _random(seed, [2] * 6, [1, 2, 0, 4, 1, 3])
    content = torch.randint(0, 15, (len(col_pair), 2), generator=torch.Generator().manual_seed(seed))
    assert_equal_to_the_loop(similarity, row_pair, col_pair, {"col_content": content})
    lost = torch.isin(row_pair, col_pair, invert=True)
    found = retrieval(similarity, row_pair, col_pair, col_content=content).false_negatives
    assert lost.sum() == 2 and not found[lost].any()


@pytest.mark.parametrize("content", [torch.zeros(3, 2, 2), torch.zeros(2, 3), torch.zeros(3, 0), torch.zeros(())])
def test_contents_of_another_shape_are_refused(content):
    pair = torch.arange(3)
    with pytest.raises(ValueError, match=r"col_content must have shape \(3,\) or \(3, K\) .* got"):
        outcome_reward(torch.eye(3), pair, pair, col_content=content.to(torch.int64))
