# SPDX-License-Identifier: Apache-2.0
"""`embedrl gate fit` and `gate score`: which queries think, decided on validation pairs, and what that does."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from embedrl_verl.data.files import read_object, write_json
from embedrl_verl.data.identity import shares_content
from embedrl_verl.data.schema import Side
from embedrl_verl.errors import ConfigError, DataError, MediaError
from embedrl_verl.evaluation.retrieval import Pairs
from embedrl_verl.model import EmbedRLModel
from embedrl_verl.model.gate import ThinkGate
from embedrl_verl.model.options import PairOptions
from embedrl_verl.model.pair import Think
from embedrl_verl.model.tcots import PairSide

logger = logging.getLogger(__name__)
GATE_FILE = "gate.json"
MARGINS = "plain queries, plain candidates"
AT_ONCE = 64
"""Inputs whose decoded media are in memory at a time."""


def fit_gate(
    files: Sequence[str], out: str, pair: PairOptions, *, media_root: str | None = None, limit: int | None = None
) -> dict[str, Any]:
    """Fit on these pairs, and write `out`; returns what it holds, as `measure_gate`."""
    found = measure_gate(files, pair, None, media_root=media_root, limit=limit)
    write_json(out, found)
    return found


def measure_gate(
    files: Sequence[str],
    pair: PairOptions,
    gate: ThinkGate | None,
    *,
    media_root: str | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """What a gate does to the queries of these pairs; None: the one that is best for them.

    `threshold`: cosines; `share` of the queries that think. `hit1` and `seconds` (of a query, on this machine, from
    decoded media to the vector) of "never", "always" and "gated" thinking: every query against the targets of its data
    source; one that does not think against their vectors without T-CoTs, and one that thinks against those with.
    """
    pairs = Pairs.read([str(Path(file).resolve()) for file in files], media_root, limit)
    model = pair.load("always")
    alone, _ = _vectors(model, pairs, "target", "never")
    targets, _ = _vectors(model, pairs, "target", "always")
    every = range(len(pairs.records))
    plain, never_s = _vectors(model, pairs, "query", "never")
    thought, always_s = _vectors(model, pairs, "query", "always")
    elsewhere = torch.ones(len(every), len(every), dtype=torch.bool)
    for rows in pairs.by_source.values():
        elsewhere[torch.tensor(rows)[:, None], torch.tensor(rows)] = False
    both = (plain, alone), (thought, targets)
    before, after = ((queries @ found.T).masked_fill(elsewhere, torch.nan) for queries, found in both)
    known = before, after, shares_content(pairs.contents, pairs.contents) & ~elsewhere
    fit = ThinkGate.fit(*known) if gate is None else gate.score(*known)
    chosen = fit.gate.thinks(before).nonzero()[:, 0].tolist()
    _, again_s = _vectors(model, pairs, "query", "always", chosen)
    return {
        "threshold": fit.gate.threshold,
        "margins": MARGINS,
        "share": fit.share,
        "hit1": {"never": fit.never, "always": fit.always, "gated": fit.gated},
        "seconds": {
            name: value / len(every)
            for name, value in (("never", never_s), ("always", always_s), ("gated", never_s + again_s))
        },
        "queries": len(every),
        "failed": int(sum(one.isnan().any(dim=1).sum() for one in (plain, thought, alone, targets))),
        "files": [str(file) for file in files],
        **pair.named(),
    }


def read_gate(file: Path, pair: PairOptions) -> ThinkGate:
    """The gate of a file that `embedrl gate fit` wrote; ConfigError if there is none. Warns if it was fitted with other
    models than those of `pair`, whose margins it does not know."""
    if not file.is_file():
        raise ConfigError(
            f"{file}: no such file; --think when_needed needs the gate that embedrl gate fit writes (--gate)"
        )
    found = read_object(file)
    threshold = found.get("threshold")
    if not isinstance(threshold, float):
        raise DataError(f"{file}: threshold must be a number; got {json.dumps(threshold)}. Fit the gate again")
    if found.get("margins") != MARGINS:
        raise DataError(
            f"{file}: margins must be those of {MARGINS!r}, without T-CoTs on either side; got "
            f"{json.dumps(found.get('margins'))}: another version fitted it. Fit the gate again"
        )
    now = pair.named()
    for name in ("embedder", "reasoner"):
        if found.get(name) != now[name]:
            logger.warning(
                "%s was fitted with the %s %s, and now it is %s: fit it again", file, name, found.get(name), now[name]
            )
    return ThinkGate(threshold)


def _vectors(
    model: EmbedRLModel, pairs: Pairs, side: Side, think: Think, numbers: Sequence[int] | None = None
) -> tuple[torch.Tensor, float]:
    """float32 (n, D) of one side, NaN where there is no vector, and seconds from decoded media to vectors."""
    numbers = range(len(pairs.records)) if numbers is None else numbers
    found: dict[int, torch.Tensor] = {}
    seconds = 0.0
    for start in range(0, len(numbers), AT_ONCE):
        asks = {}
        for i in numbers[start : start + AT_ONCE]:
            try:
                asks[i] = PairSide(pairs.records[i], side, pairs.media_roots[i]).ask(model.max_frames)
            except MediaError:
                continue
        started = time.perf_counter()
        done = list(model.encodings(list(asks.values()), side, think=think, batch_size=AT_ONCE))
        seconds += time.perf_counter() - started
        found |= {i: one.vector for i, one in zip(asks, done, strict=True) if one.vector is not None}
    if not found and numbers:
        raise DataError(f"no {side} of the pairs has a vector; embedrl eval says why")
    missing = torch.full_like(next(iter(found.values()), torch.empty(1)), torch.nan)
    return torch.stack([found.get(i, missing) for i in numbers]) if numbers else torch.empty(0, 1), seconds
