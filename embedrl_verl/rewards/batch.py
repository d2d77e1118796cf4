# SPDX-License-Identifier: Apache-2.0
"""RewardBatch: everything a reward function may look at, for all rollouts of one step.

A row is one rollout of one side of one pair. Rows stand in the caller's order and every result has that order; who
belongs together is stated by `pair` and `side`, never by position, so any number of rollouts a side works, and a
missing partner too. Inside, the similarities are sorted by pair and rollout: permuting the rows permutes every result
bit for bit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from embedrl_verl.data.schema import SIDES, Side
from embedrl_verl.errors import ConfigError
from embedrl_verl.rewards.retrieval import (
    Accuracy,
    Direction,
    OutcomeReward,
    Positives,
    Ranks,
    Retrieval,
    ranks,
    retrieval,
    similarity_matrix,
)
from embedrl_verl.tcot import TCoT, format_reward

# Gives the process term (N,) of a batch, NaN = unknown (paper eq. 4).
Judge: TypeAlias = "Callable[[RewardBatch], Awaitable[Tensor]]"
# A float32 embedding that was normalised in bfloat16 is off by up to 0.004.
_LENGTH_TOLERANCE = 0.01


@dataclass(frozen=True, eq=False)
class RewardBatch:
    """All rollouts of a step. N rows, of which N_q are query rows and N_t target rows. Make one with `build`.

    side: (N,) int64, 0 = query, 1 = target.
    pair: (N,) int64. content: (N, K) int64, ids of the contents of the row's pair; pairs with an equal id in one column
        are false negatives of each other. K = 2: `ContentId`, query and target.
    rollout: (N,) int64, index among the rollouts of the same side of the same pair.
    tcots: N parsed T-CoTs. required: N evidence keys that the rows' inputs call for.
    valid: (N,) bool, the row has an embedding.
    similarity: (N_q, N_t) float32 cosines, NaN in rows and columns without embedding.
    query_rows: (N_q,), target_rows: (N_t,) int64, which rows of the batch the rows and columns of `similarity` are.
    lengths: (N,) int64, tokens of the rows' responses, or None where nobody counted them.
    raw_similarity: (N_q, N_t) float32 cosines of the same inputs embedded without any T-CoT, NaN where one is missing;
        None where the raw inputs were not embedded.
    judge: None, or an async function of the batch that gives the process term.
    """

    side: Tensor
    pair: Tensor
    rollout: Tensor
    tcots: tuple[TCoT, ...]
    required: tuple[str, ...]
    valid: Tensor
    content: Tensor
    similarity: Tensor
    query_rows: Tensor
    target_rows: Tensor
    lengths: Tensor | None = None
    raw_similarity: Tensor | None = None
    judge: Judge | None = None
    _retrievals: dict[tuple[float, Accuracy], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        rows = self.side.numel()
        named = {name: getattr(self, name) for name in ("side", "pair", "rollout", "content", "valid", "lengths")}
        _check_shapes(rows, **named)
        for name, value in named.items():
            wanted = torch.bool if name == "valid" else torch.int64
            if value is not None and value.dtype != wanted:
                raise ValueError(f"{name} must be {wanted}; got {value.dtype}")
        for name, size in (("tcots", len(self.tcots)), ("required", len(self.required))):
            if size != rows:
                raise ValueError(f"{name} must have one entry for each of {rows} rows; got {size}")
        shape = (self.query_rows.numel(), self.target_rows.numel())
        for name, matrix in (("similarity", self.similarity), ("raw_similarity", self.raw_similarity)):
            if matrix is not None and (matrix.shape != shape or sum(shape) != rows):
                got = tuple(matrix.shape)
                raise ValueError(f"{name} must be (query rows, target rows) = {shape} of {rows} rows; got {got}")

    def __len__(self) -> int:
        return self.side.numel()

    @classmethod
    def build(
        cls,
        *,
        side: Tensor,
        pair: Tensor,
        rollout: Tensor,
        content: Tensor,
        tcots: Sequence[TCoT],
        required: Sequence[str],
        embeddings: Tensor,
        valid: Tensor | None = None,
        lengths: Tensor | None = None,
        raw_embeddings: Tensor | None = None,
        judge: Judge | None = None,
    ) -> RewardBatch:
        """Link the rows and compute the similarity matrix. Row order is free; it is the order of every result.

        Args:
            side, pair, rollout, content, tcots, required, lengths, judge: see the class; integer tensors of any width.
                A content of (N,) is one kind of id.
            embeddings: (N, D) float, each of length 1. A row with NaN or infinity has no embedding: it is not valid.
            valid: (N,) bool, False where the embedding failed. Default: every row with a finite embedding.
            raw_embeddings: (N, D) float, each row's input embedded without T-CoT, NaN where there is none.

        Raises:
            ValueError: an embedding is not of length 1 (a zero vector is no embedding: pass NaN or valid=False), a row
                occurs twice, a pair has two contents, a side is neither 0 nor 1, or shapes differ.
        """
        side, pair, rollout, content = (t.to(torch.int64).cpu() for t in (side, pair, rollout, content))
        content = content[:, None] if content.dim() == 1 else content
        valid = torch.ones_like(side, dtype=torch.bool) if valid is None else valid.to(torch.bool).cpu()
        vectors = {"embeddings": embeddings, "raw_embeddings": raw_embeddings}
        _check_shapes(len(side), pair=pair, rollout=rollout, content=content, valid=valid, **vectors)
        _check_rows(side, pair, rollout, content)
        by_rollout = rollout.argsort(stable=True)
        order = by_rollout[pair[by_rollout].argsort(stable=True)]
        query_rows, target_rows = order[side[order] == 0], order[side[order] == 1]
        embeddings, valid = _checked(embeddings, valid)
        raw = None
        if raw_embeddings is not None:
            raw = _cosines(*_checked(raw_embeddings, torch.ones_like(valid)), query_rows, target_rows)
        return cls(
            side=side,
            pair=pair,
            rollout=rollout,
            tcots=tuple(tcots),
            required=tuple(required),
            valid=valid,
            content=content,
            similarity=_cosines(embeddings, valid, query_rows, target_rows),
            query_rows=query_rows,
            target_rows=target_rows,
            lengths=None if lengths is None else lengths.to(torch.int64).cpu(),
            raw_similarity=raw,
            judge=judge,
        )

    def direction(self, side: Side, *, raw: bool = False) -> Direction:
        """The direction whose rows are of `side`; "target" is the transpose of "query" (paper: symmetric).

        Args:
            raw: with the similarity of the raw inputs, valid being what has a raw embedding.
        """
        if side not in SIDES:
            raise ValueError(f"side must be query or target; got {side!r}")
        similarity, valid = (self._raw(), self.raw_valid()) if raw else (self.similarity, self.valid)
        query = side == "query"
        rows, cols = (self.query_rows, self.target_rows) if query else (self.target_rows, self.query_rows)
        return Direction(
            similarity=similarity if query else similarity.T,
            rows=rows,
            cols=cols,
            row_pair=self.pair[rows],
            col_pair=self.pair[cols],
            row_content=self.content[rows],
            col_content=self.content[cols],
            row_valid=valid[rows],
            col_valid=valid[cols],
        )

    def raw_valid(self) -> Tensor:
        """(N,) bool, the row's input has an embedding without T-CoT; ConfigError where none was embedded."""
        missing = self._raw().isnan()
        valid = torch.zeros_like(self.valid)
        valid[self.query_rows] = ~missing.all(dim=1)
        valid[self.target_rows] = ~missing.all(dim=0)
        return valid

    def _raw(self) -> Tensor:
        if self.raw_similarity is None:
            raise ConfigError(
                "this reward compares with the raw inputs, which were not embedded; "
                "set embedrl.reward.raw_embeddings=True"
            )
        return self.raw_similarity

    def format(self) -> Tensor:
        """F: (N,) float32, 1 where the T-CoT is well formed and carries the evidence its input calls for, else 0."""
        return torch.tensor([format_reward(t, r) for t, r in zip(self.tcots, self.required, strict=True)])

    def retrieval(self, *, temperature: float = 0.5, accuracy: Accuracy = "share") -> Retrieval:
        """Outcome reward of both directions, Hit@1 and false negatives: (N,) each, NaN where unknown.

        Computed once for equal arguments; every call returns tensors of its own.
        """
        key = (temperature, accuracy)
        if key not in self._retrievals:
            numbers = torch.full((5, len(self)), torch.nan, dtype=torch.float64)
            for one in map(self.direction, SIDES):
                found = retrieval(one, temperature=temperature, accuracy=accuracy)
                numbers[:, one.rows] = torch.stack((*found.reward, found.hit, found.false_negatives)).double()
            self._retrievals[key] = numbers
        acc, margin, outcome, hit = self._retrievals[key][:4].float()
        return Retrieval(OutcomeReward(acc, margin, outcome), hit, self._retrievals[key][4].long())

    def hits(self) -> Retrieval:
        """The first retrieval that was asked for: Hit@1 and false negatives are the same in all."""
        temperature, accuracy = next(iter(self._retrievals), (0.5, "share"))
        return self.retrieval(temperature=temperature, accuracy=accuracy)

    def ranks(
        self,
        *,
        raw: bool = False,
        among: Tensor | None = None,
        temperature: float | None = None,
        by_pair: bool = False,
        positives: Positives = "mean",
    ) -> Ranks:
        """Ranks of the own pair's columns in both directions: (N,) each, NaN where unknown.

        Args:
            raw: of the raw inputs; ConfigError where they were not embedded.
            among: (N,) bool, the rows to rank, which are also the candidates. Default: all that have an embedding.
            temperature, by_pair, positives: as in `rewards.retrieval.ranks`.
        """
        numbers = torch.full((3, len(self)), torch.nan)
        for side in SIDES:
            one = self.direction(side, raw=raw)
            if among is not None:
                row_valid, col_valid = one.row_valid & among[one.rows], one.col_valid & among[one.cols]
                one = replace(one, row_valid=row_valid, col_valid=col_valid)
            found = ranks(one, temperature=temperature, by_pair=by_pair, positives=positives)
            numbers[:, one.rows] = torch.stack(found)
        return Ranks(*numbers)

    def process(self) -> Tensor:
        """J: (N,) float32 from the judge, NaN = unknown. Waits for it; call once, in a thread without a running event
        loop. ConfigError: the run has no judge.
        """
        return asyncio.run(self.judged())

    async def judged(self) -> Tensor:
        """`process` for a reward function that is itself async."""
        if self.judge is None:
            raise ConfigError(
                "the process reward (beta > 0) needs a judge, and there is none. Use the reward no_judge, set "
                "reward.custom_reward_function.reward_kwargs.beta=0, or start a judge (embedrl.judge)"
            )
        scores = await self.judge(self)
        if scores.shape != (len(self),):
            raise ValueError(
                f"the judge must return one value per row, shape ({len(self)},); got {tuple(scores.shape)}"
            )
        return scores.to(torch.float32).cpu()

    def groups(self) -> Tensor:
        """(N,) int64: rows of one side of one pair (one prompt, one GRPO group) share an id."""
        pair: Tensor = torch.unique(self.pair, return_inverse=True)[1]
        return pair * len(SIDES) + self.side


_MATRICES = {"content": "(N,) or (N, K)", "embeddings": "(N, D)", "raw_embeddings": "(N, D)"}


def _check_shapes(rows: int, **values: Tensor | None) -> None:
    for name, value in values.items():
        if value is not None and (value.dim() != 1 + (name in _MATRICES) or len(value) != rows):
            kind = _MATRICES.get(name, "(N,)")
            raise ValueError(f"{name} must be {kind} with N = {rows} as side has; got {tuple(value.shape)}")


def _checked(embeddings: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) on the CPU, and which `valid` rows have a finite embedding, all of length 1."""
    embeddings = embeddings.detach().cpu()
    valid = valid & embeddings.isfinite().all(dim=1)
    length = embeddings.float().norm(dim=1)
    off = (valid & ~((length - 1).abs() <= _LENGTH_TOLERANCE)).nonzero()
    if len(off):
        row = int(off[0])
        raise ValueError(
            f"embeddings must have length 1; row {row} has length {float(length[row]):.4g}. "
            "Normalise them, and mark failed ones with NaN or valid=False instead of a zero vector"
        )
    return embeddings, valid


def _cosines(vectors: Tensor, valid: Tensor, query_rows: Tensor, target_rows: Tensor) -> Tensor:
    """(N_q, N_t) float32 of (N, D) vectors, NaN where a row is not valid."""
    vectors = vectors.masked_fill(~valid[:, None], 0.0)
    similarity = similarity_matrix(vectors[query_rows], vectors[target_rows])
    similarity[~valid[query_rows]] = torch.nan
    similarity[:, ~valid[target_rows]] = torch.nan
    return similarity


def _check_rows(side: Tensor, pair: Tensor, rollout: Tensor, content: Tensor) -> None:
    odd = ((side != 0) & (side != 1)).nonzero()
    if len(odd):
        raise ValueError(f"side must be 0 (query) or 1 (target); row {int(odd[0])} has {int(side[odd[0]])}")
    keys, counts = torch.unique(torch.stack((pair, side, rollout), dim=1), dim=0, return_counts=True)
    twice = (counts > 1).nonzero()
    if len(twice):
        p, s, r = keys[twice[0, 0]].tolist()
        raise ValueError(
            f"each rollout may occur once; pair {p}, {SIDES[s]}, rollout {r} occurs {int(counts[twice[0, 0]])} times. "
            "Drop padding rows before building the batch"
        )
    contents = torch.unique(torch.cat((pair[:, None], content), dim=1), dim=0)[:, 0]
    values, kinds = torch.unique(contents, return_counts=True)
    if (kinds > 1).any():
        raise ValueError(
            f"all rows of a pair must have the same content ids; pair {int(values[kinds > 1][0])} has several"
        )


def batch_metrics(
    batch: RewardBatch, parts: Mapping[str, Tensor], *, evidence: Tensor | None = None
) -> dict[str, float]:
    """Means over the known rows, and counts.

    Args:
        parts: what the reward function returned, (N,) each, NaN = unknown.
        evidence: (N,) crops and key frames that were really cut for each row.

    Returns:
        `embedrl/<part>/query`, `/target` and `/mean` for every part ("score" is called `reward`), for `hit@1` (the best
        positive is above every negative of the batch; ties are misses), `well_formed`, `evidence`, and
        `false_negatives` (columns left out for a row). A mean over no known row is left out. Counts: `embedrl/rows`,
        `embedrl/failed_rows` (no embedding), `embedrl/rows_without_partner` and `embedrl/unknown/<part>`.
    """
    found = batch.hits()
    numbers = {"reward" if name == "score" else name: value for name, value in parts.items()}
    reported = set(numbers)
    numbers["hit@1"] = found.hit
    numbers["well_formed"] = torch.tensor([float(tcot.is_well_formed) for tcot in batch.tcots])
    numbers["false_negatives"] = found.false_negatives.double().masked_fill(~batch.valid, torch.nan)
    if evidence is not None:
        numbers["evidence"] = evidence
    result: dict[str, float] = {}
    for name, value in numbers.items():
        if value.shape != (len(batch),):
            raise ValueError(f"part {name!r} must have shape ({len(batch)},); got {tuple(value.shape)}")
        value = value.double().cpu()
        known = ~value.isnan()
        selections = {side: known & (batch.side == number) for number, side in enumerate(SIDES)} | {"mean": known}
        result |= {f"embedrl/{name}/{key}": float(value[rows].mean()) for key, rows in selections.items() if rows.any()}
        if name in reported:
            result[f"embedrl/unknown/{name}"] = float((~known).sum())
    result["embedrl/rows"] = float(len(batch))
    result["embedrl/failed_rows"] = float((~batch.valid).sum())
    result["embedrl/rows_without_partner"] = float((batch.valid & found.hit.isnan()).sum())
    return result
