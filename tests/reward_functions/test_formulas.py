# SPDX-License-Identifier: Apache-2.0
"""outcome_only, format_only, soft_rank, length_shaped and gain against their formulas, one row at a time."""

import math
from functools import partial

import pytest
import torch

from embedrl_verl.errors import ConfigError
from embedrl_verl.rewards.score import call_reward_function


def _columns(batch, row):
    """The row's (similarity, raw similarity, pair, content, has both embeddings) over the other side's rows."""
    query = bool(batch.side[row] == 0)
    mine, others = (batch.query_rows, batch.target_rows) if query else (batch.target_rows, batch.query_rows)
    place = int((mine == row).nonzero())
    for column, other in enumerate(others.tolist()):
        cell = (place, column) if query else (column, place)
        yield float(batch.similarity[cell]), float(batch.raw_similarity[cell]), other


def _split(batch, row, usable):
    """(own, negatives): lists of (similarity, raw similarity, pair)."""
    pair, content = batch.pair.tolist(), batch.content.tolist()
    found = [(s, r, other) for s, r, other in _columns(batch, row) if usable[other]]
    own = [(s, r, pair[o]) for s, r, o in found if pair[o] == pair[row]]
    negatives = [(s, r, pair[o]) for s, r, o in found if pair[o] != pair[row] and content[o] != content[row]]
    return own, negatives


def _ahead(own, other, temperature):
    return float(other >= own) if temperature is None else 1 / (1 + math.exp((own - other) / temperature))


def _pair_rank(own, negatives, which, temperature=None):
    """1 + sum over the other pairs of the share of their columns that are ahead, and the number of pairs."""
    pairs = {}
    for entry in negatives:
        pairs.setdefault(entry[2], []).append(_ahead(own[which], entry[which], temperature))
    return 1 + sum(sum(ahead) / len(ahead) for ahead in pairs.values()), len(pairs)


def _close(got, wanted):
    torch.testing.assert_close(
        got.double(), torch.tensor(wanted, dtype=torch.float64), atol=3e-7, rtol=0, equal_nan=True
    )


def test_outcome_only_is_accuracy_times_margin(load, make_rows):
    batch = make_rows().batch()
    parts = load("outcome_only")(batch)
    reward = batch.retrieval().reward
    assert parts["score"].nan_to_num(9).equal(reward.outcome.nan_to_num(9))
    _close(parts["score"], (reward.accuracy.double() * reward.margin.double()).tolist())
    strict = load("outcome_only")(batch, accuracy="all", temperature=0.1)
    assert (
        strict["score"]
        .nan_to_num(9)
        .equal(batch.retrieval(accuracy="all", temperature=0.1).reward.outcome.nan_to_num(9))
    )


def test_outcome_only_pays_nothing_for_form(load, make_rows):
    rows = make_rows()
    paid = load("outcome_only")(rows.batch())["score"]
    malformed = [rows.arguments["tcots"][0]] * len(paid)
    assert load("outcome_only")(rows.batch(tcots=malformed))["score"].nan_to_num(9).equal(paid.nan_to_num(9))


def test_format_only_is_the_format(load, make_rows):
    batch = make_rows(failed=0.2).batch()
    parts = load("format_only")(batch)
    wanted = [float(i % 3 != 0) if ok else math.nan for i, ok in enumerate(batch.valid.tolist())]
    _close(parts["score"], wanted)
    assert parts["format"].equal(batch.format())


@pytest.mark.parametrize("temperature", [0.05, 0.3])
def test_soft_rank_is_its_formula(temperature, load, make_rows):
    batch = make_rows().batch()
    parts = load("soft_rank")(batch, alpha=0.1, temperature=temperature)
    scores, ranks = [], []
    for row in range(len(batch)):
        own, negatives = _split(batch, row, batch.valid)
        ahead = [sum(_ahead(s, other[0], temperature) for other in negatives) for s, _, _ in own]
        share = sum(1 - a / len(negatives) for a in ahead) / len(own)
        ranks.append(1 + sum(ahead) / len(own) if batch.valid[row] else math.nan)
        scores.append(0.1 * float(batch.format()[row]) + share if batch.valid[row] else math.nan)
    _close(parts["score"], scores)
    torch.testing.assert_close(parts["rank"].double(), torch.tensor(ranks).double(), rtol=1e-6, atol=0, equal_nan=True)


def test_soft_rank_rises_smoothly_where_accuracy_stays_zero(load, make_rows):
    """Rows whose pair is not on top differ in soft rank, and no two rows tie."""
    batch = make_rows(noise=3.0, failed=0.0).batch()
    lost = batch.retrieval().reward.accuracy == 0
    values = load("soft_rank")(batch, alpha=0.0)["score"][lost]
    assert len(values) > 10 and values.unique().numel() == len(values)


def test_soft_rank_without_negatives_leaves_the_format(load, make_rows):
    parts = load("soft_rank")(make_rows(pairs=1, failed=0.0).batch())
    assert parts["soft_rank"].isnan().all()
    torch.testing.assert_close(parts["score"], 0.05 * parts["format"])


def test_length_shaped_is_the_base_with_a_fine(load, make_rows):
    batch = make_rows().batch()
    parts = load("length_shaped")(batch, base="soft_rank", free=200, max=1000, penalty=0.3, temperature=0.1)
    base = load("soft_rank")(batch, temperature=0.1)
    fine = [
        -0.3 * min(max((n - 200) / 800, 0.0), 1.0) if form else -0.3
        for n, form in zip(batch.lengths.tolist(), batch.format().tolist(), strict=True)
    ]
    _close(parts["length"], fine)
    _close(parts["score"], (base["score"].double() + torch.tensor(fine).double()).tolist())
    assert parts["base"].nan_to_num(9).equal(base["score"].nan_to_num(9))
    assert parts["soft_rank"].nan_to_num(9).equal(base["soft_rank"].nan_to_num(9))


def test_length_shaped_starts_at_free_and_ends_at_max(load, make_rows):
    rows = make_rows(failed=0.0)
    lengths = torch.tensor([1, 100, 101, 150, 200, 5000] * 8)
    length = load("length_shaped")(rows.batch(lengths=lengths), free=100, max=200, penalty=1.0)["length"]
    assert length[1:6].tolist() == pytest.approx([0.0, -0.01, -1.0, -1.0, -1.0])  # row 3 is malformed
    assert length[7:12].tolist() == pytest.approx([0.0, -0.01, -1.0, -1.0, -1.0])


def test_an_empty_tcot_gains_nothing_by_being_short(load, make_rows):
    """Rows 0 and 1 are one group: an empty T-CoT of one token, and the longest well-formed one."""
    rows = make_rows(failed=0.0)
    lengths = torch.full((48,), 10_000).index_fill(0, torch.tensor([0]), 1)
    embeddings = rows.arguments["embeddings"].clone()
    embeddings[0] = embeddings[1]
    parts = load("length_shaped")(rows.batch(lengths=lengths, embeddings=embeddings), base="outcome_only", penalty=5.0)
    assert parts["format"][:2].tolist() == [0.0, 1.0]
    assert parts["score"][0] == parts["score"][1]


@pytest.mark.parametrize("measure", ["reciprocal", "soft"])
@pytest.mark.parametrize("positives", ["mean", "best"])
def test_gain_is_its_formula(measure, positives, load, make_rows):
    rows = make_rows(noise=1.0)
    raw = rows.arguments["raw_embeddings"].index_fill(0, torch.tensor([5, 40]), math.nan)
    batch = rows.batch(raw_embeddings=raw)
    parts = load("gain")(batch, measure=measure, positives=positives, temperature=0.1, loss_weight=0.5)
    usable = [bool(v) and i not in (5, 40) for i, v in enumerate(batch.valid.tolist())]
    gains, ranks, raw_ranks = [], [], []
    for row in range(len(batch)):
        own, negatives = _split(batch, row, usable)
        ranked = []
        for which in (0, 1):
            kept = own if positives == "mean" else [max(own, key=lambda entry: entry[which])]
            found = [_pair_rank(o, negatives, which, 0.1 if measure == "soft" else None) for o in kept]
            value = [1 - (rank - 1) / n if measure == "soft" else 1 / rank for rank, n in found]
            ranked.append((sum(value) / len(value), sum(rank for rank, _ in found) / len(found)))
        known = usable[row]
        gains.append(ranked[0][0] - ranked[1][0] if known else math.nan)
        ranks.append(ranked[0][1] if known else math.nan)
        raw_ranks.append(ranked[1][1] if known else math.nan)
    _close(parts["gain"], gains)
    for name, wanted in (("rank", ranks), ("raw_rank", raw_ranks)):
        torch.testing.assert_close(
            parts[name].double(), torch.tensor(wanted).double(), rtol=1e-6, atol=0, equal_nan=True
        )
    _close(parts["score"], [g if g != g or g > 0 else 0.5 * g for g in gains])
    known = ~parts["gain"].isnan()
    assert parts["helped"][known].equal((parts["gain"][known] > 0).float())
    assert parts["hurt"][known].equal((parts["gain"][known] < 0).float())
    assert parts["helped"][~known].isnan().all() and 0 < parts["helped"][known].mean() < 1


def test_gain_of_tcots_that_change_nothing_is_zero(load, make_rows):
    """The same vectors with and without T-CoT: neither helped nor hurt, to the bit."""
    for rollouts in (3, 4, 7):
        rows = make_rows(rollouts=rollouts, failed=0.0)
        for measure in ("reciprocal", "soft"):
            parts = load("gain")(rows.batch(embeddings=rows.arguments["raw_embeddings"]), measure=measure)
            for name in ("score", "helped", "hurt"):
                assert parts[name].tolist() == [0.0] * len(parts["score"]), (name, measure)


def test_gain_counts_a_tied_pair_once(load, make_rows):
    """One other pair with four tying columns ahead in the raw input: raw rank 2, not 5."""
    rows = make_rows(pairs=2, failed=0.0)
    side, pair = rows.arguments["side"], rows.arguments["pair"]
    eye = torch.eye(16)
    swapped = eye[torch.where(side == 0, pair, 1 - pair)]  # raw: each query looks like the other pair's target
    parts = load("gain")(rows.batch(embeddings=eye[pair], raw_embeddings=swapped, content=pair), loss_weight=0.0)
    assert parts["raw_rank"].tolist() == [2.0] * 16 and parts["rank"].tolist() == [1.0] * 16
    assert parts["score"].tolist() == [0.5] * 16


def test_gain_with_loss_weight_zero_pays_improvements_only(load, make_rows):
    batch = make_rows(noise=2.0).batch()
    parts = load("gain")(batch, loss_weight=0)
    known = ~parts["gain"].isnan()
    assert parts["score"][known].equal(parts["gain"][known].clamp(min=0)) and parts["gain"][known].min() < 0


def test_gain_with_format_leaves_it_where_the_raw_input_is_unknown(load, make_rows):
    rows = make_rows(failed=0.0)
    raw = rows.arguments["raw_embeddings"].index_fill(0, torch.tensor([1]), math.nan)
    batch = rows.batch(raw_embeddings=raw)
    assert load("gain")(batch)["score"].isnan().nonzero().tolist() == [[1]]
    assert load("gain")(batch, alpha=0.25)["score"][1] == 0.25


def test_what_is_missing_is_said_with_the_key_to_set(load, make_rows):
    rows = make_rows()
    with pytest.raises(ConfigError, match="set embedrl.reward.raw_embeddings=True"):
        load("gain")(rows.batch(raw_embeddings=None))
    with pytest.raises(ConfigError, match="length_shaped needs the number of response tokens"):
        load("length_shaped")(rows.batch(lengths=None))
    with pytest.raises(ConfigError, match="needs a judge"):
        load("length_shaped")(rows.batch(judge=None), base="paper")


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("outcome_only", {"accuracy": "best"}, "accuracy must be one of share, all"),
        ("outcome_only", {"temperature": 0}, "temperature must be positive and finite; got 0"),
        ("soft_rank", {"temperature": 0.001}, "temperature must be a finite number of at least 0.005; got 0.001"),
        ("soft_rank", {"alpha": -1}, "alpha must be a finite number of at least 0; got -1"),
        ("length_shaped", {"base": "constant"}, "base must be one of no_judge, paper, .*; got 'constant'"),
        ("length_shaped", {"free": 9, "max": 9}, "free must be below max; got 9 and 9"),
        ("length_shaped", {"penalty": -0.1}, "penalty must be a finite number of at least 0; got -0.1"),
        ("length_shaped", {"gama": 1}, "unexpected keyword argument 'gama'"),
        ("gain", {"measure": "rank"}, "measure must be reciprocal or soft; got 'rank'"),
        ("gain", {"positives": "all"}, "positives must be one of mean, best; got 'all'"),
        ("gain", {"loss_weight": -1}, "loss_weight must be a finite number of at least 0; got -1"),
    ],
)
def test_bad_arguments_are_refused(name, kwargs, message, load, make_rows):
    with pytest.raises(ConfigError, match=message):
        call_reward_function(partial(load(name), **kwargs), make_rows().batch(), name)
