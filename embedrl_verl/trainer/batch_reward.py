# SPDX-License-Identifier: Apache-2.0
"""The reward stage of a step: rows out of TransferQueue, embeddings, the reward function, scores back in.

Rows are linked by fields (pair, side, session), never by position. A row without an embedding is unknown: it is
nobody's candidate, its reward stays NaN, and in training it gets no gradient. Too many of them stop the run.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf
from verl.utils import tensordict_utils as tu

from embedrl_verl.data.identity import ContentId, shares_content
from embedrl_verl.errors import EmbedderError
from embedrl_verl.rewards import Judge, RewardBatch, batch_metrics
from embedrl_verl.rewards.dump import write_reward_dump
from embedrl_verl.tcot import TCoT, parse_tcot
from embedrl_verl.trainer.rows import EMBED_PARTITION, ROW_INFO, raw_key

SIDES = ("query", "target")

_FIELDS = [
    "responses",
    "extra_fields",
    "embedrl_pair_id",
    "embedrl_side",
    "embedrl_query_content",
    "embedrl_target_content",
    "embedrl_required",
    "data_source",
]


class EmbedsRows(Protocol):
    """What the stage needs of an Embedder: keys and partition -> (N, D) float32, and why each failed row failed."""

    def __call__(self, keys: Sequence[str], partition_id: str) -> tuple[torch.Tensor, Mapping[int, str]]: ...


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
        return self.key.split("_")[0]


@dataclass
class ScoredRows:
    """The stage's result, in the order of `rows`. `parts` are (N,) float32 with NaN for unknown."""

    rows: list[Row]
    batch: RewardBatch
    embeddings: torch.Tensor
    failures: dict[int, str]
    parts: dict[str, torch.Tensor]
    metrics: dict[str, float] = field(default_factory=dict)

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
            "text_keywords": list(tcot.text_keywords),
            "bbox_2d": [[box.x1, box.y1, box.x2, box.y2, box.image] for box in tcot.boxes],
            "key_frames": list(tcot.key_frames),
            "evidence": row.evidence,
            "failure": self.failures.get(index),
            "reward": {name: _finite(value[index].item()) for name, value in self.parts.items()},
        }

    def write_dump(self, path: Path, function: DictConfig) -> None:
        """Everything that `embedrl reward try` needs to compute these rewards again, or others.

        Args:
            function: `reward.custom_reward_function`.
        """
        named = cast("dict[str, Any]", OmegaConf.to_container(function, resolve=True))
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


def _finite(value: float) -> float | None:
    return value if value == value else None


def read_rows(keys: Sequence[str], partition_id: str) -> list[Row]:
    """The finished rollouts of a batch, sorted by (pair, side, session) so that arrival order never matters.

    Raises:
        EmbedderError: TransferQueue lost rows or the rows were not written by the agent loop `tcot`.
    """
    data = tq.kv_batch_get(keys=list(keys), partition_id=partition_id, select_fields=_FIELDS)
    missing = [name for name in _FIELDS if name not in set(data.keys())]
    if missing or len(data) != len(keys):
        raise EmbedderError(
            f"asked the queue for {len(keys)} rows with {_FIELDS}, got {len(data)} without {missing or 'nothing'}; "
            "rollouts must come from the agent loop `tcot` over TCoTDataset "
            "(actor_rollout_ref.rollout.agent.default_agent_loop)"
        )
    lengths = data["responses"].offsets().diff().tolist()
    columns = {name: tu_list(data, name) for name in _FIELDS if name != "responses"}
    rows = []
    for i, key in enumerate(keys):
        info = columns["extra_fields"][i][ROW_INFO]
        tcot = parse_tcot(info["text"], num_frames=info["num_frames"] or None, num_images=info["num_images"] or None)
        rows.append(
            Row(
                key=key,
                pair_id=str(columns["embedrl_pair_id"][i]),
                side=SIDES.index(str(columns["embedrl_side"][i])),
                session=int(key.split("_")[1]),
                content=ContentId(*(int(columns[f"embedrl_{side}_content"][i]) for side in SIDES)),
                required=str(columns["embedrl_required"][i]),
                source=str(columns["data_source"][i]),
                tcot=tcot,
                num_images=int(info["num_images"]),
                num_frames=int(info["num_frames"]),
                evidence=int(info["evidence"]),
                failure=info["failure"],
                response_tokens=int(lengths[i]),
            )
        )
    return sorted(rows, key=lambda row: (row.pair_id, row.side, row.session, row.key))


def tu_list(data: Any, name: str) -> list[Any]:
    """A non-tensor (or one-value-per-row tensor) column as a plain list."""
    column = data.get(name)
    return list(column.tolist())


def score_rows(
    rows: list[Row],
    embed_rows: EmbedsRows,
    score_batch: Callable[[RewardBatch], dict[str, torch.Tensor]],
    *,
    max_failed_share: float,
    expected_rows: int,
    judge: Judge | None = None,
    raw: bool = False,
) -> ScoredRows:
    """Embed the rows, build the RewardBatch and call the reward function once.

    Args:
        rows: finished rollouts, in the order of `read_rows`.
        embed_rows: failed rows are given by position.
        score_batch: `EmbedderGuidedRewardManager.score_batch`.
        max_failed_share: share of `expected_rows` that may be missing or without embedding.
        expected_rows: rows that a complete batch has; the rest are rollouts that failed.
        judge: gives the process term, if the reward function asks for it.
        raw: the agent loop has left the raw inputs in the queue: embed them too.

    Raises:
        EmbedderError: more failures than `max_failed_share`; the message counts them by cause.
    """
    start = time.perf_counter()
    failures = {i: row.failure for i, row in enumerate(rows) if row.failure is not None}
    present = [i for i in range(len(rows)) if i not in failures]
    raw_uids = _uids_with_raw_input(rows) if raw else []
    embeddings, raw_embeddings = torch.empty(0), None
    if present:
        first = _first_of_equal(rows, present)
        firsts = sorted(set(first.values()))
        vectors, failed = embed_rows([*(rows[i].key for i in firsts), *map(raw_key, raw_uids)], EMBED_PARTITION)
        place = {i: number for number, i in enumerate(firsts)}
        failures.update({i: failed[place[first[i]]] for i in present if place[first[i]] in failed})
        embeddings = torch.full((len(rows), vectors.shape[1]), float("nan"), dtype=torch.float32)
        embeddings[present] = vectors[[place[first[i]] for i in present]].float()
        if raw:
            raw_embeddings = torch.full_like(embeddings, float("nan"))
            raw_place = {uid: len(firsts) + i for i, uid in enumerate(raw_uids)}
            with_raw = [i for i, row in enumerate(rows) if row.uid in raw_place]
            raw_embeddings[with_raw] = vectors[[raw_place[rows[i].uid] for i in with_raw]].float()
    embed_s = time.perf_counter() - start
    _check_failures(rows, failures, max_failed_share, expected_rows)

    start = time.perf_counter()
    valid = torch.tensor([i not in failures for i in range(len(rows))])
    pairs = {pair_id: number for number, pair_id in enumerate(sorted({row.pair_id for row in rows}))}
    batch = RewardBatch.build(
        side=torch.tensor([row.side for row in rows]),
        pair=torch.tensor([pairs[row.pair_id] for row in rows]),
        rollout=torch.tensor([row.session for row in rows]),
        content=torch.tensor([row.content for row in rows]),
        tcots=[row.tcot for row in rows],
        required=[row.required for row in rows],
        embeddings=embeddings,
        valid=valid,
        lengths=torch.tensor([row.response_tokens for row in rows]),
        raw_embeddings=raw_embeddings,
        judge=judge,
    )
    parts = score_batch(batch)
    metrics = batch_metrics(batch, parts, evidence=torch.tensor([row.evidence for row in rows]))
    if raw_embeddings is not None:
        metrics["embedrl/rows_without_raw"] = float(raw_embeddings.isnan().any(dim=1).sum())
    metrics["embedrl/rows_without_negatives"] = float(_rows_without_negatives(batch))
    metrics["embedrl/rollouts_missing"] = float(max(expected_rows - len(rows), 0))
    metrics["timing_s/reward_embed"] = embed_s
    metrics["timing_s/reward_score"] = time.perf_counter() - start
    return ScoredRows(rows, batch, embeddings, failures, parts, metrics)


def _first_of_equal(rows: Sequence[Row], present: Sequence[int]) -> dict[int, int]:
    """For each row the first one of its prompt that says the same, word for word.

    Both have the same input for the Embedder. Embedded apart, their vectors could differ by the rounding of their
    micro-batches, and GRPO would make advantages of it.
    """
    seen: dict[tuple[str, str], int] = {}
    return {i: seen.setdefault((rows[i].uid, rows[i].tcot.text), i) for i in present}


def _uids_with_raw_input(rows: list[Row]) -> list[str]:
    """Prompts whose input without T-CoT lies in the queue."""
    listed = (tq.kv_list(EMBED_PARTITION) or {}).get(EMBED_PARTITION, {})
    return [uid for uid in dict.fromkeys(row.uid for row in rows) if raw_key(uid) in listed]


def _check_failures(rows: list[Row], failures: Mapping[int, str], max_share: float, expected: int) -> None:
    lost = max(expected - len(rows), 0)
    total = max(expected, len(rows))
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


def _rows_without_negatives(batch: RewardBatch) -> int:
    """Valid rows to which every valid row of the other side is a right answer."""
    count = 0
    for side in (0, 1):
        own, others = (batch.content[of_side & batch.valid] for of_side in (batch.side == side, batch.side != side))
        count += int(shares_content(own, others.unique(dim=0)).all(dim=1).sum())
    return count


def check_scores(scored: ScoredRows, function: str) -> None:
    """Refuse a batch that would train on nothing: every row masked, and a loss of 0 / 0; or on similarity alone, which
    is highest where all vectors are the same.

    Args:
        function: the reward function's "path:name", for the message.

    Raises:
        EmbedderError: no row has a score, or the score has an outcome and no row has a negative.
    """
    nothing = scored.parts["score"].isnan().all()
    no_negatives = scored.metrics["embedrl/rows_without_negatives"] == scored.batch.valid.sum()
    if nothing or ("outcome" in scored.parts and no_negatives):
        queries, targets = (len(set(ids)) for ids in zip(*(row.content for row in scored.rows), strict=True))
        raise EmbedderError(
            f"the reward function {function} gives none of {len(scored.rows)} rows a score"
            f"{'' if nothing else ' that depends on a negative'}, so there is nothing to train on "
            f"({len(scored.failures)} have no embedding, the batch has {queries} different queries and {targets} "
            "different targets). A reward of retrieval needs two pairs that differ in both (the same "
            "query_id or target_id is the same content)"
        )


def write_scores(scored: ScoredRows, partition_id: str, *, training: bool, groups: bool = True) -> None:
    """Put `rm_scores` (the reward on the last response token), and take unknown rows out of training.

    An unknown row has a zero response mask, so that it has no gradient, and a group of its own, so that the advantages
    of the others are those of the known rows. So has a row that is the only known one of its group: it has nothing to
    be compared with (`groups`: a prompt has several rollouts). As `rm_scores` an unknown row has the mean of the known
    ones of its group (else of the batch), for verl's own means.

    Raises:
        EmbedderError: no row of a training batch is left.
    """
    rows, score = scored.rows, scored.parts["score"]
    known = score.isfinite().tolist()
    uids = Counter(row.uid for row, is_known in zip(rows, known, strict=True) if is_known)
    stand_in = _means(rows, score)
    values = []
    for row, value, is_known in zip(rows, score.tolist(), known, strict=True):
        tokens = torch.zeros(row.response_tokens)
        tokens[-1:] = value if is_known else stand_in(row)
        values.append(tokens)
    fields: dict[str, Any] = {"rm_scores": torch.nested.as_nested_tensor(values, layout=torch.jagged)}
    if training:
        tq.kv_batch_put(keys=[r.key for r in rows], partition_id=partition_id, fields=tu.get_tensordict(fields))
        least = 2 if groups else 1
        apart = [row for row, is_known in zip(rows, known, strict=True) if not is_known or uids[row.uid] < least]
        if len(apart) == len(rows):
            raise EmbedderError(
                f"no prompt of this batch has {least} rollouts with a known reward, so there is nothing to train on: "
                f"{sum(known)} of {len(rows)} rows have one. Look at the judge (judge/unknown_rate) and the Embedder "
                "(embedrl/failed_rows)"
            )
        scored.metrics["embedrl/rows_without_advantage"] = float(len(apart))
        if apart:
            zeros = [torch.zeros(row.response_tokens, dtype=torch.int64) for row in apart]
            masks = torch.nested.as_nested_tensor(zeros, layout=torch.jagged)
            keys = [row.key for row in apart]
            tq.kv_batch_put(
                keys=keys,
                partition_id=partition_id,
                fields=tu.get_tensordict({"response_mask": masks, "loss_mask": masks.clone(), "uid": keys}),
            )
        return
    # Validation reads its per-row numbers from extra_fields["reward_extra_info"]; an unknown number is left out.
    data = tq.kv_batch_get(keys=[r.key for r in rows], partition_id=partition_id, select_fields=["extra_fields"])
    extras = tu_list(data, "extra_fields")
    for i, extra in enumerate(extras):
        numbers = {name: _finite(value[i].item()) for name, value in scored.parts.items()}
        extra["reward_extra_info"] = {name: value for name, value in numbers.items() if value is not None}
    fields["extra_fields"] = extras
    tq.kv_batch_put(keys=[row.key for row in rows], partition_id=partition_id, fields=tu.get_tensordict(fields))


def _means(rows: Sequence[Row], score: torch.Tensor) -> Callable[[Row], float]:
    """The mean score of a row's group, else of all rows, else 0."""
    known = [(row.uid, value) for row, value in zip(rows, score.tolist(), strict=True) if value == value]
    groups: dict[str, list[float]] = {}
    for uid, value in known:
        groups.setdefault(uid, []).append(value)
    everywhere = [value for _, value in known] or [0.0]

    def mean(row: Row) -> float:
        values = groups.get(row.uid, everywhere)
        return sum(values) / len(values)

    return mean


def clear_embed_rows(uids: set[str]) -> None:
    """Drop everything that rollouts of these prompts left in the embed partition, also of failed sessions."""
    listed = tq.kv_list(EMBED_PARTITION) or {}
    keys = [key for key in listed.get(EMBED_PARTITION, {}) if key.split("_")[0] in uids]
    if keys:
        tq.kv_clear(keys=keys, partition_id=EMBED_PARTITION)
