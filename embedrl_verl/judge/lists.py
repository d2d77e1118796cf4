# SPDX-License-Identifier: Apache-2.0
"""Whom the judge chooses from: the lists of method section 4, eq. 4.

A list holds every rollout of the own pair on the other side, and of each of the k hardest other pairs its best row.
Pairs with the same query or the same target are false negatives and never listed, nor are rows without embedding.

Lists depend on embeddings, pair identities, side, step and seed alone, never on where a row stands in the batch.
Shapes: R rows and C columns of one direction's similarity, P pairs, G rows of a pair, u lists (units) of a block.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embedrl_verl.data.identity import shares_content
from embedrl_verl.rewards import SIDES, RewardBatch, Side
from embedrl_verl.rewards.retrieval import Direction

_BLOCK_CELLS = 2**24
"""Cells of S looked at in one go: 64 MiB as float32."""


@dataclass(frozen=True)
class JudgeList:
    """One numbered list of candidates.

    rows: rows of the batch that are judged with this list, all of one pair and of `side`, in the order of rollouts.
    candidates: rows of the batch on the other side, in the order shown; number 1 is the first.
    own: which candidates are of the judged rows' own pair.
    """

    rows: tuple[int, ...]
    side: Side
    candidates: tuple[int, ...]
    own: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.candidates)

    @property
    def own_share(self) -> float:
        """How often a judge that cannot read hits."""
        return sum(self.own) / len(self.own)


@torch.no_grad()
def judge_lists(
    batch: RewardBatch,
    *,
    seed: int,
    step: int,
    hard_pairs: int = 4,
    shared: bool = True,
    identity: Sequence[str] | None = None,
) -> list[JudgeList]:
    """The lists of a step, sorted by side and pair; a row without embedding, without partner or without another pair
    to choose from is in none.

    Args:
        seed, step: with the pair's identity and the side they decide the order of a list.
        hard_pairs: k, other pairs in a list; fewer where there are not so many.
        shared: one list for all rollouts of a prompt, its hardest pairs by the best similarity of any of them. The
            judge's server then reads the list once, and no rollout of a GRPO group has an easier list or a luckier
            order than another. False: a list for every row, hardest by that row, order drawn with its rollout too.
        identity: N names, equal for rows of the same pair and for no others, the same in every run. Default: the
            numbers in `batch.pair`, which a caller may give out differently from step to step.
    """
    if hard_pairs < 1:
        raise ValueError(f"hard_pairs must be 1 or more, or there is nothing to choose from; got {hard_pairs}")
    if not len(batch):
        return []
    names, rank = _rank_pairs(batch, identity)
    content = batch.content.new_zeros(len(names), batch.content.shape[1])
    content[rank] = batch.content
    rollouts = batch.rollout.tolist()
    result = []
    for side in SIDES:
        for pair, rows, own, hard in _find(batch.direction(side), rank, content, hard_pairs, shared):
            candidates = [(row, True) for row in own] + [(row, False) for row in hard]
            parts = [seed, step, side, "" if shared else rollouts[rows[0]], names[pair]]
            random.Random("/".join(map(str, parts))).shuffle(candidates)
            listed, is_own = zip(*candidates, strict=True)
            result.append(JudgeList(rows=tuple(rows), side=side, candidates=listed, own=is_own))
    return result


def _rank_pairs(batch: RewardBatch, identity: Sequence[str] | None) -> tuple[list[str], Tensor]:
    """Sorted names of the pairs, and (N,) int64: which of them each row's pair is."""
    pairs = batch.pair.tolist()
    identity = [str(pair) for pair in pairs] if identity is None else list(identity)
    links = set(zip(pairs, identity, strict=False))
    names = sorted(set(identity))
    if len(identity) != len(pairs) or not len(links) == len(set(pairs)) == len(names):
        raise ValueError(
            f"identity must have one name for each pair, for all {len(pairs)} rows; got {len(identity)} names, "
            f"{len(names)} different ones for {len(set(pairs))} pairs"
        )
    number = {name: i for i, name in enumerate(names)}
    return names, torch.tensor([number[name] for name in identity])


def _find(
    way: Direction, rank: Tensor, content: Tensor, hard_pairs: int, shared: bool
) -> Iterator[tuple[int, list[int], list[int], list[int]]]:
    """For every list of one direction, in the order of pairs and rollouts: its pair, rows, own and other candidates.

    `rank` is (N,) int64, the pair (0..P-1) of every row of the batch; `content` (P, K) int64.
    """
    columns = _members(rank[way.cols], way.col_valid, len(content))
    prompts = _members(rank[way.rows], way.row_valid, len(content))
    with_partner = (columns >= 0).any(dim=1)
    if shared:
        pair = ((prompts >= 0).any(dim=1) & with_partner).nonzero()[:, 0]
        units = prompts[pair]
    else:
        real = (prompts >= 0) & with_partner[:, None]
        pair, units = real.nonzero()[:, 0], prompts[real][:, None]
    rows, cols = way.rows.tolist(), way.cols.tolist()
    own = [[cols[j] for j in members if j >= 0] for members in columns.tolist()]
    height = max(1, _BLOCK_CELLS // max(1, units.shape[1] * len(cols)))
    for start in range(0, len(units), height):
        block = slice(start, start + height)
        none = (units[block] < 0)[..., None]
        cells = way.similarity[units[block].clamp(min=0)].nan_to_num_(nan=-torch.inf).masked_fill_(none, -torch.inf)
        hidden = shares_content(content[pair[block]], content)
        hard = _hardest(cells.amax(dim=1), columns, hidden, hard_pairs)
        for p, unit, others in zip(pair[block].tolist(), units[block].tolist(), hard.tolist(), strict=True):
            listed = [cols[j] for j in others if j >= 0]
            if listed:
                yield p, [rows[i] for i in unit if i >= 0], own[p], listed


def _members(pair: Tensor, valid: Tensor, pairs: int) -> Tensor:
    """(P, G) int64: which valid entries (R,) are of each pair, in their order (that of rollouts), then -1."""
    entries = valid.nonzero()[:, 0]
    entries = entries[pair[entries].argsort(stable=True)]
    count = torch.bincount(pair[entries], minlength=pairs)
    first = count.cumsum(0) - count
    table = torch.full((pairs, max(1, int(count.max()))), -1, dtype=torch.int64)
    table[pair[entries], torch.arange(len(entries)) - first[pair[entries]]] = entries
    return table


def _hardest(best: Tensor, columns: Tensor, hidden: Tensor, hard_pairs: int) -> Tensor:
    """(u, k) int64: for every unit the best column of each of its hardest pairs, hardest first; of equals the earlier;
    -1 where there are fewer pairs. `best` is (u, C), `columns` (P, G), `hidden` (u, P) pairs that are no candidates."""
    cells = best[:, columns.clamp(min=0)].masked_fill_(columns < 0, -torch.inf)  # (u, P, G)
    peak, slot = cells.max(dim=2)  # of equals the first
    peak.masked_fill_(hidden, -torch.inf)
    chosen = []
    for _ in range(min(hard_pairs, len(columns))):
        score, pair = peak.max(dim=1, keepdim=True)
        chosen.append(columns[pair, slot.gather(1, pair)].masked_fill_(score == -torch.inf, -1))
        peak.scatter_(1, pair, -torch.inf)
    return torch.cat(chosen, dim=1)
