# SPDX-License-Identifier: Apache-2.0
"""Contrastive training of the tiny Embedder on input + true T-CoT + evidence, and on the raw input.

Symmetric InfoNCE over batches of one data source, put together from whole families of near numbers, so that every pair
has hard negatives. Two kinds of batches:

- `tcot`: input, true T-CoT and the evidence that it points at, on both sides;
- `raw`: the input alone on both sides, so that the baseline without T-CoT is a trained one too.

No T-CoT has a short or a wrong answer: an Embedder that saw short answers read the pictures itself, and could not tell
poor T-CoTs from good ones in RL.

On a user's own pairs it trains in half of the batches: raw, or with their T-CoTs where all of a batch have some.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers import AutoProcessor

from embedrl_verl.data.identity import content_id
from embedrl_verl.data.media import LoadedItem, load_item
from embedrl_verl.data.schema import SIDES, Item, Side
from embedrl_verl.embedder import Embedder, EmbedInput, info_nce
from embedrl_verl.embedder.batching import pack_rows
from embedrl_verl.embedder.loading import family_of_config, load_config
from embedrl_verl.embedder.model import embed_packed
from embedrl_verl.errors import DataError
from embedrl_verl.export.record import TrainingRecord, write_record
from embedrl_verl.families import Family
from recipes.tiny_digits.muon import MuonAdamW
from recipes.tiny_digits.settings import MEDIA, TcotParts, evidence_of, run_program, tiny_limits
from recipes.tiny_digits.world import FAMILY_SIZE, Sample, own_samples, parts_of, read_samples

TEMPERATURE = 0.05
RAW_SHARE = 0.4  # of the batches
OWN_SHARE = 0.5  # of the batches, if there are pairs of the user
LOADED = 256  # inputs whose media stay in memory: photos of 12 megapixels have 36 MB


@lru_cache(maxsize=LOADED)
def _loaded(item: Item, media_root: str | None) -> LoadedItem:
    return load_item(item, media_root)


def load_embedder(path: Path) -> Embedder:
    """A tiny Embedder with the limits of the digits world."""
    return Embedder.from_pretrained(path, limits=tiny_limits(family_of_config(load_config(path))))


def embed_input(sample: Sample, side: Side, tcot: str | None, family: Family, parts: TcotParts = "full") -> EmbedInput:
    """What the Embedder reads of one side: the input alone, or with a T-CoT and the evidence that it points at."""
    item = _loaded(sample.record.item(side), sample.media_root)
    if tcot is None:
        return EmbedInput(item)
    return EmbedInput.with_tcot(item, parts_of(tcot, parts), family, evidence_of(parts))


def train_contrastive(
    embedder: Embedder,
    samples: Sequence[Sample],
    *,
    seed: int = 0,
    steps: int = 400,
    families: int = 8,
    raw_share: float = RAW_SHARE,
    own: Sequence[Sample] = (),
    parts: TcotParts = "full",
) -> None:
    """Train in place.

    Args:
        samples: pairs grouped by source, families adjacent, as `read_samples` gives them.
        families: families of near numbers in a batch; pairs = families * FAMILY_SIZE.
        raw_share: share of the batches without T-CoT.
        own: the user's pairs.
        parts: what of the T-CoTs there is.
    """
    rng = np.random.default_rng(seed)
    digits, owned = _by_source(samples), _by_source(own)
    owned = {source: pairs for source, pairs in owned.items() if len(pairs) > 1}
    if own and not owned:
        raise DataError("TRAIN_FILES must have a data source of two pairs or more: other pairs are a pair's negatives")
    optimizer = MuonAdamW(embedder.model, total=steps)
    losses: dict[str, list[float]] = {"raw": [], "tcot": []}
    started = time.monotonic()
    for step in range(1, steps + 1):
        is_own = bool(owned) and rng.random() < OWN_SHARE
        batch = _own_batch(rng, owned, families * FAMILY_SIZE) if is_own else _digits_batch(rng, digits, families)
        written = all(one.truth(side).tcot for one in batch for side in SIDES)
        view = "tcot" if rng.random() >= raw_share and written else "raw"
        loss = batch_loss(embedder, batch, with_tcot=view == "tcot", parts=parts)
        optimizer.step(loss)
        losses[view].append(loss.item())
        if step % 50 == 0 or step == steps:
            shown = ", ".join(f"loss {name} {np.mean(values[-20:]):.3f}" for name, values in losses.items() if values)
            print(f"contrastive: step {step}, {shown}, {time.monotonic() - started:.0f} s", flush=True)


def _by_source(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        found[sample.record.data_source].append(sample)
    return found


def _digits_batch(rng: np.random.Generator, by_source: Mapping[str, list[Sample]], families: int) -> list[Sample]:
    """Whole families of near numbers of one source."""
    pairs = list(by_source.values())[int(rng.integers(len(by_source)))]
    count = min(families, len(pairs) // FAMILY_SIZE)
    starts = FAMILY_SIZE * rng.choice(len(pairs) // FAMILY_SIZE, size=count, replace=False)
    return [pairs[start + i] for start in starts for i in range(FAMILY_SIZE)]


def _own_batch(rng: np.random.Generator, by_source: Mapping[str, list[Sample]], size: int) -> list[Sample]:
    pairs = list(by_source.values())[int(rng.integers(len(by_source)))]
    return [pairs[i] for i in rng.choice(len(pairs), size=min(size, len(pairs)), replace=False)]


def batch_loss(
    embedder: Embedder, batch: Sequence[Sample], *, with_tcot: bool, parts: TcotParts = "full"
) -> torch.Tensor:
    """InfoNCE of a batch; pairs with an equal query or an equal target are no negatives of each other."""
    processor = embedder.processor
    rows = [
        processor.encode(embed_input(s, side, s.truth(side).tcot if with_tcot else None, processor.family, parts))
        for side in SIDES
        for s in batch
    ]
    query, target = embed_packed(embedder.model.model, pack_rows(rows)).split(len(batch))
    same_query, same_target = torch.tensor([content_id(s.record, s.media_root) for s in batch]).T
    return info_nce(query, target, temperature=TEMPERATURE, query_content=same_query, target_content=same_target)


def main(
    model: Path,
    world: Path,
    out: Path,
    seed: int = 0,
    steps: int = 400,
    pairs: Annotated[list[str] | None, typer.Option(help="files of the user's own pairs; repeat")] = None,
    media_root: Annotated[str | None, typer.Option(help="of their media paths")] = None,
    tcot: Annotated[TcotParts, typer.Option(help="what of a T-CoT there is")] = "full",
) -> None:
    """Train the tiny MODEL on the WORLD, and on own pairs, and write the Embedder to OUT."""
    embedder, own = load_embedder(model), own_samples(pairs, media_root) if pairs else []
    train_contrastive(embedder, read_samples(world / "train.parquet"), seed=seed, steps=steps, own=own, parts=tcot)
    embedder.model.save_pretrained(out)
    AutoProcessor.from_pretrained(model).save_pretrained(out)
    limits = {name: value for name, value in asdict(MEDIA).items() if name.endswith("_tokens")}
    write_record(out, TrainingRecord(stage="contrastive", settings={"profile": "embed_rl", **limits}))
    print(f"wrote the Embedder to {out}")


if __name__ == "__main__":
    run_program(main)
