# SPDX-License-Identifier: Apache-2.0
"""Outcome reward and ranks are the double loops of the method, for any order, grouping, mask and tie."""

import math
from dataclasses import replace

import pytest
import torch

from embedrl_verl.data.identity import shares_content
from embedrl_verl.rewards import outcome_reward, similarity_matrix
from embedrl_verl.rewards import retrieval as module
from embedrl_verl.rewards.retrieval import ranks, retrieval
from tests.rewards import plain

NAN = math.nan
RANK_CHOICES = [
    {"temperature": temperature, "by_pair": by_pair, "positives": positives}
    for temperature in (None, 0.05)
    for by_pair in (False, True)
    for positives in ("mean", "best")
]


def _outcome(d, **choices):
    return torch.stack(outcome_reward(d.similarity, d.row_pair, d.col_pair, **plain.masks(d), **choices))


def _assert_outcome(d, tolerance=2e-7, **choices):
    got, wanted = _outcome(d, **choices), plain.outcome(d, **choices)
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=tolerance, equal_nan=True)
    return got


def _assert_ranks(d, **choices):
    got = torch.stack(ranks(d, **choices))
    torch.testing.assert_close(got.double(), plain.ranks(d, **choices), rtol=3e-7, atol=3e-7, equal_nan=True)
    return got


def _same(one, other):
    return all(a.nan_to_num(9).equal(b.nan_to_num(9)) for a, b in zip(one, other, strict=True))


def _variants(rollouts, ties, seed):
    """Nothing masked, false negatives alone, everything; and the other direction."""
    d = plain.random_direction(seed, [rollouts] * 9, [rollouts] * 9, ties)
    yield plain.direction(d.similarity, d.row_pair, d.col_pair)
    yield plain.direction(d.similarity, d.row_pair, d.col_pair, d.row_content, d.col_content)
    yield d
    yield plain.direction(d.similarity.T, d.col_pair, d.row_pair, d.col_content, d.row_content)


@pytest.mark.parametrize("rollouts", [1, 2, 4, 8])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("accuracy", ["share", "all"])
def test_equal_to_the_double_loop(rollouts, ties, accuracy):
    got = [_assert_outcome(d, accuracy=accuracy)[0] for d in _variants(rollouts, ties, seed=rollouts)]
    assert torch.cat(got).nan_to_num().unique().numel() > 1  # not vacuous: some rows hit, some miss


@pytest.mark.parametrize("choices", RANK_CHOICES)
@pytest.mark.parametrize("ties", [False, True])
def test_ranks_are_equal_to_the_double_loop(choices, ties):
    for seed, rollouts in enumerate((1, 3, 8)):
        got = [_assert_ranks(d, **choices)[0] for d in _variants(rollouts, ties, seed)]
        assert torch.cat(got).nan_to_num().unique().numel() > 1


@pytest.mark.parametrize("seed", range(20))
def test_uneven_groups_missing_partners_and_unknown_cells(seed):
    """A NaN cell is an unknown candidate of its row only."""
    sizes = torch.randint(0, 7, (2, 8), generator=torch.Generator().manual_seed(seed)).tolist()
    d = plain.random_direction(seed, *sizes, ties=seed % 2 == 0)
    holes = torch.rand(d.similarity.shape, generator=torch.Generator().manual_seed(seed)) < 0.2
    holes[::5] = True
    for one in (d, replace(d, similarity=d.similarity.masked_fill(holes, NAN))):
        _assert_outcome(one)
        _assert_outcome(one, accuracy="all", temperature=0.02)
        for choices in RANK_CHOICES:
            if one is d or not choices["by_pair"]:
                _assert_ranks(one, **choices)
    assert _outcome(one)[2][::5].isnan().all()


def test_a_pair_may_show_several_contents():
    """Also of a column that failed: the record states what the answer is."""
    similarity = torch.tensor([[0.5, NAN, 0.9, 0.7, 0.1]])
    col_pair, content = torch.tensor([0, 0, 1, 2, 3]), torch.tensor([4, 5, 4, 5, 9])
    valid = torch.tensor([True, False, True, True, True])
    got = outcome_reward(similarity, torch.tensor([0]), col_pair, col_content=content, col_valid=valid)
    assert (got.accuracy.item(), got.margin.item()) == pytest.approx((1.0, 0.4))


@pytest.mark.parametrize("choices", RANK_CHOICES)
def test_several_blocks_and_a_transposed_view_are_one_matrix(choices, monkeypatch):
    d = plain.random_direction(3, [4] * 12, [3] * 12, dtype=torch.float64)  # float32 would hide the last bits
    view = replace(d, similarity=d.similarity.T.contiguous().T)
    for temperature in (0.5, 0.05):
        whole, ranked = retrieval(d, temperature=temperature), ranks(d, **choices)
        for cells in (2**18, 5 * len(d.col_pair), 1):
            monkeypatch.setattr(module, "BLOCK_CELLS", cells)
            for one in (d, view):
                found = retrieval(one, temperature=temperature)
                assert _same((*found.reward, *found[1:]), (*whole.reward, *whole[1:]))
                assert _same(ranks(one, **choices), ranked)
        monkeypatch.undo()


def test_equal_rows_have_equal_rewards_to_the_bit_wherever_they_stand():
    """GRPO divides by a group's deviation: a last bit would become an advantage."""
    d = plain.random_direction(4, [1] * 13, [5] * 13, dtype=torch.float64)
    rows = torch.randperm(13 * 41, generator=torch.Generator().manual_seed(0)) % 13
    picked = {name: getattr(d, name)[rows] for name in ("rows", "row_pair", "row_content", "row_valid", "similarity")}
    many = replace(d, **picked)
    for compute in (lambda x: retrieval(x).reward, *(lambda x, c=c: ranks(x, **c) for c in RANK_CHOICES)):
        found = torch.stack(compute(many))
        for row in range(13):
            assert found[:, rows == row].T.unique(dim=0).nan_to_num(9).unique(dim=0).shape[0] == 1


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_float64_is_computed_in_float64_at_any_scale(scale):
    d = plain.random_direction(6, [4] * 6, [4] * 6, dtype=torch.float64)
    got = _assert_outcome(replace(d, similarity=d.similarity * scale), tolerance=1e-11 * scale)
    assert got.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_short_ids_are_read_exactly(dtype):
    d = plain.random_direction(7, [3] * 6, [2] * 6)
    half = d.similarity.to(dtype)
    got = outcome_reward(half, d.row_pair.int(), d.col_pair.to(torch.int16), **plain.masks(d))
    assert got.outcome.dtype == torch.float32
    assert _same(got, _outcome(replace(d, similarity=half.float())))


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


# Ranks.


def test_a_tie_counts_whole_against_a_hard_rank_and_half_against_a_soft_one():
    pair = torch.tensor([0, 1, 2])
    d = plain.direction(torch.tensor([[0.5, 0.5, -0.5]]), pair[:1], pair)
    assert ranks(d).rank.tolist() == [2.0]
    soft = ranks(d, temperature=0.01)
    assert soft.rank.tolist() == [1.5] and soft.outranked.tolist() == [0.75]


def test_a_cold_soft_rank_is_the_hard_one_and_a_warm_one_is_the_middle():
    d = plain.random_direction(5, [3] * 9, [3] * 9)
    cold = ranks(d, temperature=1e-6).rank
    torch.testing.assert_close(cold, ranks(d).rank, atol=1e-3, rtol=0, equal_nan=True)
    warm = ranks(d, temperature=1e6).outranked
    assert (warm[~warm.isnan()] - 0.5).abs().max() < 1e-5


def test_by_pair_a_pair_counts_once_whatever_it_has_of_columns():
    col_pair = torch.tensor([0, 1, 1, 1, 2, 2, 2])
    d = plain.direction(torch.tensor([[0.5, 0.9, 0.9, 0.9, 0.9, 0.1, 0.1]]), col_pair[:1], col_pair)
    got = ranks(d, by_pair=True)
    assert got.rank.item() == pytest.approx(2 + 1 / 3) and got.outranked.item() == pytest.approx(1 / 3)
    valid = torch.tensor([True, True, False, False, True, False, True])
    assert ranks(replace(d, col_valid=valid), by_pair=True).rank.item() == 2.5
    assert ranks(d).rank.item() == 5.0
    gone = replace(d, col_valid=col_pair != 1)  # a pair without any valid column is nobody's rival
    for temperature in (None, 0.05):
        assert ranks(gone, by_pair=True, temperature=temperature).rank.item() == pytest.approx(4 / 3, abs=1e-3)


def test_thirds_of_pairs_add_up_to_whole_ranks():
    """So that an unchanged rank is no gain."""
    col_pair = torch.cat((torch.zeros(1), torch.arange(1, 60).repeat_interleave(3))).long()
    similarity = torch.ones(1, len(col_pair), dtype=torch.float64).index_fill(1, torch.tensor([0]), 0.5)
    assert ranks(plain.direction(similarity, col_pair[:1], col_pair), by_pair=True).rank.item() == 60.0


def test_without_a_negative_there_is_no_rank():
    pair = torch.tensor([0, 1])
    same = torch.tensor([4, 4])
    assert all(part.isnan().all() for part in ranks(plain.direction(torch.rand(2, 2), pair, pair, same, same)))
    assert all(p.isnan().all() for p in ranks(plain.direction(torch.rand(1, 1), pair[:1], pair[:1]), temperature=0.1))


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
    torch.testing.assert_close(interleaved, outcome[order], rtol=0, atol=1e-7)


def test_error_3_a_failed_row_is_nobodys_candidate_and_unknown_itself():
    """A failed request became a zero vector, scored as real."""
    pair = torch.tensor([0, 0, 1, 1])
    similarity = torch.tensor([[0.9, 0.0, 0.3, 0.2], [0.8, 0.0, 0.1, 0.4], [0.1, 0.0, 0.7, 0.6], [0.2, 0.0, 0.5, 0.9]])
    valid = torch.tensor([True, False, True, True])
    masked = outcome_reward(similarity, pair, pair, col_valid=valid, row_valid=valid).outcome
    assert masked.isnan().tolist() == [False, True, False, False]
    kept = [0, 2, 3]
    without = outcome_reward(similarity[kept][:, kept], pair[kept], pair[kept]).outcome
    torch.testing.assert_close(masked[kept], without, rtol=0, atol=1e-7)
    assert (masked - outcome_reward(similarity, pair, pair).outcome)[kept].abs().max() > 0.01


def test_error_6_pairs_with_the_same_answer_are_not_negatives_of_each_other():
    pair = torch.tensor([0, 1, 2])
    content = torch.tensor([4, 4, 9])  # pairs 0 and 1 have the same answer
    similarity = torch.tensor([[0.8, 0.9, 0.1], [0.9, 0.8, 0.1], [0.3, 0.2, 0.6]])
    naive = outcome_reward(similarity, pair, pair)
    masked = outcome_reward(similarity, pair, pair, col_content=content)
    assert naive.accuracy.tolist() == [0.0, 0.0, 1.0]
    assert masked.accuracy.tolist() == [1.0, 1.0, 1.0]
    assert masked.margin.tolist()[:2] == pytest.approx([0.7, 0.7])


# False negatives.

CAPTIONS = [[1, 10], [1, 20], [2, 30]]  # query and target of three pairs: two captions of photo 1, one of photo 2


@pytest.mark.parametrize("rollouts", [1, 3])
def test_two_captions_of_one_photo_are_rewarded_as_one_in_both_directions(rollouts):
    pair = torch.arange(3).repeat_interleave(rollouts)
    similarity = torch.eye(4)[[0, 0, 1]][pair] @ torch.eye(4)[[0, 0, 1]][pair].T
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
        assert got.margin[:2].tolist() == pytest.approx(torch.stack(alone).tolist(), abs=1e-7)
    assert outcome_reward(similarity, pair, pair, col_content=content).outcome[2] == 0.0  # both captions are ahead


def test_equality_does_not_go_on_from_pair_to_pair():
    """q1-t1, q1-t2, q2-t2: the first and the last are negatives of each other."""
    pair, content = torch.arange(3), torch.tensor([[1, 10], [1, 20], [2, 20]])
    similarity = torch.full((3, 3), 0.5)
    similarity[0, 2] = similarity[2, 0] = 0.9
    for scores in (similarity, similarity.T):
        found = retrieval(plain.direction(scores, pair, pair, content, content))
        assert found.hit.tolist() == [0.0, 1.0, 0.0] and found.false_negatives.tolist() == [1, 2, 1]


@pytest.mark.parametrize("seed", range(5))
def test_the_false_negatives_are_those_of_the_one_relation(seed):
    d = plain.random_direction(seed, [3] * 9, [2] * 9)
    d.similarity[:, ::5] = NAN
    same = shares_content(d.row_content, d.col_content)
    wanted = same & (d.row_pair[:, None] != d.col_pair) & d.col_valid & d.row_valid[:, None]
    assert retrieval(d).false_negatives.tolist() == wanted.sum(dim=1).tolist() and wanted.any()


# Unknowns and wrong input.


def test_a_row_without_a_valid_partner_is_unknown_and_has_no_false_negatives():
    row, col, content = torch.tensor([0, 1, 2]), torch.tensor([0, 1]), torch.zeros(3, dtype=torch.int64)
    valid = torch.tensor([False, True])
    got = outcome_reward(torch.rand(3, 2), row, col, col_valid=valid)
    assert [part.isnan().tolist() for part in got] == [[True, False, True]] * 3
    d = plain.direction(torch.rand(3, 2), row, col, content, content[:2], col_valid=valid)
    assert retrieval(d).false_negatives.tolist() == [1, 0, 0]


def test_values_of_masked_cells_do_not_matter():
    d = plain.random_direction(9, [3] * 5, [3] * 5)
    expected, masked = _outcome(d), ~d.row_valid[:, None] | ~d.col_valid
    for value in (NAN, math.inf, -math.inf, 0.0):
        assert _same(_outcome(replace(d, similarity=d.similarity.masked_fill(masked, value))), expected)


@pytest.mark.parametrize(("rows", "cols"), [(0, 3), (3, 0), (0, 0)])
def test_an_empty_side_gives_unknown_rows(rows, cols):
    ids, empty = torch.arange(3), torch.zeros(rows, cols)
    got = outcome_reward(empty, ids[:rows], ids[:cols], col_content=ids[:cols])
    for part in (*got, *ranks(plain.direction(empty, ids[:rows], ids[:cols]))):
        assert part.shape == (rows,) and part.isnan().all()


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
        ({"col_valid": torch.zeros(2, dtype=torch.int64)}, "col_valid must be bool"),
        ({"row_valid": torch.zeros(1, dtype=torch.bool)}, "row_valid must have shape"),
        ({"temperature": 0.0}, "temperature must be positive and finite; got 0.0"),
        ({"accuracy": "some"}, "accuracy must be one of share, all; got 'some'"),
        *(
            ({"col_content": torch.zeros(shape, dtype=torch.int64)}, r"col_content must have shape \(2,\) or \(2, K\)")
            for shape in ((3,), (2, 2, 2), (3, 2), (2, 0), ())
        ),
    ],
)
def test_wrong_input_is_refused(change, message):
    ids = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=message):
        outcome_reward(**{"similarity": torch.zeros(2, 2), "row_pair": ids, "col_pair": ids, **change})


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"temperature": 0.0}, "temperature must be None .hard ranks., or positive and finite; got 0.0"),
        ({"positives": "worst"}, "positives must be one of mean, best; got 'worst'"),
    ],
)
def test_wrong_choices_of_ranks_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        ranks(plain.random_direction(0, [1], [1]), **choices)


# Similarities.


def _unit(rows, dim, seed=0):
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("dim", [1, 3, 64, 1000])
def test_similarity_is_as_good_as_float32(dim):
    query, target = _unit(300, dim), _unit(200, dim, seed=1)
    exact = query.double() @ target.double().T
    assert float((similarity_matrix(query, target) - exact).abs().max()) < 1e-7


def test_similarity_has_the_same_bits_for_any_order_and_any_side():
    query, target = _unit(137, 77), _unit(61, 77, seed=1)
    similarity = similarity_matrix(query, target)
    assert similarity_matrix(target, query).T.equal(similarity)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows, cols, dims = (torch.randperm(n, generator=generator) for n in (137, 61, 77))
        assert similarity_matrix(query[rows][:, dims], target[cols][:, dims]).equal(similarity[rows][:, cols])


def test_products_on_the_grid_are_exact_so_that_no_order_can_matter():
    query, target, order = _unit(40, 500), _unit(30, 500, seed=1), torch.arange(499, -1, -1)
    for grid, exact in ((module._on_grid, True), (torch.Tensor.double, False)):
        left, right = grid(query), grid(target)
        assert (left @ right.T).equal(left[:, order] @ right[:, order].T) is exact


def test_equal_vectors_have_equal_similarities():
    """Two rollouts with the same T-CoT tie exactly, so that the tie rule applies to them."""
    query, target = _unit(50, 333), _unit(3, 333, seed=1).repeat(40, 1)
    similarity = similarity_matrix(query, target)
    assert similarity[:, :3].repeat(1, 40).equal(similarity)
