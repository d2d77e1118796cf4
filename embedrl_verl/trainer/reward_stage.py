# SPDX-License-Identifier: Apache-2.0
"""The parts of the reward stage, which `egrl` puts in order: rows out of TransferQueue, their vectors, scores back in.

Rows are linked by fields (pair, side, session), never by position. A row without an embedding is unknown: it is
nobody's candidate, its reward stays NaN, and in training it gets no gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from torch import Tensor
from verl.utils import tensordict_utils as tu

from embedrl_verl.data.identity import ContentId, shares_content
from embedrl_verl.errors import EmbedderError
from embedrl_verl.rewards import SIDES, Judge, RewardBatch, batch_metrics
from embedrl_verl.rewards.dump import write_reward_dump
from embedrl_verl.rewards.score import refuse_all_unknown
from embedrl_verl.tcot import TCoT
from embedrl_verl.tcot.evidence import KINDS

EMBED_PARTITION = "embed"
"""TransferQueue partition of the Embedder's inputs (or vectors); keys are those of verl's rows."""
ROW_INFO = "embedrl"
"""Key in a row's `extra_fields`: its parsed T-CoT, media counts, evidence and why the row failed (or None)."""
_FIELDS = (
    *("responses", "extra_fields", "embedrl_pair_id", "embedrl_side", "embedrl_query_content"),
    *("embedrl_target_content", "embedrl_required", "data_source"),
)


def raw_key(uid: str) -> str:
    """Key, in partition `embed`, of a prompt's input without any T-CoT."""
    return f"{uid}_raw"


# ---------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """One finished rollout. `side`: 0 query, 1 target; `session` counts a prompt's rollouts from 0."""

    key: str
    pair_id: str
    side: int
    session: int
    content: ContentId
    required: str
    source: str
    tcot: TCoT
    num_images: int
    num_frames: int
    evidence: int
    failure: str | None
    response_tokens: int

    @property
    def uid(self) -> str:
        """verl's id of the prompt."""
        return self.key.split("_")[0]


def read_rows(keys: Sequence[str], partition_id: str) -> list[Row]:
    """The finished rollouts of a batch, sorted by (pair, side, session) so that arrival order never matters."""
    data = tq.kv_batch_get(keys=list(keys), partition_id=partition_id, select_fields=list(_FIELDS))
    missing = [name for name in _FIELDS if name not in set(data.keys())]
    if missing or len(data) != len(keys):
        raise EmbedderError(
            f"asked the queue for {len(keys)} rows with {_FIELDS}, got {len(data)} without {missing or 'nothing'}; "
            "rollouts must come from the agent loop `tcot` over TCoTDataset "
            "(actor_rollout_ref.rollout.agent.default_agent_loop)"
        )
    lengths = data["responses"].offsets().diff().tolist()
    columns = {name: column(data, name) for name in _FIELDS if name != "responses"}
    rows = []
    for i, key in enumerate(keys):
        info = columns["extra_fields"][i][ROW_INFO]
        rows.append(
            Row(
                key=key,
                pair_id=str(columns["embedrl_pair_id"][i]),
                side=SIDES.index(columns["embedrl_side"][i]),
                session=int(key.split("_")[1]),
                content=ContentId(*(int(columns[f"embedrl_{side}_content"][i]) for side in SIDES)),
                required=str(columns["embedrl_required"][i]),
                source=str(columns["data_source"][i]),
                tcot=TCoT.from_plain(info["tcot"]),
                num_images=int(info["num_images"]),
                num_frames=int(info["num_frames"]),
                evidence=int(info["evidence"]),
                failure=info["failure"],
                response_tokens=int(lengths[i]),
            )
        )
    return sorted(rows, key=lambda row: (row.pair_id, row.side, row.session, row.key))


def column(data: Any, name: str) -> list[Any]:
    """A non-tensor (or one-value-per-row tensor) column of TransferQueue's data as a plain list."""
    return list(data.get(name).tolist())


# ---------------------------------------------------------------------- vectors


class EmbedsRows(Protocol):
    """What the stage needs of an Embedder: keys and partition -> (N, D) float32, and why each failed row failed."""

    def __call__(self, keys: Sequence[str], partition_id: str) -> tuple[Tensor, Mapping[int, str]]: ...


@dataclass(frozen=True)
class Vectors:
    """(N, D) float32 in the order of the rows, NaN where there is none; `failures`: row -> why it has none.

    `raw`: of the rows' inputs without T-CoT, or None where nobody wants them.
    """

    embeddings: Tensor
    raw: Tensor | None
    failures: dict[int, str]


def embed_rows(rows: Sequence[Row], embed: EmbedsRows, *, raw: bool = False) -> Vectors:
    """Embed what the agent loop has left of each row in the queue.

    Rollouts of a prompt that say the same, word for word, are embedded once: embedded apart, their vectors could differ
    by the rounding of their micro-batches, and GRPO would make advantages of it.

    Args:
        raw: embed the prompts' inputs without T-CoT too, as far as they lie in the queue.
    """
    failures = {i: row.failure for i, row in enumerate(rows) if row.failure is not None}
    first: dict[tuple[str, str], str] = {}
    own = {i: first.setdefault((row.uid, row.tcot.text), row.key) for i, row in enumerate(rows) if i not in failures}
    raw_keys: list[str] = []
    if raw:
        listed = (tq.kv_list(EMBED_PARTITION) or {}).get(EMBED_PARTITION, {})
        raw_keys = [key for key in dict.fromkeys(raw_key(row.uid) for row in rows) if key in listed]
    keys = [*first.values(), *raw_keys]
    vectors, failed = embed(keys, EMBED_PARTITION) if first else (torch.full((0, 1), torch.nan), {})
    place = {key: i for i, key in enumerate(keys)} if first else {}
    failures |= {i: failed[place[key]] for i, key in own.items() if place[key] in failed}

    def gathered(of_rows: Sequence[int | None]) -> Tensor:
        none = vectors.new_full((1, vectors.shape[1]), torch.nan)
        return torch.cat((vectors, none))[[-1 if i is None else i for i in of_rows]].float()

    return Vectors(
        gathered([place[own[i]] if i in own else None for i in range(len(rows))]),
        gathered([place.get(raw_key(row.uid)) for row in rows]) if raw else None,
        dict(sorted(failures.items())),
    )


def refuse_failures(rows: Sequence[Row], failures: Mapping[int, str], max_share: float, expected: int) -> None:
    """Stop a step of which too many rows have no embedding.

    Args:
        expected: rows that a complete batch has; what lacks are rollouts that failed.
    """
    lost, total = max(expected - len(rows), 0), max(expected, len(rows))
    if (len(failures) + lost) / total <= max_share:
        return
    causes = Counter(failures.values())
    if lost:
        causes["the rollout failed (see the agent loop worker's log)"] = lost
    listed = "; ".join(f"{count} x {cause}" for cause, count in causes.most_common(5))
    raise EmbedderError(
        f"{len(failures) + lost} of {total} rows have no embedding, more than embedrl.reward.max_failed_share="
        f"{max_share}. Causes: {listed}"
    )


# ---------------------------------------------------------------------- the reward


def reward_batch(rows: Sequence[Row], vectors: Vectors, judge: Judge | None = None) -> RewardBatch:
    """What the reward function sees: the rows in their order, and the similarity of their vectors."""
    pairs = {pair_id: number for number, pair_id in enumerate(sorted({row.pair_id for row in rows}))}
    return RewardBatch.build(
        side=torch.tensor([row.side for row in rows]),
        pair=torch.tensor([pairs[row.pair_id] for row in rows]),
        rollout=torch.tensor([row.session for row in rows]),
        content=torch.tensor([row.content for row in rows]),
        tcots=[row.tcot for row in rows],
        required=[row.required for row in rows],
        embeddings=vectors.embeddings,
        valid=torch.tensor([i not in vectors.failures for i in range(len(rows))]),
        lengths=torch.tensor([row.response_tokens for row in rows]),
        raw_embeddings=vectors.raw,
        judge=judge,
    )


@dataclass
class ScoredRows:
    """A step's rows with their vectors and rewards. `parts` are (N,) float32 with NaN for unknown."""

    rows: list[Row]
    batch: RewardBatch
    vectors: Vectors
    parts: dict[str, Tensor]
    metrics: dict[str, float] = field(default_factory=dict)

    def _without_negatives(self) -> int:
        """Valid rows to which every valid row of the other side is a right answer."""
        batch, count = self.batch, 0
        for side in (0, 1):
            own, others = (batch.content[mask & batch.valid] for mask in (batch.side == side, batch.side != side))
            count += int(shares_content(own, others.unique(dim=0)).all(dim=1).sum())
        return count

    def measure(self, expected: int) -> None:
        """Fill `metrics` with the numbers of the step (`embedrl/...`)."""
        evidence = torch.tensor([row.evidence for row in self.rows])
        self.metrics |= batch_metrics(self.batch, self.parts, evidence=evidence)
        if self.vectors.raw is not None:
            self.metrics["embedrl/rows_without_raw"] = float(self.vectors.raw.isnan().any(dim=1).sum())
        self.metrics["embedrl/rows_without_negatives"] = float(self._without_negatives())
        self.metrics["embedrl/rollouts_missing"] = float(max(expected - len(self.rows), 0))

    def describe(self, index: int) -> dict[str, Any]:
        """What a rollout dump says of one row (JSON values; unknown numbers are null)."""
        row, tcot = self.rows[index], self.rows[index].tcot
        return {
            "pair_id": row.pair_id,
            "side": SIDES[row.side],
            "data_source": row.source,
            "rollout": row.session,
            "well_formed": tcot.is_well_formed,
            "problems": list(tcot.problems),
            "required": row.required,
            **{key: list(map(kind.shown, tcot.evidence.get(key, ()))) for key, kind in KINDS.items()},
            "evidence": row.evidence,
            "failure": self.vectors.failures.get(index),
            "reward": {name: _known(value[index]) for name, value in self.parts.items()},
        }

    def write_dump(self, path: Path, function: Any) -> None:
        """Everything that `embedrl reward try` needs to compute these rewards again, or others."""
        named: Any = OmegaConf.to_container(function, resolve=True)
        write_reward_dump(
            path,
            self.batch,
            self.parts,
            function=f"{named['path']}:{named['name']}",
            kwargs=named.get("reward_kwargs"),
            rows=[
                {
                    "pair_id": row.pair_id,
                    "data_source": row.source,
                    "text": row.tcot.text,
                    "num_images": row.num_images,
                    "num_frames": row.num_frames,
                }
                for row in self.rows
            ],
        )


def _known(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()


def check_scores(scored: ScoredRows, function: str) -> None:
    """Refuse a batch that would train on nothing: every row masked, and a loss of 0 / 0; or on similarity alone, which
    is highest where all vectors are the same.
    """
    nothing = scored.parts["score"].isnan().all()
    alone = scored.metrics["embedrl/rows_without_negatives"] == scored.batch.valid.sum()
    if not alone:
        refuse_all_unknown(scored.parts["score"], function, "the batch's rows")
    if nothing or ("outcome" in scored.parts and alone):
        queries, targets = (len(set(ids)) for ids in zip(*(row.content for row in scored.rows), strict=True))
        raise EmbedderError(
            f"the reward function {function} gives none of {len(scored.rows)} rows a score"
            f"{'' if nothing else ' that depends on a negative'}, so there is nothing to train on "
            f"({len(scored.vectors.failures)} have no embedding, the batch has {queries} different queries and "
            f"{targets} different targets). A reward of retrieval needs two pairs that differ in both (the same "
            "query_id or target_id is the same content)"
        )


# ---------------------------------------------------------------------- back into the queue


def write_scores(scored: ScoredRows, *, groups: bool = True) -> None:
    """Put `rm_scores` of a training batch (the reward on the last response token), and mask what is unknown.

    An unknown row has a zero response mask, so that it has no gradient, and a group of its own, so that the advantages
    of the others are those of the known rows. So has a row that is the only known one of its group: it has nothing to
    be compared with (`groups`: a prompt has several rollouts).
    """
    rows, known = scored.rows, scored.parts["score"].isfinite().tolist()
    members = Counter(row.uid for row, is_known in zip(rows, known, strict=True) if is_known)
    least = 2 if groups else 1
    apart = [row for row, is_known in zip(rows, known, strict=True) if not is_known or members[row.uid] < least]
    if len(apart) == len(rows):
        raise EmbedderError(
            f"no prompt of this batch has {least} rollouts with a known reward, so there is nothing to train on: "
            f"{sum(known)} of {len(rows)} rows have one. Look at the judge (judge/unknown_rate) and the Embedder "
            "(embedrl/failed_rows)"
        )
    scored.metrics["embedrl/rows_without_advantage"] = float(len(apart))
    _put("train", rows, rm_scores=_rm_scores(scored))
    if apart:
        masks = _jagged([torch.zeros(row.response_tokens, dtype=torch.int64) for row in apart])
        _put("train", apart, response_mask=masks, loss_mask=masks.clone(), uid=[row.key for row in apart])


def write_validation_scores(scored: ScoredRows, partition_id: str) -> None:
    """Put `rm_scores` of validation rows, and each row's known parts where verl's validation reads them."""
    keys = [row.key for row in scored.rows]
    data = tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=["extra_fields"])
    extras = column(data, "extra_fields")
    for i, extra in enumerate(extras):
        numbers = {name: _known(value[i]) for name, value in scored.parts.items()}
        extra["reward_extra_info"] = {name: value for name, value in numbers.items() if value is not None}
    _put(partition_id, scored.rows, rm_scores=_rm_scores(scored), extra_fields=extras)


def _rm_scores(scored: ScoredRows) -> Tensor:
    """(N, tokens) jagged. An unknown row has the mean of the known ones of its group, else of the batch, else 0: for
    verl's own means of a batch, which know no NaN."""
    score, group = scored.parts["score"].double(), scored.batch.groups()
    known = score.isfinite()
    everywhere = score[known].mean() if known.any() else score.new_zeros(())
    sums, counts = (
        torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add(0, group[known], values)
        for values in (score[known], known[known].double())
    )
    filled = torch.where(known, score, torch.where(counts > 0, sums / counts, everywhere)[group])
    tokens = [torch.zeros(row.response_tokens) for row in scored.rows]
    for value, of_row in zip(filled.float(), tokens, strict=True):
        of_row[-1:] = value
    return _jagged(tokens)


def _jagged(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def _put(partition_id: str, rows: Sequence[Row], **fields: Any) -> None:
    keys = [row.key for row in rows]
    tq.kv_batch_put(keys=keys, partition_id=partition_id, fields=tu.get_tensordict(fields))


def clear_embed_rows(uids: set[str]) -> None:
    """Drop everything that rollouts of these prompts left in the embed partition, also of failed sessions."""
    listed = tq.kv_list(EMBED_PARTITION) or {}
    keys = [key for key in listed.get(EMBED_PARTITION, {}) if key.split("_")[0] in uids]
    if keys:
        tq.kv_clear(keys=keys, partition_id=EMBED_PARTITION)
