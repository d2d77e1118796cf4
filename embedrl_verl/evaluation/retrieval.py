# SPDX-License-Identifier: Apache-2.0
"""Retrieval on a pair file, with and without T-CoTs, by one Embedder.

Every query is ranked against all targets of its data source; ties count against the model; the targets of all pairs
with an equal query or an equal target are relevant; an input without a T-CoT or a vector is not retrieved, and is
counted. Only what the Embedder reads differs between views: the input alone, or with the T-CoTs of a Reasoner (greedy)
and the evidence that they point at, cut from the originals.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from embedrl_verl.config.schema import EvidenceConfig, MediaConfig
from embedrl_verl.data.identity import ContentId, content_id, shares_content, target_content
from embedrl_verl.data.schema import SIDES, Item, PairRecord, Side, input_kind
from embedrl_verl.data.table import LocatedPair, PairTable
from embedrl_verl.errors import DataError, MediaError
from embedrl_verl.evaluation.metrics import hit_at_k, ndcg_at_k
from embedrl_verl.families import FAMILIES, Family
from embedrl_verl.kinds import EVIDENCE_KEY_OF_KIND
from embedrl_verl.model import EmbedRLModel
from embedrl_verl.model.embedders import Embeds
from embedrl_verl.model.pair import Encoding
from embedrl_verl.model.tcots import FAILURES, Ask, PairSide, Writes, Written
from embedrl_verl.ranks import first_rank
from embedrl_verl.tcot import format_reward, parse_tcot

ALL = "all"
"""The mean over data sources."""
NDCG_K = 5
MAX_FRAMES = MediaConfig().max_frames
AT_ONCE = 64
"""Inputs whose decoded media are in memory at a time."""


Tcots = Mapping[Side, Sequence[Written]]


class Pairs:
    """The pairs that are ranked: `records`, the media root of each, and `by_source`, their numbers by data source.

    contents: (n, 2) int64, `ContentId` of each. A pair whose media cannot be read equals no other.
    max_frames: drawn from a clip, for Reasoner and Embedder (`data.embedrl.max_frames`).
    """

    def __init__(
        self, records: Sequence[PairRecord], media_roots: Sequence[str | None], max_frames: int = MAX_FRAMES
    ) -> None:
        if not records:
            raise DataError("an evaluation needs at least one pair; the files hold none")
        if taken := next((one for one in records if one.data_source == ALL), None):
            raise DataError(
                f"data_source of pair {taken.pair_id} must not be {ALL!r}, which names the mean over sources; rename it"
            )
        self.records, self.media_roots, self.max_frames = records, media_roots, max_frames
        self.by_source: dict[str, list[int]] = {}
        for number, record in enumerate(records):
            self.by_source.setdefault(record.data_source, []).append(number)
        self.contents = torch.tensor([_content(*one) for one in zip(records, media_roots, strict=True)])

    def digest(self) -> str:
        """Of all pairs with their contents, in order: equal if the same is asked and ranked. Stated ids of contents
        say what is relevant; texts, instructions and media are looked at beside."""
        found = hashlib.sha256()
        for record, root, ids in zip(self.records, self.media_roots, self.contents.tolist(), strict=True):
            items = [record.item(side) for side in SIDES]
            said = [[one.instruction, one.text, one.kind] for one in items]
            shown = _content(replace(record, query_id="", target_id=""), root)
            found.update(json.dumps([record.pair_id, record.data_source, *ids, *said, *shown]).encode())
        return found.hexdigest()[:16]

    def ask(self, number: int, side: Side) -> Ask:
        """One side of a pair, decoded; MediaError names what cannot be."""
        return PairSide(self.records[number], side, self.media_roots[number]).ask(self.max_frames)

    @classmethod
    def read(
        cls,
        files: Sequence[str],
        media_root: str | None = None,
        limit: int | None = None,
        max_frames: int = MAX_FRAMES,
    ) -> Pairs:
        """The pairs of files and data set folders, the first `limit` of each data source.

        Args:
            media_root: of all files; None: as their data cards say.

        Raises:
            DataError: a row is no pair record. What is not ranked would be missing from the candidates.
        """
        table = PairTable(files, media_root)
        if problems := table.problems():
            first = next(iter(problems.values()))
            raise DataError(f"{len(problems)} rows cannot be used; the first: {first.message}")
        counts, chosen = Counter[str](), []
        for number, source in enumerate(table.column("data_source").to_pylist()):
            counts[source] += 1
            if limit is None or counts[source] <= limit:
                chosen.append(number)
        found = [located.record for located in table.rows(chosen) if isinstance(located, LocatedPair)]
        return cls(found, [table.media_root(number) for number in chosen], max_frames)


def _content(record: PairRecord, media_root: str | None) -> ContentId:
    try:
        return content_id(record, media_root)
    except MediaError:
        own = target_content(Item(text=f"{record.data_source} {record.pair_id}"), None)
        return ContentId(own, own)


def write_tcots(reasoner: Writes, pairs: Pairs, *, said: Callable[[int], object] = lambda _: None) -> Tcots:
    """T-CoTs of both sides of each pair; `said` is told how many more are there."""
    written: dict[Side, list[Written]] = {}
    for side in SIDES:
        written[side] = []
        for start in range(0, len(pairs.records), AT_ONCE):
            chunk = range(start, min(start + AT_ONCE, len(pairs.records)))
            asks: dict[int, Ask] = {}
            problems: dict[int, Written] = {}
            for i in chunk:
                try:
                    asks[i] = pairs.ask(i, side)
                except FAILURES as error:
                    problems[i] = Written(None, problem=str(error))
            done = dict(zip(asks, reasoner.write(list(asks.values())), strict=True)) | problems
            written[side] += [done[i] for i in chunk]
            said(len(chunk))
    return written


def score_view(
    embedder: Embeds, pairs: Pairs, tcots: Tcots | None, family: Family | None, evidence: EvidenceConfig
) -> dict[str, Any]:
    """Embed both sides with these T-CoTs (None = the input alone) and rank.

    Args:
        family: of the Reasoner, for the units of its boxes; None without T-CoTs.

    Returns:
        "hit1", "ndcg5": by data source, and under "all" the plain mean over sources. "hits" (1 or 0) and "ranks" (from
        1; 0: not retrieved): by data source, of each query in the order of the file. "failed_rows": inputs of either
        side without a vector; "problems": why, the first five. "quality": None without T-CoTs, else shares in [0, 1]
        over both sides: "well_formed" keeps the form, "format" also has the evidence that its input calls for (the
        reward's F); "evidence": pieces cut for a T-CoT, mean.
    """
    model = EmbedRLModel(embedder, family=family or FAMILIES[-1], evidence=evidence)
    sides = {
        side: list(
            model.encodings(
                [partial(pairs.ask, number, side) for number in range(len(pairs.records))],
                side,
                batch_size=AT_ONCE,
                tcots=None if tcots is None else tcots[side],
            )
        )
        for side in SIDES
    }
    problems = [
        f"{side} of {record.pair_id}: {one.problem}"
        for side in SIDES
        for record, one in zip(pairs.records, sides[side], strict=True)
        if one.vector is None
    ]
    # A side may have no vector at all: the width is that of the other.
    width = next((len(one.vector) for side in SIDES for one in sides[side] if one.vector is not None), 1)
    query, target = (stacked(sides[side], width) for side in SIDES)
    scores: dict[str, Any] = {"hit1": {}, "ndcg5": {}, "hits": {}, "ranks": {}}
    for source, rows in pairs.by_source.items():
        similarity = query[rows] @ target[rows].T
        relevant = shares_content(pairs.contents[rows], pairs.contents[rows])
        scores["hit1"][source] = hit_at_k(similarity, relevant, 1)
        scores["ndcg5"][source] = ndcg_at_k(similarity, relevant, NDCG_K)
        scores["ranks"][source] = first_rank(similarity, relevant).tolist()
        scores["hits"][source] = [int(rank == 1) for rank in scores["ranks"][source]]
    for name in ("hit1", "ndcg5"):
        scores[name][ALL] = statistics.fmean(scores[name].values())
    quality = None
    if tcots is not None:
        forms = [form for side in SIDES for form in _forms(pairs, side, sides[side])]
        kept, complete, cut = (statistics.fmean(values) for values in zip(*forms, strict=True)) if forms else (0, 0, 0)
        quality = {"well_formed": kept, "format": complete, "evidence": cut}
    return scores | {"failed_rows": len(problems), "problems": problems[:5], "quality": quality}


def _forms(pairs: Pairs, side: Side, encoded: Sequence[Encoding]) -> list[tuple[float, float, int]]:
    """Of each T-CoT that was embedded: well-formed, the reward's F, pieces of evidence."""
    forms = []
    for record, one in zip(pairs.records, encoded, strict=True):
        if one.tcot is not None:
            tcot = parse_tcot(one.tcot)
            complete = format_reward(tcot, EVIDENCE_KEY_OF_KIND[input_kind(record, side)])
            forms.append((float(tcot.is_well_formed), complete, one.evidence))
    return forms


def stacked(encoded: Sequence[Encoding], width: int = 1) -> torch.Tensor:
    """(n, D) float32, a row of NaN where there is no vector. `width`: D where no vector is known at all."""
    known = [one.vector for one in encoded if one.vector is not None]
    missing = torch.full_like(known[0], torch.nan) if known else torch.full((width,), torch.nan)
    return torch.stack([missing if one.vector is None else one.vector.float() for one in encoded])


def tcot_lines(pairs: Pairs, name: str, tcots: Tcots, ranks: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    """What a view's T-CoTs were, for `tcots.jsonl`: a line for each side of each pair, queries with their rank."""
    rank_of = {
        number: rank
        for source, numbers in pairs.by_source.items()
        for number, rank in zip(numbers, ranks[source], strict=True)
    }
    lines = []
    for number, record in enumerate(pairs.records):
        for side in SIDES:
            written = tcots[side][number]
            parsed = parse_tcot(written.text or "")
            line: dict[str, Any] = {"view": name, "data_source": record.data_source, "pair_id": record.pair_id}
            line |= {"side": side, "tcot": written.text, "well_formed": parsed.is_well_formed}
            if written.problem:
                line["failure"] = written.problem
            lines.append(line | ({"rank": rank_of[number]} if side == "query" else {}))
    return lines
