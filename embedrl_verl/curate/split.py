# SPDX-License-Identifier: Apache-2.0
"""Which pair goes where: the contrastive set, the RL set, or neither, and why. Decided on the roster alone, so the
result depends on the order of the pairs, not on how they lie in files nor on the number of processes. (docs/data.md has
the paper's two readings of which pairs feed RL.)"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pandas import factorize
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from embedrl_verl.annotate.verdict_file import VERDICTS
from embedrl_verl.convert.sampling import Sampling, preset
from embedrl_verl.curate.job import JobReport
from embedrl_verl.curate.roster import Index, Mask, Roster
from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.tables import table

FATES = (
    "contrastive",
    "rl",
    "rl and contrastive",
    "left out: mismatch that RL did not draw",
    "left out: verdict unknown",
    "left out: source not in the contrastive set",
    "left out: target content is in the RL set",
    "left out: content is held out",
    "held out",
    "rejected",
)
"""What becomes of a pair; the first three are trained on."""
CONTRASTIVE, RL, BOTH, UNDRAWN, UNKNOWN, SOURCE_OUT, TARGET_IN_RL, CONTENT_HELD, HELD, REJECTED = range(len(FATES))
SETS: dict[str, tuple[int, ...]] = {"contrastive": (CONTRASTIVE, BOTH), "rl": (RL, BOTH), "holdout": (HELD,)}
"""Folders that are written, with the fates of their pairs."""
Fates = npt.NDArray[np.int8]


@dataclass(frozen=True)
class SplitSettings:
    """See the options of `embedrl data split`. `rl_rows` and `rl_preset` have exact numbers of sources, `rl_rows_each`
    is the most of each other one (None: all, or none where some are named). `holdout`: below 1 a share of the matches,
    from 1 on their number."""

    rl_from: Literal["mismatch", "match", "all"] = "mismatch"
    rl_rows: Mapping[str, int] = field(default_factory=dict)
    rl_rows_each: int | None = None
    rl_preset: str = ""
    allow_short: bool = False
    sampling: Literal["even", "random"] = "even"
    seed: int = 0
    unknown: Literal["left_out", "match"] = "left_out"
    keep_rl_matches: bool = False
    contrastive_without: tuple[str, ...] = ()
    disjoint_targets: Literal["off", "media", "all"] = "off"
    holdout: float | None = None

    def __post_init__(self) -> None:
        if self.keep_rl_matches and self.disjoint_targets != "off":
            raise ConfigError("keep_rl_matches puts pairs in both sets; disjoint_targets must be off then")
        if self.holdout is not None and not (self.holdout > 0 and (self.holdout < 1 or self.holdout % 1 == 0)):
            raise ConfigError(f"holdout must be a share between 0 and 1 or a whole number of pairs; got {self.holdout}")
        self.named_rows()

    @property
    def sets(self) -> list[str]:
        """Those of `SETS` that are written."""
        return [name for name in SETS if name != "holdout" or self.holdout is not None]

    def named_rows(self) -> dict[str, int]:
        return {**(preset(self.rl_preset).caps if self.rl_preset else {}), **self.rl_rows}

    def wanted(self, source: str) -> int | None:
        """RL pairs of a source; None: all that RL may draw."""
        named = self.named_rows()
        others = 0 if named and self.rl_rows_each is None else self.rl_rows_each
        return named.get(source, others)


def decide(roster: Roster, settings: SplitSettings) -> Fates:
    """The fate of every row. Raises DataError: a named source is missing or has too few candidates; so few pairs can be
    held out; ids are needed and missing."""
    match, mismatch = _matches(roster, settings), roster.verdict == VERDICTS.index("mismatch")
    held, drawn = _held_out(roster, settings, match & roster.good), np.zeros(len(roster), np.bool_)
    candidates = candidates_by_source(roster, settings, held)
    _check_named(candidates, roster, settings)
    for name, rows in candidates.items():
        if (wanted := settings.wanted(name)) != 0:
            chosen = Sampling({}, wanted, settings.sampling, settings.seed).choose(name, len(rows))
            drawn[rows if chosen is None else rows[chosen]] = True
    out = np.isin(roster.source, [at for at, name in enumerate(roster.names) if name in settings.contrastive_without])
    fates = np.full(len(roster), UNKNOWN, np.int8)
    fates[mismatch] = UNDRAWN
    fates[match] = CONTRASTIVE
    fates[match & out] = SOURCE_OUT
    fates[drawn] = RL
    if settings.keep_rl_matches:
        fates[drawn & match & ~out] = BOTH
    fates[held] = CONTENT_HELD
    fates[held & match] = HELD
    fates[~roster.good] = REJECTED
    if settings.disjoint_targets != "off":
        _need_ids(
            "disjoint_targets compares target_ids", ((fates == RL) | (fates == CONTRASTIVE)) & (roster.content == 0)
        )
        apart = ~roster.is_text if settings.disjoint_targets == "media" else roster.good
        fates[also_in_rl(roster.content, fates) & apart] = TARGET_IN_RL
    return fates


def _held_out(roster: Roster, settings: SplitSettings, match: Mask) -> Mask:
    """Rows whose contents are held out. Pairs that share a query or a target, directly or over others, stay together;
    such groups are drawn by the seed, and those of more matches than are still wanted passed over."""
    held = np.zeros(len(roster), np.bool_)
    if settings.holdout is None:
        return held
    _need_ids("holdout compares query_ids and target_ids", roster.good & ((roster.content == 0) | (roster.query == 0)))
    rows = np.flatnonzero(roster.good)
    query, target = (factorize(ids[rows])[0] for ids in (roster.query, roster.content))  # in the order of the pairs
    ends = query, target + len(rows)
    links = coo_array((np.ones(len(rows), np.int8), ends), (2 * len(rows), 2 * len(rows)))
    group = connected_components(links, directed=False)[1][query]
    matches = np.bincount(group[match[rows]], minlength=group.max(initial=-1) + 1)
    share = 1 if settings.holdout >= 1 else match.sum()
    wanted = left = max(1, int(settings.holdout * share))
    taken = np.zeros(len(matches), np.bool_)
    for one in np.random.default_rng(settings.seed).permutation(len(matches)):
        if 0 < matches[one] <= left:
            taken[one] = True
            left -= matches[one]
    if left and not settings.allow_short:
        raise DataError(
            f"--holdout: {wanted} pairs wanted, {wanted - left} can be held out; the others share their contents with "
            "more pairs than that. Take these (--allow-short), or name another number"
        )
    held[rows] = taken[group]
    return held


def _need_ids(what: str, without: Mask) -> None:
    if without.any():
        raise DataError(f"{what}, and {without.sum()} pairs have none; fill them first with embedrl data content-ids")


def candidates_by_source(roster: Roster, settings: SplitSettings, held: Mask) -> dict[str, Index]:
    """The rows that RL may draw, ascending, by data source."""
    mismatch = roster.verdict == VERDICTS.index("mismatch")
    chosen = {"mismatch": mismatch, "match": _matches(roster, settings), "all": roster.good}[settings.rl_from]
    rows = np.flatnonzero(roster.good & chosen & ~held)
    return {name: rows[roster.source[rows] == code] for code, name in enumerate(roster.names)}


def also_in_rl(ids: Index, fates: Fates) -> Mask:
    """Contrastive pairs of which an RL pair has the same id; 0 is none."""
    found: Mask = (fates == CONTRASTIVE) & (ids != 0) & np.isin(ids, ids[(fates == RL) | (fates == BOTH)])
    return found


def _matches(roster: Roster, settings: SplitSettings) -> Mask:
    """Pairs that count as a match: all, without verdicts."""
    words = ["match", "unknown"] if settings.unknown == "match" else ["match"]
    return np.isin(roster.verdict, [*map(VERDICTS.index, words)]) if roster.judged else roster.good


def _check_named(candidates: dict[str, Index], roster: Roster, settings: SplitSettings) -> None:
    named = settings.named_rows()
    short = {name: rows for name, rows in named.items() if len(candidates.get(name, ())) < rows}
    if not short or settings.allow_short:
        return
    have = {name: f"{len(rows)} of them" for name, rows in candidates.items()}
    listed = [
        f"  {name}: {rows} pairs wanted, {have.get(name, 'the data have no such source')}"
        for name, rows in short.items()
    ]
    counts = np.bincount(roster.source[roster.good], minlength=len(roster.names)).tolist()
    present = ", ".join(f"{name} ({count})" for name, count in sorted(zip(roster.names, counts, strict=True)))
    raise DataError(
        f"{len(short)} of {len(named)} sources have too few pairs that RL may draw (--rl-from {settings.rl_from}):\n"
        + "\n".join(listed)
        + f"\nThe data have: {present}.\nName other sources or numbers (--rl-rows SOURCE=N), or take what there is "
        "(--allow-short)"
    )


def split_report(roster: Roster, fates: Fates, settings: SplitSettings) -> JobReport:
    """Count what became of the rows; with a table for people.

    Of each data source: pairs (without rejected ones), verdicts and fates (pairs by each), candidates (pairs that RL
    may draw), wanted (pairs that RL is to get; null = not limited). shared: contrastive pairs whose target content is
    that of an RL pair too, media and text, by whether the content has media (or an id of the source) or is a text
    alone; contents, distinct ones of them; queries, contrastive pairs whose query_id an RL pair has; without_id, pairs
    of both sets that have no target_id, and are not counted here.
    """
    candidates = candidates_by_source(roster, settings, np.isin(fates, (HELD, CONTENT_HELD)))
    sources, total = dict[str, Any](), Counter[str]()
    rows: list[list[object]] = [["data source", "pairs", *VERDICTS, "contrastive", "RL", "of", "left out"]]
    for code, name in sorted(enumerate(roster.names), key=lambda item: item[1]):
        of, wanted = roster.good & (roster.source == code), settings.wanted(name)
        counts = np.bincount(fates[of], minlength=len(FATES)).tolist()
        found = Counter({fate: count for fate, count in zip(FATES, counts, strict=True) if count})
        judged = [int((roster.verdict[of] == verdict).sum()) for verdict in range(len(VERDICTS))]
        sources[name] = {
            "pairs": int(of.sum()),
            "verdicts": dict(zip(VERDICTS, judged, strict=True)) if roster.judged else {},
            "candidates": 0 if wanted == 0 else len(candidates[name]),
            "wanted": wanted,
            "fates": dict(found),
        }
        total += found
        sets = [sum(counts[fate] for fate in SETS[members]) for members in ("contrastive", "rl")]
        left_out = sum(counts[UNDRAWN:HELD])
        shown = judged if roster.judged else ["-"] * len(VERDICTS)
        rows.append([name, sources[name]["pairs"], *shown, *sets, sources[name]["candidates"], left_out])
    again = also_in_rl(roster.content, fates)
    shared = {
        "media": int((again & ~roster.is_text).sum()),
        "text": int((again & roster.is_text).sum()),
        "contents": len(np.unique(roster.content[again])),
        "queries": int(also_in_rl(roster.query, fates).sum()),
        "without_id": int(((fates <= BOTH) & (roster.content == 0)).sum()),
    }
    lines = table(*rows) + [f"{fate}: {total[fate]}" for fate in FATES if total[fate]]
    notes = (
        (not total[FATES[RL]] + total[FATES[BOTH]], "NOTE no pair is left for RL: rl/ is empty; see --rl-from"),
        (
            again.any(),
            f"{shared['media'] + shared['text']} contrastive pairs have a target content that RL has too "
            f"({shared['media']} with media, {shared['text']} of text alone; {shared['contents']} contents); see "
            "--disjoint-targets",
        ),
        (shared["queries"], f"{shared['queries']} contrastive pairs have a query that RL has too"),
        (
            shared["without_id"],
            f"{shared['without_id']} pairs without target_id were not compared; see embedrl data content-ids",
        ),
        (len(roster.rejected), f"{len(roster.rejected)} rows rejected"),
    )
    values = {"sources": sources, "shared": shared, "rejected": len(roster.rejected)}
    return JobReport(values, lines + [note for told, note in notes if told])
