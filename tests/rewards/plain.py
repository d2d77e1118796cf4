# SPDX-License-Identifier: Apache-2.0
"""The reward once more, as plain Python loops over lists: what the masked code must be equal to."""

import math

import torch

from embedrl_verl.rewards import Direction

NAN = math.nan


def random_direction(seed, row_sizes, col_sizes, ties=False, dtype=torch.float32):
    """Pairs with so many rows and columns each, in shuffled order, with failures and shared contents."""
    generator = torch.Generator().manual_seed(seed)
    row_pair, col_pair = (torch.arange(len(s)).repeat_interleave(torch.tensor(s)) for s in (row_sizes, col_sizes))
    row_pair, col_pair = (pair[torch.randperm(len(pair), generator=generator)] for pair in (row_pair, col_pair))
    similarity = torch.rand(len(row_pair), len(col_pair), generator=generator, dtype=dtype) * 2 - 1
    lead = torch.rand(len(row_pair), 1, generator=generator, dtype=dtype) * 1.5  # some rows retrieve all of their pair
    similarity += lead * (row_pair[:, None] == col_pair)
    if ties:
        similarity = (similarity * 3).round() / 3
    content = torch.randint(0, max(3, len(col_sizes)), (40, 2), generator=generator)
    valid = [torch.rand(len(pair), generator=generator) < 0.85 for pair in (row_pair, col_pair)]
    return direction(similarity, row_pair * 7 - 3, col_pair * 7 - 3, content[row_pair], content[col_pair], *valid)


def direction(similarity, row_pair, col_pair, row_content=None, col_content=None, row_valid=None, col_valid=None):
    """A direction of everything that is given; by default a pair's content is the pair and everything is valid."""
    contents = [
        pair if content is None else content for pair, content in ((row_pair, row_content), (col_pair, col_content))
    ]
    return Direction(
        similarity,
        torch.arange(len(row_pair)),
        torch.arange(len(col_pair)),
        row_pair,
        col_pair,
        *(content[:, None] if content.dim() == 1 else content for content in contents),
        *(
            torch.ones_like(pair, dtype=torch.bool) if valid is None else valid
            for pair, valid in ((row_pair, row_valid), (col_pair, col_valid))
        ),
    )


def masks(d):
    """Arguments of `outcome_reward` beside the similarities and pairs."""
    return {"col_content": d.col_content, "col_valid": d.col_valid, "row_valid": d.row_valid}


def _loop(d, of_row):
    """(3, R) float64 of `of_row(positives, negatives)`: (score, pair) of each, the positives in falling order."""
    pairs, contents, valid = d.col_pair.tolist(), d.col_content.tolist(), d.col_valid.tolist()
    result = []
    for scores, pair, known in zip(d.similarity.double().tolist(), d.row_pair.tolist(), d.row_valid, strict=True):
        shown = {key for p, ids in zip(pairs, contents, strict=True) if p == pair for key in enumerate(ids)}
        positives, negatives = [], []
        for score, p, ids, ok in zip(scores, pairs, contents, valid, strict=True):
            if ok and not math.isnan(score):
                if p == pair:
                    positives.append((score, p))
                elif shown.isdisjoint(enumerate(ids)):
                    negatives.append((score, p))
        positives.sort(reverse=True)
        result.append(of_row(positives, negatives) if known and positives else (NAN, NAN, NAN))
    return torch.tensor(result, dtype=torch.float64).reshape(len(d.row_pair), 3).T


def outcome(d, temperature=0.5, accuracy="share"):
    """(3, R) float64: accuracy, margin and outcome of every row."""

    def of_row(positives, negatives):
        own, others = [score for score, _ in positives], [score for score, _ in negatives]
        top = sorted([(-s, 1) for s in own] + [(-s, 0) for s in others])[: len(own)]  # ties: negatives first
        share = sum(positive for _, positive in top) / len(own)
        if accuracy == "all":
            share = float(share == 1)
        weights = [math.exp(s / temperature) for s in others]
        hard = sum(w * s for w, s in zip(weights, others, strict=True)) / sum(weights) if others else 0.0
        margin = sum(own) / len(own) - hard
        return share, margin, share * margin

    return _loop(d, of_row)


def ranks(d, temperature, by_pair, positives):
    """(3, R) float64: rank, reciprocal and outranked fraction of every row."""
    size = {pair: int(((d.col_pair == pair) & d.col_valid).sum()) for pair in d.col_pair.tolist()}
    first = slice(1 if positives == "best" else None)

    def ahead(own, score):
        return float(score >= own) if temperature is None else 1 / (1 + math.exp((own - score) / temperature))

    def of_row(positives, negatives):
        if not negatives:
            return NAN, NAN, NAN
        weight = {pair: 1 / size[pair] if by_pair else 1.0 for _, pair in negatives}
        total = sum(weight[pair] for _, pair in negatives)
        sums = [sum(weight[p] * ahead(own, s) for s, p in negatives) for own, _ in positives[first]]
        parts = [(1 + a, 1 / (1 + a), 1 - a / total) for a in sums]
        return tuple(sum(part) / len(parts) for part in zip(*parts, strict=True))

    return _loop(d, of_row)


def total(format, process, outcome, alpha=0.05, beta=0.8, gamma=0.2):
    """Weighted sum of the known terms, row by row."""
    result = []
    for terms in zip(format.tolist(), process.tolist(), outcome.tolist(), strict=True):
        known = [w * t for w, t in zip((alpha, beta, gamma), terms, strict=True) if w > 0 and not math.isnan(t)]
        result.append(sum(known) if known else NAN)
    return torch.tensor(result, dtype=torch.float64)
