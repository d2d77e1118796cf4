# SPDX-License-Identifier: Apache-2.0
"""The reward once more, as plain Python loops over lists: what the vectorised code must be equal to."""

import math

import pytest
import torch

from embedrl_verl.rewards import RewardBatch
from embedrl_verl.tcot import parse_tcot

NAN = math.nan


def _outcome_of_row(scores, row_pair, col_pair, content, valid, temperature=0.5, accuracy="share"):
    """(accuracy, margin, outcome) of one valid row; lists over the columns."""
    own_content = {key for j in range(len(scores)) if col_pair[j] == row_pair for key in enumerate(content[j])}
    positives, negatives = [], []
    for j, score in enumerate(scores):
        if not valid[j] or math.isnan(score):
            continue
        if col_pair[j] == row_pair:
            positives.append(score)
        elif own_content.isdisjoint(enumerate(content[j])):
            negatives.append(score)
    if not positives:
        return NAN, NAN, NAN
    top = sorted([(-s, "b") for s in positives] + [(-s, "a") for s in negatives])[
        : len(positives)
    ]  # ties: negatives first
    share = sum(kind == "b" for _, kind in top) / len(positives)
    if accuracy == "all":
        share = 1.0 if share == 1.0 else 0.0
    weights = [math.exp(s / temperature) for s in negatives]
    hard = sum(w * s for w, s in zip(weights, negatives, strict=True)) / sum(weights) if negatives else 0.0
    margin = sum(positives) / len(positives) - hard
    return share, margin, share * margin


def _outcome(similarity, row_pair, col_pair, col_content=None, col_valid=None, row_valid=None, **choices):
    """(3, R) float64: accuracy, margin and outcome of every row, by a double loop."""
    rows, cols = similarity.shape
    content = torch.arange(cols) if col_content is None else col_content
    content = (content[:, None] if content.dim() == 1 else content).tolist()
    col_valid = [True] * cols if col_valid is None else col_valid.tolist()
    row_valid = [True] * rows if row_valid is None else row_valid.tolist()
    result = []
    for i, scores in enumerate(similarity.double().tolist()):
        one = _outcome_of_row(scores, row_pair[i].item(), col_pair.tolist(), content, col_valid, **choices)
        result.append(one if row_valid[i] else (NAN, NAN, NAN))
    return torch.tensor(result, dtype=torch.float64).reshape(rows, 3).T


def _total(format, process, outcome, alpha=0.05, beta=0.8, gamma=0.2):
    """Weighted sum of the known terms, row by row."""
    result = []
    for terms in zip(format.tolist(), process.tolist(), outcome.tolist(), strict=True):
        known = [w * t for w, t in zip((alpha, beta, gamma), terms, strict=True) if w > 0 and not math.isnan(t)]
        result.append(sum(known) if known else NAN)
    return torch.tensor(result, dtype=torch.float64)


@pytest.fixture(scope="session")
def plain_outcome():
    """See `_outcome`."""
    return _outcome


@pytest.fixture(scope="session")
def plain_total():
    """See `_total`."""
    return _total


WELL_FORMED = '<thinking>It says {"text_keywords": ["a"]}.</thinking><rethink>Yes.</rethink><answer>a</answer>'
BROKEN = "no tags at all"


@pytest.fixture(scope="session")
def make_batch():
    """Rows of random embeddings near their pair's direction, shuffled; `change` overrides arguments of `build`."""

    def make(pairs=5, rollouts=4, seed=0, noise=0.8, rows=None, **change):
        generator = torch.Generator().manual_seed(seed)
        side, pair, rollout = torch.cartesian_prod(torch.arange(2), torch.arange(pairs), torch.arange(rollouts)).T
        kept = torch.randperm(len(side), generator=generator) if rows is None else rows
        centre = torch.randn(pairs, 24, generator=generator)[pair]
        vectors = centre + noise * torch.randn(len(side), 24, generator=generator)
        arguments = {
            "side": side,
            "pair": pair,
            "rollout": rollout,
            "content": pair,
            "embeddings": torch.nn.functional.normalize(vectors, dim=1),
        }
        arguments = {name: value[kept] for name, value in arguments.items()}
        texts = [WELL_FORMED if (p + s) % 2 else BROKEN for p, s in zip(pair[kept], side[kept], strict=True)]
        arguments |= {"tcots": [parse_tcot(text) for text in texts], "required": ["text_keywords"] * len(kept)}
        return RewardBatch.build(**{**arguments, **change})

    return make
