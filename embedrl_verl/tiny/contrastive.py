# SPDX-License-Identifier: Apache-2.0
"""Contrastive training of the tiny Embedder on input + true T-CoT + evidence, and on the raw input.

Symmetric InfoNCE over batches of one data source, put together from whole families of near numbers, so that every pair
has hard negatives. Two kinds of batches:

- `tcot`: input, true T-CoT and the evidence that it points at, on both sides;
- `raw`: the input alone on both sides, so that the baseline without T-CoT is a trained one too.

A share of the T-CoTs can have a short answer or digits replaced at random. By default none has: an Embedder that saw
short answers read the pictures itself, and could not tell poor T-CoTs from good ones in RL.

Command: `python -m embedrl_verl.tiny.contrastive --model DIR --world DIR --out DIR [--seed 0]`.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import AutoProcessor

from embedrl_verl.data.identity import content_id
from embedrl_verl.data.media import LoadedItem, load_item
from embedrl_verl.data.schema import SIDES, Item, Side
from embedrl_verl.embedder import Embedder, EmbedInput, info_nce
from embedrl_verl.embedder.batching import pack_rows
from embedrl_verl.embedder.model import embed_packed
from embedrl_verl.errors import ConfigError
from embedrl_verl.families import Family
from embedrl_verl.tcot import cut_evidence, parse_tcot
from embedrl_verl.tiny.digits import FAMILY_SIZE, Sample, cut_short, read_samples
from embedrl_verl.tiny.optim import MuonAdamW
from embedrl_verl.tiny.reasoner import family_of_folder, tiny_limits

View = Literal["raw", "tcot"]


@dataclass(frozen=True)
class ContrastiveConfig:
    """Settings of the contrastive stage.

    Attributes:
        steps: updates.
        lr, muon_lr, warmup: see `MuonAdamW`.
        families: families of near numbers in a batch; pairs = families * FAMILY_SIZE.
        temperature: of InfoNCE.
        raw_share: share of the batches without T-CoT.
        terse_share: share of the T-CoTs whose answer is cut short.
        corrupt_share: share of the T-CoTs in which some digits are wrong.
        corrupt_digits: probability that one digit of such a T-CoT is replaced.
    """

    steps: int = 400
    families: int = 8
    lr: float = 2e-3
    muon_lr: float = 3e-3
    warmup: int = 30
    temperature: float = 0.05
    raw_share: float = 0.4
    terse_share: float = 0.0
    corrupt_share: float = 0.0
    corrupt_digits: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.families, self.warmup) < 1 or min(self.lr, self.muon_lr, self.temperature) <= 0:
            raise ConfigError(f"steps, families, warmup, learning rates and temperature must be positive; got {self}")
        if not all(
            0 <= share <= 1 for share in (self.raw_share, self.terse_share, self.corrupt_share, self.corrupt_digits)
        ):
            raise ConfigError(f"shares and probabilities must be in [0, 1]; got {self}")


@cache
def _loaded(item: Item) -> LoadedItem:
    return load_item(item, None)


def embed_input(sample: Sample, side: Side, tcot: str | None, family: Family) -> EmbedInput:
    """What the Embedder reads of one side: the input alone, or with a T-CoT and the evidence that it points at.

    `family`: of the Reasoner, which the Embedder's is too.
    """
    item = _loaded(sample.record.item(side))
    if tcot is None:
        return EmbedInput(item)
    parsed = parse_tcot(tcot, num_frames=len(item.frames) or None, num_images=len(item.images) or None)
    evidence = cut_evidence(parsed, images=item.images, frames=item.frames, family=family)
    return EmbedInput(item, parsed, evidence.images)


def corrupt(tcot: str, probability: float, rng: np.random.Generator) -> str:
    """Replace each digit of the answer by a random one with this probability; box and keywords stay as they are."""
    start = tcot.index("<answer>")
    wrong = [str(rng.integers(10)) if sign.isdigit() and rng.random() < probability else sign for sign in tcot[start:]]
    return tcot[:start] + "".join(wrong)


def train_contrastive(embedder: Embedder, samples: Sequence[Sample], config: ContrastiveConfig) -> None:
    """Train in place.

    Args:
        samples: pairs grouped by source, families adjacent, as `read_samples` gives them.
    """
    rng = np.random.default_rng(config.seed)
    by_source: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_source[sample.record.data_source].append(sample)
    sources = list(by_source)
    optimizer = MuonAdamW(
        embedder.model, lr=config.lr, muon_lr=config.muon_lr, warmup=config.warmup, total=config.steps
    )
    losses: dict[View, list[float]] = {"raw": [], "tcot": []}
    started = time.monotonic()
    for step in range(1, config.steps + 1):
        pairs = by_source[sources[int(rng.integers(len(sources)))]]
        count = min(config.families, len(pairs) // FAMILY_SIZE)
        starts = FAMILY_SIZE * rng.choice(len(pairs) // FAMILY_SIZE, size=count, replace=False)
        batch = [pairs[start + i] for start in starts for i in range(FAMILY_SIZE)]
        view: View = "raw" if rng.random() < config.raw_share else "tcot"
        loss = _batch_loss(embedder, batch, view, config, rng)
        optimizer.step(loss)
        losses[view].append(loss.item())
        if step % 50 == 0 or step == config.steps:
            shown = ", ".join(f"loss {name} {np.mean(values[-20:]):.3f}" for name, values in losses.items() if values)
            print(f"contrastive: step {step}, {shown}, {time.monotonic() - started:.0f} s", flush=True)


def _batch_loss(
    embedder: Embedder, batch: Sequence[Sample], view: View, config: ContrastiveConfig, rng: np.random.Generator
) -> torch.Tensor:
    family = embedder.processor.family
    inputs = [embed_input(s, side, _tcot(s, side, view, config, rng), family) for side in SIDES for s in batch]
    rows = [embedder.processor.encode(one) for one in inputs]
    vectors = embed_packed(embedder.model.model, pack_rows(rows))
    same_query, same_target = torch.tensor([content_id(s.record, None) for s in batch]).T
    query, target = vectors.split(len(batch))
    return info_nce(query, target, temperature=config.temperature, query_content=same_query, target_content=same_target)


def _tcot(sample: Sample, side: Side, view: View, config: ContrastiveConfig, rng: np.random.Generator) -> str | None:
    if view == "raw":
        return None
    truth = sample.truth(side)
    tcot = cut_short(truth.tcot) if rng.random() < config.terse_share else truth.tcot
    wrong = rng.random() < config.corrupt_share
    return corrupt(tcot, config.corrupt_digits, rng) if wrong else tcot


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: train a tiny Embedder."""
    parser = argparse.ArgumentParser(prog="python -m embedrl_verl.tiny.contrastive", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder to start from, with the token <emb>")
    parser.add_argument("--world", type=Path, required=True, help="folder of embedrl_verl.tiny.digits")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the Embedder to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=ContrastiveConfig.steps)
    args = parser.parse_args(argv)
    embedder = Embedder.from_pretrained(args.model, limits=tiny_limits(family_of_folder(args.model)))
    samples = read_samples(args.world / "train.parquet")
    train_contrastive(embedder, samples, ContrastiveConfig(steps=args.steps, seed=args.seed))
    embedder.model.save_pretrained(args.out)
    AutoProcessor.from_pretrained(args.model).save_pretrained(args.out)
    print(f"wrote the Embedder to {args.out}")


if __name__ == "__main__":
    main()
