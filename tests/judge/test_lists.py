# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from embedrl_verl.judge import judge_lists
from embedrl_verl.rewards import RewardBatch
from tests.judge.fakes import make_batch, tcot_of


def plain_lists(batch, side, hard_pairs, shared):
    """(rows, own candidates, hard candidates) of every list, in plain loops over rows and columns."""
    way, found = batch.direction(side), []
    scores, rows, cols = way.similarity.tolist(), way.rows.tolist(), way.cols.tolist()
    contents = zip(way.col_pair.tolist(), way.col_content.tolist(), strict=True)
    content = {pair: set(enumerate(ids)) for pair, ids in contents}
    for pair in sorted(set(way.row_pair.tolist())):
        members = [i for i in range(len(rows)) if way.row_pair[i] == pair and way.row_valid[i]]
        own = [cols[j] for j in range(len(cols)) if way.col_pair[j] == pair and way.col_valid[j]]
        for unit in [members] if shared else [[i] for i in members]:
            best = {}
            for i in unit:
                for j in range(len(cols)):
                    other = int(way.col_pair[j])
                    if other != pair and not content[other] & content.get(pair, set()) and way.col_valid[j]:
                        best[other] = max(best.get(other, (-9.0, 0, 0)), (scores[i][j], -j, cols[j]))
            hard = [best[p][2] for p in sorted(best, key=lambda p: (-best[p][0], p))[:hard_pairs]]
            if unit and own and hard:
                found.append(([rows[i] for i in unit], own, hard))
    return found


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("case", ["whole", "failed", "same target", "same query", "uneven"])
def test_lists_hold_the_own_rollouts_and_the_best_row_of_each_hardest_pair(shared, case):
    change, order = {}, torch.randperm(72, generator=torch.Generator().manual_seed(1))
    if case == "failed":
        change["valid"] = torch.rand(72, generator=torch.Generator().manual_seed(2)) > 0.4
    elif case == "same target":
        change["content"] = torch.tensor([0, 0, 2, 3, 3, 3, 6, 7, 8]).repeat_interleave(4).repeat(2)
    elif case == "same query":  # 0-1-2 is a chain: 0 and 2 share nothing
        targets = torch.tensor([0, 1, 1, 3, 4, 5, 6, 7, 8])
        content = torch.stack((torch.tensor([0, 0, 2, 3, 3, 3, 6, 7, 8]), targets), dim=1)
        change["content"] = content.repeat_interleave(4, dim=0).repeat(2, 1)
    elif case == "uneven":
        order = order[:40]
    batch = make_batch(pairs=9, order=order, **change)
    lists = judge_lists(batch, seed=3, step=5, hard_pairs=3, shared=shared)
    assert lists
    for side in ("query", "target"):
        found = [x for x in lists if x.side == side]
        expected = plain_lists(batch, side, 3, shared)
        assert [list(x.rows) for x in found] == [rows for rows, _, _ in expected]
        for x, (_, own, hard) in zip(found, expected, strict=True):
            assert sorted(x.candidates) == sorted(own + hard)
            assert [c in own for c in x.candidates] == list(x.own)


@pytest.mark.parametrize("shared", [True, False])
def test_permuting_rows_and_renumbering_pairs_permutes_the_lists_and_changes_nothing_else(shared):
    names = [f"pair-{p * 7 % 5}" for p in range(5)]
    pair = torch.arange(5).repeat_interleave(3).repeat(2)
    content = torch.tensor([0, 1, 1, 3, 4]).repeat_interleave(3).repeat(2)
    valid = torch.rand(30, generator=torch.Generator().manual_seed(4)) > 0.2
    vectors = torch.nn.functional.normalize(torch.randn(30, 4, generator=torch.Generator().manual_seed(5)), dim=1)
    vectors[6:9], vectors[21:24] = vectors[3:6].clone(), vectors[18:21].clone()  # ties

    def lists(order, number):
        change = {"content": content, "valid": valid, "embeddings": vectors, "pair": number[pair]}
        batch = make_batch(pairs=5, rollouts=3, order=order, **change)
        identity = [names[p] for p in pair[order].tolist()]
        found, row = judge_lists(batch, seed=1, step=2, hard_pairs=2, shared=shared, identity=identity), order.tolist()
        return [(x.side, [row[i] for i in x.rows], [row[i] for i in x.candidates], x.own) for x in found]

    expected = lists(torch.arange(30), torch.arange(5))
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        assert lists(torch.randperm(30, generator=generator), torch.randperm(5, generator=generator)) == expected


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}, {"identity": "other"}])
def test_the_order_depends_on_seed_step_pair_and_side(change):
    batch = make_batch(pairs=8)
    names = [f"{change.get('identity', 'pair')}{p}" for p in batch.pair.tolist()]
    base = judge_lists(batch, seed=0, step=0, identity=[f"pair{p}" for p in batch.pair.tolist()])
    changed = judge_lists(batch, seed=change.get("seed", 0), step=change.get("step", 0), identity=names)
    same = [x.candidates == y.candidates for x, y in zip(base, changed, strict=True)]
    assert sum(same) <= 1
    assert [set(x.candidates) for x in base] == [set(y.candidates) for y in changed]
    owns = [x.own for x in base]
    assert len(set(owns)) > len(owns) / 2  # neither one order for all pairs nor one for both sides


def test_a_list_of_its_own_is_drawn_for_every_rollout():
    lists = judge_lists(make_batch(pairs=5, rollouts=8), seed=0, step=0, shared=False)
    assert [len(x.rows) for x in lists] == [1] * 80
    assert len({x.own for x in lists[:8]}) > 4


@pytest.mark.parametrize("shared", [True, False])
def test_own_positions_are_uniform_over_2000_lists(shared):
    batch = make_batch(pairs=50, rollouts=2)
    places, step = torch.zeros(6), 0
    while places.sum() < 2000:
        for x in judge_lists(batch, seed=7, step=step, shared=shared):
            first = [batch.rollout[c].item() if own else -1 for c, own in zip(x.candidates, x.own, strict=True)]
            places[first.index(0)] += 1
        step += 1
    expected = places.sum() / 6
    assert ((places - expected) ** 2 / expected).sum() < 15.086  # chi-square, 5 degrees of freedom: p > 0.01


def test_rows_without_embedding_partner_or_other_pair_have_no_list():
    side, pair = torch.tensor([0, 0, 1, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 2, 2, 3])
    vectors = torch.nn.functional.normalize(torch.randn(7, 8, generator=torch.Generator().manual_seed(0)), dim=1)

    def judged(content, rows=7):
        batch = RewardBatch.build(
            side=side[:rows],
            pair=pair[:rows],
            rollout=torch.tensor([0, 1, 0, 0, 0, 0, 0])[:rows],
            content=content[:rows],
            tcots=[tcot_of(0)] * rows,
            required=["text_keywords"] * rows,
            embeddings=vectors[:rows],
            valid=torch.tensor([True, False, True, True, True, True, True])[:rows],
        )
        return sorted(row for x in judge_lists(batch, seed=0, step=0) for row in x.rows)

    assert judged(pair) == [0, 2, 4, 5]  # 1 failed; 3 and 6 have no partner
    assert judged(torch.zeros(7, dtype=torch.int64)) == judged(pair, rows=0) == []  # all of one content; no rows


@pytest.mark.parametrize("names", [["a"] * 48, [str(i) for i in range(48)], ["a"], None])
def test_identities_that_do_not_name_the_pairs_and_no_hard_pairs_are_refused(names):
    with pytest.raises(ValueError, match="identity must" if names else "hard_pairs must be 1 or more"):
        judge_lists(make_batch(), seed=0, step=0, hard_pairs=4 if names else 0, identity=names)


def test_another_caption_of_the_photo_is_never_listed_and_the_photo_of_another_caption_neither():
    content = torch.tensor([[0, 0], [0, 1], [2, 2]]).repeat_interleave(2, dim=0).repeat(2, 1)
    near = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), dim=1)
    batch = make_batch(pairs=3, rollouts=2, content=content, embeddings=near.repeat_interleave(2, dim=0).repeat(2, 1))
    for x in judge_lists(batch, seed=0, step=0, hard_pairs=4):
        pairs = {int(batch.pair[row]) for row in x.rows}, {int(batch.pair[row]) for row in x.candidates}
        assert pairs in [({0}, {0, 2}), ({1}, {1, 2}), ({2}, {0, 1, 2})]
