# SPDX-License-Identifier: Apache-2.0
"""positive_ranks is the double loop of its definition, for any order, grouping, mask and tie."""

import math

import pytest
import torch

from embedrl_verl.rewards import candidates
from embedrl_verl.rewards.ranks import positive_ranks

NAN = math.nan
CHOICES = [
    {"temperature": temperature, "by_pair": by_pair, "positives": positives}
    for temperature in (None, 0.05)
    for by_pair in (False, True)
    for positives in ("mean", "best")
]


def _ahead(own, score, temperature):
    if temperature is None:
        return float(score >= own)
    return 1 / (1 + math.exp((own - score) / temperature))


def _row(scores, row_pair, col_pair, content, valid, temperature, by_pair, positives):
    """(rank, reciprocal, beaten) of one valid row; lists over the columns."""
    own_content = {key for j in range(len(scores)) if col_pair[j] == row_pair for key in enumerate(content[j])}
    known = [j for j in range(len(scores)) if valid[j] and not math.isnan(scores[j])]
    own = sorted((scores[j] for j in known if col_pair[j] == row_pair), reverse=True)
    negatives = [j for j in known if col_pair[j] != row_pair and own_content.isdisjoint(enumerate(content[j]))]
    size = {pair: sum(p == pair and v for p, v in zip(col_pair, valid, strict=True)) for pair in col_pair}
    weight = {j: 1 / size[col_pair[j]] if by_pair else 1.0 for j in negatives}
    if not own or not negatives:
        return NAN, NAN, NAN
    ranks, beaten = [], []
    for score in own if positives == "mean" else own[:1]:
        ahead = sum(weight[j] * _ahead(score, scores[j], temperature) for j in negatives)
        ranks.append(1 + ahead)
        beaten.append(1 - ahead / sum(weight.values()))
    return sum(ranks) / len(ranks), sum(1 / rank for rank in ranks) / len(ranks), sum(beaten) / len(beaten)


def _loop(similarity, row_pair, col_pair, col_content=None, col_valid=None, row_valid=None, **choices):
    """(3, R) float64."""
    rows, cols = similarity.shape
    content = (col_pair[:, None] if col_content is None else col_content).tolist()
    col_valid = [True] * cols if col_valid is None else col_valid.tolist()
    row_valid = [True] * rows if row_valid is None else row_valid.tolist()
    result = []
    for i, scores in enumerate(similarity.double().tolist()):
        one = _row(scores, row_pair[i].item(), col_pair.tolist(), content, col_valid, **choices)
        result.append(one if row_valid[i] else (NAN, NAN, NAN))
    return torch.tensor(result, dtype=torch.float64).reshape(rows, 3).T


def _random(seed, row_sizes, col_sizes, ties=False):
    generator = torch.Generator().manual_seed(seed)
    row_pair = torch.arange(len(row_sizes)).repeat_interleave(torch.tensor(row_sizes))
    col_pair = torch.arange(len(col_sizes)).repeat_interleave(torch.tensor(col_sizes))
    row_pair = row_pair[torch.randperm(len(row_pair), generator=generator)] * 7 - 3
    col_pair = col_pair[torch.randperm(len(col_pair), generator=generator)] * 7 - 3
    similarity = torch.rand(len(row_pair), len(col_pair), generator=generator) * 2 - 1
    if ties:
        similarity = (similarity * 3).round() / 3
    contents = torch.randint(0, max(3, len(col_sizes)), (40, 2), generator=generator)
    masks = {
        "col_content": contents[(col_pair + 3) // 7],
        "col_valid": torch.rand(len(col_pair), generator=generator) < 0.85,
        "row_valid": torch.rand(len(row_pair), generator=generator) < 0.85,
    }
    return similarity, row_pair, col_pair, masks


def _assert_loop(similarity, row_pair, col_pair, masks, **choices):
    got = torch.stack(positive_ranks(similarity, row_pair, col_pair, **masks, **choices))
    wanted = _loop(similarity, row_pair, col_pair, **masks, **choices)
    torch.testing.assert_close(got.double(), wanted, rtol=3e-7, atol=3e-7, equal_nan=True)
    return got


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("ties", [False, True])
def test_equal_to_the_double_loop(choices, ties):
    for seed, rollouts in enumerate((1, 3, 8)):
        similarity, row_pair, col_pair, masks = _random(seed, [rollouts] * 9, [rollouts] * 9, ties)
        for chosen in ({}, {"col_content": masks["col_content"]}, masks):
            got = _assert_loop(similarity, row_pair, col_pair, chosen, **choices)
            assert got[0].nan_to_num().unique().numel() > 1  # not vacuous
        _assert_loop(similarity.T, col_pair, row_pair, {}, **choices)


@pytest.mark.parametrize("choices", CHOICES)
def test_uneven_groups_missing_partners_and_unknown_cells(choices):
    for seed in range(6):
        sizes = torch.randint(0, 7, (2, 8), generator=torch.Generator().manual_seed(seed)).tolist()
        similarity, row_pair, col_pair, masks = _random(seed, *sizes, ties=seed % 2 == 0)
        _assert_loop(similarity, row_pair, col_pair, masks, **choices)
        if not choices["by_pair"]:
            holes = torch.rand(similarity.shape, generator=torch.Generator().manual_seed(seed)) < 0.2
            _assert_loop(similarity.masked_fill(holes, NAN), row_pair, col_pair, masks, **choices)


@pytest.mark.parametrize("choices", CHOICES)
def test_permutations_of_rows_and_columns_permute_the_ranks_bit_for_bit(choices):
    similarity, row_pair, col_pair, masks = _random(1, [6] * 20, [7] * 20)
    similarity = similarity.double()  # results of float32 would hide the last bits
    base = positive_ranks(similarity, row_pair, col_pair, **masks, **choices)
    generator = torch.Generator().manual_seed(2)
    for _ in range(40):
        rows = torch.randperm(len(row_pair), generator=generator)
        cols = torch.randperm(len(col_pair), generator=generator)
        shuffled = {name: mask[rows if name == "row_valid" else cols] for name, mask in masks.items()}
        got = positive_ranks(similarity[rows][:, cols], row_pair[rows], col_pair[cols], **shuffled, **choices)
        for part, expected in zip(got, base, strict=True):
            assert part.nan_to_num(9).equal(expected[rows].nan_to_num(9))


@pytest.mark.parametrize("choices", CHOICES)
def test_several_blocks_and_a_transposed_view_are_one_matrix(choices, monkeypatch):
    similarity, row_pair, col_pair, masks = _random(3, [4] * 12, [3] * 12, ties=True)
    whole = positive_ranks(similarity, row_pair, col_pair, **masks, **choices)
    monkeypatch.setattr(candidates, "BLOCK_CELLS", 5 * similarity.shape[1])
    view = similarity.T.contiguous().T
    for part, block in zip(positive_ranks(view, row_pair, col_pair, **masks, **choices), whole, strict=True):
        assert part.nan_to_num(9).equal(block.nan_to_num(9))


def test_a_tie_counts_whole_against_a_hard_rank_and_half_against_a_soft_one():
    pair, similarity = torch.tensor([0, 1, 2]), torch.tensor([[0.5, 0.5, -0.5]])
    assert positive_ranks(similarity, pair[:1], pair).rank.tolist() == [2.0]
    soft = positive_ranks(similarity, pair[:1], pair, temperature=0.01)
    assert soft.rank.tolist() == [1.5] and soft.beaten.tolist() == [0.75]


def test_a_cold_soft_rank_is_the_hard_one_and_a_warm_one_is_the_middle():
    similarity, row_pair, col_pair, masks = _random(5, [3] * 9, [3] * 9)
    hard = positive_ranks(similarity, row_pair, col_pair, **masks).rank
    cold = positive_ranks(similarity, row_pair, col_pair, **masks, temperature=0.005).rank
    torch.testing.assert_close(cold, hard, atol=0.7, rtol=0, equal_nan=True)  # single cells may be within 0.005
    warm = positive_ranks(similarity, row_pair, col_pair, **masks, temperature=1e6).beaten
    assert (warm[~warm.isnan()] - 0.5).abs().max() < 1e-5


def test_by_pair_a_pair_counts_once_whatever_it_has_of_columns():
    col_pair = torch.tensor([0, 1, 1, 1, 2, 2, 2])
    similarity = torch.tensor([[0.5, 0.9, 0.9, 0.9, 0.9, 0.1, 0.1]])
    got = positive_ranks(similarity, col_pair[:1], col_pair, by_pair=True)
    assert got.rank.item() == pytest.approx(2 + 1 / 3) and got.beaten.item() == pytest.approx(1 / 3)
    valid = torch.tensor([True, True, False, False, True, False, True])
    masked = positive_ranks(similarity, col_pair[:1], col_pair, by_pair=True, col_valid=valid)
    assert masked.rank.item() == 2.5
    assert positive_ranks(similarity, col_pair[:1], col_pair).rank.item() == 5.0


def test_thirds_of_pairs_add_up_to_whole_ranks():
    """So that an unchanged rank is no gain."""
    col_pair = torch.cat((torch.zeros(1), torch.arange(1, 60).repeat_interleave(3))).long()
    similarity = torch.ones(1, len(col_pair), dtype=torch.float64).index_fill(1, torch.tensor([0]), 0.5)
    assert positive_ranks(similarity, col_pair[:1], col_pair, by_pair=True).rank.item() == 60.0


def test_without_a_negative_there_is_no_rank():
    pair = torch.tensor([0, 1])
    same = positive_ranks(torch.rand(2, 2), pair, pair, col_content=torch.tensor([4, 4]))
    assert all(part.isnan().all() for part in same)
    alone = positive_ranks(torch.rand(1, 1), pair[:1], pair[:1], temperature=0.1)
    assert all(part.isnan().all() for part in alone)


@pytest.mark.parametrize(("rows", "cols"), [(0, 3), (3, 0)])
def test_an_empty_side_gives_unknown_rows(rows, cols):
    ids = torch.arange(3)
    assert all(
        p.shape == (rows,) and p.isnan().all() for p in positive_ranks(torch.zeros(rows, cols), ids[:rows], ids[:cols])
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be None .hard ranks., or positive and finite; got 0.0"),
        ({"positives": "worst"}, "positives must be one of mean, best; got 'worst'"),
        ({"similarity": torch.zeros(2, 2, dtype=torch.int64)}, "float tensor"),
        ({"col_valid": torch.zeros(1, dtype=torch.bool)}, "col_valid must have shape"),
        ({"similarity": torch.tensor([[0.0, math.inf], [0.0, 0.0]]), "temperature": 1.0}, "row 0 of 2 breaks this"),
        ({"similarity": torch.tensor([[0.0, 900.0], [0.0, 0.0]]), "temperature": 1.0}, "within 700; row 0 of 2"),
        (
            {"col_pair": torch.tensor([0, 0]), "similarity": torch.tensor([[0.0, 900.0]] * 2), "temperature": 1.0},
            "by 900",
        ),
    ],
)
def test_wrong_input_is_refused(change, message):
    ids = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=message):
        positive_ranks(**{"similarity": torch.zeros(2, 2), "row_pair": ids, "col_pair": ids, **change})
