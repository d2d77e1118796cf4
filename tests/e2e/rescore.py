# SPDX-License-Identifier: Apache-2.0
"""Rewards of a dumped step computed again in one process, from the dump, the pair records and the Embedder alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from embedrl_verl.data.identity import content_id
from embedrl_verl.data.media import MediaLimits, load_item
from embedrl_verl.data.parquet import read_pairs
from embedrl_verl.embedder import Embedder, EmbedInput
from embedrl_verl.rewards import RewardBatch
from embedrl_verl.rewards.functions.no_judge import compute_score
from embedrl_verl.tcot import cut_evidence, parse_tcot

LIMITS = MediaLimits(28, image_min_tokens=1, image_max_tokens=16, frame_min_tokens=1, frame_max_tokens=16)


def rescore(
    rows: list[dict],
    parquets: Path | Sequence[Path],
    embedder: Path,
    *,
    batch_size: int,
    media_root: Path | None = None,
    part: str = "score",
) -> torch.Tensor:
    """(N,) float32: the part of the judge-free reward that each dumped row gets, in their order."""
    files = [parquets] if isinstance(parquets, Path) else parquets
    records = {record.pair_id: record for file in files for record in read_pairs(file)}
    inputs, tcots = [], []
    for row in rows:
        loaded = load_item(records[row["pair_id"]].item(row["side"]), media_root)
        tcot = parse_tcot(row["output"], num_frames=len(loaded.frames) or None, num_images=len(loaded.images) or None)
        evidence = cut_evidence(tcot, images=loaded.images, frames=loaded.frames, family="qwen2_vl")
        inputs.append(EmbedInput(loaded, tcot, evidence.images))
        tcots.append(tcot)
    model = Embedder.from_pretrained(embedder, limits=LIMITS)
    pairs = {pair_id: number for number, pair_id in enumerate(sorted(records))}
    batch = RewardBatch.build(
        side=torch.tensor([("query", "target").index(row["side"]) for row in rows]),
        pair=torch.tensor([pairs[row["pair_id"]] for row in rows]),
        rollout=torch.tensor([row["rollout"] for row in rows]),
        content=torch.tensor([content_id(records[row["pair_id"]], media_root) for row in rows]),
        tcots=tcots,
        required=[row["required"] for row in rows],
        embeddings=model.embed(inputs, batch_size=batch_size),
    )
    return compute_score(batch)[part]
