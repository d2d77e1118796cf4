# SPDX-License-Identifier: Apache-2.0
"""RewardBatch: everything a reward function may look at, for all rollouts of one step.

A row is one rollout of one side of one pair. Rows stand in the caller's order and every result has that order; who
belongs together is said by `pair` and `side`, never by position, so any number of rollouts a side works, and a missing
partner too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from embedrl_verl.errors import ConfigError
from embedrl_verl.rewards.exact import similarity_matrix
from embedrl_verl.rewards.outcome import Accuracy, OutcomeReward, Retrieval, retrieval
from embedrl_verl.rewards.ranks import Positives, Ranks, positive_ranks
from embedrl_verl.tcot import TCoT, format_reward

Side = Literal["query", "target"]
SIDES: tuple[Side, Side] = ("query", "target")
# Gives the process term (N,) of a batch, NaN = unknown (paper eq. 4).
Judge: TypeAlias = "Callable[[RewardBatch], Awaitable[Tensor]]"
# A float32 embedding that was normalised in bfloat16 is off by up to 0.004.
_LENGTH_TOLERANCE = 0.01


@dataclass(frozen=True)
class Direction:
    """One direction of the retrieval: rows of one side over columns of the other.

    `similarity`: (R, C) float32 cosines, NaN where a row or column is invalid. `rows` (R,), `cols` (C,): int64 indices
    into the batch. `row_pair` (R,), `col_pair` (C,), `col_content` (C, K): int64. `row_valid` (R,), `col_valid` (C,):
    bool.
    """

    similarity: Tensor
    rows: Tensor
    cols: Tensor
    row_pair: Tensor
    col_pair: Tensor
    col_content: Tensor
    row_valid: Tensor
    col_valid: Tensor


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

    def __post_init__(self) -> None:
        rows = self.side.numel()
        for name in ("side", "pair", "rollout", "valid"):
            value: Tensor = getattr(self, name)
            dtype = torch.bool if name == "valid" else torch.int64
            if value.shape != (rows,) or value.dtype != dtype:
                raise ValueError(f"{name} must be ({rows},) {dtype}; got {tuple(value.shape)} {value.dtype}")
        if self.content.dim() != 2 or len(self.content) != rows or self.content.dtype != torch.int64:
            got = f"{tuple(self.content.shape)} {self.content.dtype}"
            raise ValueError(f"content must be ({rows}, K) torch.int64; got {got}")
        for name, size in (("tcots", len(self.tcots)), ("required", len(self.required))):
            if size != rows:
                raise ValueError(f"{name} must have one entry for each of {rows} rows; got {size}")
        shape = (self.query_rows.numel(), self.target_rows.numel())
        if self.similarity.shape != shape or sum(shape) != rows:
            raise ValueError(
                f"similarity must be (query rows, target rows) = {shape} of {rows} rows; "
                f"got {tuple(self.similarity.shape)}"
            )
        if self.raw_similarity is not None and self.raw_similarity.shape != shape:
            raise ValueError(f"raw_similarity must be {shape} as similarity is; got {tuple(self.raw_similarity.shape)}")
        if self.lengths is not None and self.lengths.shape != (rows,):
            raise ValueError(f"lengths must be ({rows},); got {tuple(self.lengths.shape)}")

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
        embeddings = embeddings.detach().cpu()
        valid = torch.ones_like(side, dtype=torch.bool) if valid is None else valid.to(torch.bool).cpu()
        content = content[:, None] if content.dim() == 1 else content
        shapes = {"pair": pair, "rollout": rollout, "content": content, "valid": valid, "embeddings": embeddings}
        if raw_embeddings is not None:
            shapes["raw_embeddings"] = raw_embeddings
        for name, value in shapes.items():
            wide = {"content": "(N,) or (N, K)", "embeddings": "(N, D)", "raw_embeddings": "(N, D)"}
            if value.dim() != (2 if name in wide else 1) or len(value) != len(side):
                kind = wide.get(name, "(N,)")
                raise ValueError(f"{name} must be {kind} with N = {len(side)} as side has; got {tuple(value.shape)}")
        valid = valid & embeddings.isfinite().all(dim=1)
        _check_rows(side, pair, rollout, content)
        _check_norms(embeddings, valid)
        order = _lexicographic(pair, rollout)  # rows of a pair side by side: the masks are made once a pair
        query_rows, target_rows = order[side[order] == 0], order[side[order] == 1]
        raw = None
        if raw_embeddings is not None:
            raw_embeddings = raw_embeddings.detach().cpu()
            known = raw_embeddings.isfinite().all(dim=1)
            _check_norms(raw_embeddings, known)
            raw = _cosines(raw_embeddings, known, query_rows, target_rows)
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

        Raises:
            ConfigError: raw, and the raw inputs were not embedded.
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
            col_content=self.content[cols],
            row_valid=valid[rows],
            col_valid=valid[cols],
        )

    def raw_valid(self) -> Tensor:
        """(N,) bool, the row's input has an embedding without T-CoT.

        Raises:
            ConfigError: the raw inputs were not embedded.
        """
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
        """Outcome reward of both directions, Hit@1 and false negatives: (N,) each, NaN where unknown."""
        numbers = torch.full((4, len(self)), torch.nan)
        false_negatives = torch.zeros(len(self), dtype=torch.int64)
        for side in SIDES:
            way = self.direction(side)
            found = retrieval(
                way.similarity,
                way.row_pair,
                way.col_pair,
                col_content=way.col_content,
                col_valid=way.col_valid,
                row_valid=way.row_valid,
                temperature=temperature,
                accuracy=accuracy,
            )
            numbers[:, way.rows] = torch.stack((*found.reward, found.hit))
            false_negatives[way.rows] = found.false_negatives
        acc, margin, outcome, hit = numbers
        return Retrieval(OutcomeReward(acc, margin, outcome), hit, false_negatives)

    def ranks(
        self,
        *,
        raw: bool = False,
        among: Tensor | None = None,
        temperature: float | None = None,
        by_pair: bool = False,
        positives: Positives = "mean",
    ) -> Ranks:
        """Ranks of the own pair's columns in both directions (see `positive_ranks`): (N,) each, NaN where unknown.

        Args:
            raw: of the raw inputs.
            among: (N,) bool, the rows to rank, which are also the candidates. Default: all that have an embedding.
            temperature, by_pair, positives: as in `positive_ranks`.

        Raises:
            ConfigError: raw, and the raw inputs were not embedded.
        """
        numbers = torch.full((3, len(self)), torch.nan)
        for side in SIDES:
            way = self.direction(side, raw=raw)
            found = positive_ranks(
                way.similarity,
                way.row_pair,
                way.col_pair,
                col_content=way.col_content,
                col_valid=way.col_valid if among is None else way.col_valid & among[way.cols],
                row_valid=way.row_valid if among is None else way.row_valid & among[way.rows],
                temperature=temperature,
                by_pair=by_pair,
                positives=positives,
            )
            numbers[:, way.rows] = torch.stack(found)
        return Ranks(*numbers)

    def process(self) -> Tensor:
        """J: (N,) float32 from the judge, NaN = unknown. Waits for it; call once, in a thread without a running event
        loop.

        Raises:
            ValueError: the batch has no judge, or it returned another shape.
        """
        return asyncio.run(self.judged())

    async def judged(self) -> Tensor:
        """`process` for a reward function that is itself async."""
        if self.judge is None:
            raise ValueError("the batch has no judge; pass judge= to RewardBatch.build or leave the process term out")
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


def _cosines(vectors: Tensor, valid: Tensor, query_rows: Tensor, target_rows: Tensor) -> Tensor:
    """(N_q, N_t) float32 of (N, D) vectors, NaN where a row is not valid."""
    vectors = vectors.masked_fill(~valid[:, None], 0.0)
    similarity = similarity_matrix(vectors[query_rows], vectors[target_rows])
    similarity[~valid[query_rows]] = torch.nan
    similarity[:, ~valid[target_rows]] = torch.nan
    return similarity


def _lexicographic(pair: Tensor, rollout: Tensor) -> Tensor:
    by_rollout = rollout.argsort(stable=True)
    return by_rollout[pair[by_rollout].argsort(stable=True)]


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


def _check_norms(embeddings: Tensor, valid: Tensor) -> None:
    length = embeddings.float().norm(dim=1)
    off = (valid & ~((length - 1).abs() <= _LENGTH_TOLERANCE)).nonzero()
    if len(off):
        row = int(off[0])
        raise ValueError(
            f"embeddings must have length 1; row {row} has length {float(length[row]):.4g}. "
            "Normalise them, and mark failed ones with NaN or valid=False instead of a zero vector"
        )
