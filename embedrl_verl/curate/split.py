# SPDX-License-Identifier: Apache-2.0
"""Which pair goes where: the contrastive set, the RL set, or neither, and why. Decided on the roster alone.

1. RL candidates are the pairs whose verdict `rl_from` names; of each source the wanted number is drawn from them.
2. Matches that RL did not draw train the Embedder, but for sources that are left out of that stage, and, if wanted, for
   pairs whose target content RL has.

The result depends on the order of the pairs, not on how they lie in files nor on the number of processes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from embedrl_verl.curate.roster import Index, Roster
from embedrl_verl.curate.split_settings import SplitSettings
from embedrl_verl.curate.verdict_file import VERDICTS
from embedrl_verl.errors import DataError

FATES = (
    "contrastive",
    "rl",
    "rl and contrastive",
    "left out: mismatch that RL did not draw",
    "left out: verdict unknown",
    "left out: source not in the contrastive set",
    "left out: target content is in the RL set",
    "rejected",
)
"""What becomes of a pair; the first three are trained on."""
CONTRASTIVE, RL, BOTH, UNDRAWN, UNKNOWN, SOURCE_OUT, TARGET_IN_RL, REJECTED = range(len(FATES))

Fates = npt.NDArray[np.int8]
Mask = npt.NDArray[np.bool_]


@dataclass
class SourceSplit:
    """One data source.

    Attributes:
        pairs: in the data, without rejected ones.
        verdicts: pairs by verdict; empty without a verdict file.
        candidates: pairs that RL may draw.
        wanted: pairs that RL is to get; None = not limited.
        fates: pairs by fate.
    """

    pairs: int = 0
    verdicts: dict[str, int] = field(default_factory=dict)
    candidates: int = 0
    wanted: int | None = None
    fates: dict[str, int] = field(default_factory=dict)


@dataclass
class SharedTargets:
    """Contrastive pairs whose target content, or query, is that of an RL pair too.

    Attributes:
        media, text: such pairs, by whether the content has media (or an id of the source) or is a text alone.
        contents: distinct contents of them.
        queries: contrastive pairs whose query_id an RL pair has.
        without_id: pairs of both sets that have no target_id, and are not counted here.
    """

    media: int = 0
    text: int = 0
    contents: int = 0
    queries: int = 0
    without_id: int = 0


@dataclass
class SplitReport:
    """What a split did; `sources` by name, sorted."""

    sources: dict[str, SourceSplit] = field(default_factory=dict)
    shared: SharedTargets = field(default_factory=SharedTargets)
    rejected: int = 0

    @property
    def exit_code(self) -> int:
        """0, or 3 if rows were rejected."""
        return DataError.exit_code if self.rejected else 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def total(self, *fates: int) -> int:
        """Pairs of these fates."""
        return sum(source.fates.get(FATES[fate], 0) for source in self.sources.values() for fate in fates)

    def lines(self) -> list[str]:
        """A table for people."""
        width = max([len("data source"), *map(len, self.sources)])
        lines = [
            f"{'data source':{width}}  {'pairs':>9}  {'match':>9}  {'mismatch':>9}  {'unknown':>8}  "
            f"{'contrastive':>11}  {'RL':>8}  {'of':>8}  {'left out':>8}"
        ]
        for name, source in self.sources.items():
            verdicts = [f"{source.verdicts[verdict]}" if source.verdicts else "-" for verdict in VERDICTS]
            count = [source.fates.get(fate, 0) for fate in FATES]
            lines.append(
                f"{name:{width}}  {source.pairs:>9}  {verdicts[0]:>9}  {verdicts[1]:>9}  {verdicts[2]:>8}  "
                f"{count[CONTRASTIVE] + count[BOTH]:>11}  {count[RL] + count[BOTH]:>8}  {source.candidates:>8}  "
                f"{sum(count[UNDRAWN:REJECTED]):>8}"
            )
        lines += [f"{FATES[fate]}: {self.total(fate)}" for fate in range(REJECTED) if self.total(fate)]
        shared = self.shared
        if shared.media or shared.text:
            lines.append(
                f"{shared.media + shared.text} contrastive pairs have a target content that RL has too ({shared.media} "
                f"with media, {shared.text} of text alone; {shared.contents} contents); see --disjoint-targets"
            )
        if shared.queries:
            lines.append(f"{shared.queries} contrastive pairs have a query that RL has too")
        if shared.without_id:
            lines.append(f"{shared.without_id} pairs without target_id were not compared; see embedrl data content-ids")
        if self.rejected:
            lines.append(f"{self.rejected} rows rejected")
        return lines


def decide(roster: Roster, settings: SplitSettings, *, judged: bool) -> tuple[Fates, SplitReport]:
    """The fate of every row, and the report.

    Args:
        judged: the roster has verdicts; without, every pair counts as a match.
    """
    good = roster.good
    match = (roster.verdict == VERDICTS.index("match")) if judged else good.copy()
    if settings.unknown == "match":
        match |= roster.verdict == VERDICTS.index("unknown")
    mismatch = roster.verdict == VERDICTS.index("mismatch")
    candidates = good & {"mismatch": mismatch, "match": match, "all": good}[settings.rl_from]
    by_source = _rows_by_source(roster, candidates)
    _check_named(by_source, roster, settings)

    drawn = np.zeros(len(roster), np.bool_)
    draw = settings.draw()
    for name, rows in by_source.items():
        if settings.gives_rl(name):
            chosen = draw.choose(name, len(rows))
            drawn[rows if chosen is None else rows[chosen]] = True

    out = np.isin(
        roster.source, [roster.names.index(name) for name in settings.contrastive_without if name in roster.names]
    )
    fates = np.full(len(roster), UNKNOWN, np.int8)
    fates[mismatch] = UNDRAWN
    fates[match] = CONTRASTIVE
    fates[match & out] = SOURCE_OUT
    fates[drawn] = RL
    if settings.keep_rl_matches:
        fates[drawn & match & ~out] = BOTH
    fates[~good] = REJECTED
    if settings.disjoint_targets != "off":
        _keep_targets_apart(roster, fates, settings)
    return fates, _report(roster, fates, by_source, settings, judged)


def _rows_by_source(roster: Roster, chosen: Mask) -> dict[str, Index]:
    """The chosen rows of each source, ascending."""
    rows = np.flatnonzero(chosen)
    codes = roster.source[rows]
    order = np.argsort(codes, kind="stable")
    borders = np.searchsorted(codes[order], np.arange(len(roster.names) + 1))
    return {name: rows[order[borders[code] : borders[code + 1]]] for code, name in enumerate(roster.names)}


def _check_named(by_source: dict[str, Index], roster: Roster, settings: SplitSettings) -> None:
    named = settings.named_rows()
    short = {name: rows for name, rows in named.items() if len(by_source.get(name, ())) < rows}
    if not short or settings.allow_short:
        return
    listed = []
    for name, rows in short.items():
        have = f"{len(by_source[name])} of them" if name in by_source else "the data have no such source"
        listed.append(f"  {name}: {rows} pairs wanted, {have}")
    counts = np.bincount(roster.source[roster.good], minlength=len(roster.names)).tolist()
    present = ", ".join(f"{name} ({count})" for name, count in sorted(zip(roster.names, counts, strict=True)))
    raise DataError(
        f"{len(short)} of {len(named)} sources have too few pairs that RL may draw (--rl-from {settings.rl_from}):\n"
        + "\n".join(listed)
        + f"\nThe data have: {present}.\nName other sources or numbers (--rl-rows SOURCE=N), or take what there is "
        "(--allow-short)"
    )


def _keep_targets_apart(roster: Roster, fates: Fates, settings: SplitSettings) -> None:
    trained = (fates == RL) | (fates == CONTRASTIVE)
    without = int((trained & (roster.content == 0)).sum())
    if without:
        raise DataError(
            f"disjoint_targets compares target_ids, and {without} pairs have none; "
            "fill them first with embedrl data content-ids"
        )
    shared = (fates == CONTRASTIVE) & np.isin(roster.content, roster.content[fates == RL])
    if settings.disjoint_targets == "media":
        shared &= ~roster.is_text
    fates[shared] = TARGET_IN_RL


def _report(
    roster: Roster, fates: Fates, by_source: dict[str, Index], settings: SplitSettings, judged: bool
) -> SplitReport:
    draw, report = settings.draw(), SplitReport(rejected=len(roster.rejected))
    codes = np.maximum(roster.source, 0).astype(np.int64)
    shape = (len(roster.names), len(FATES))
    counts = np.bincount(codes[roster.good] * len(FATES) + fates[roster.good], minlength=shape[0] * shape[1])
    verdicts = np.bincount(codes[roster.good] * 4 + roster.verdict[roster.good] + 1, minlength=shape[0] * 4)
    for code, name in sorted(enumerate(roster.names), key=lambda item: item[1]):
        of_source = counts.reshape(shape)[code].tolist()
        of_verdicts = verdicts.reshape(-1, 4)[code].tolist()[1:]
        gives = settings.gives_rl(name)
        report.sources[name] = SourceSplit(
            pairs=sum(of_source),
            verdicts=dict(zip(VERDICTS, of_verdicts, strict=True)) if judged else {},
            candidates=len(by_source[name]) if gives else 0,
            wanted=draw.cap(name) if gives else 0,
            fates={fate: count for fate, count in zip(FATES, of_source, strict=True) if count},
        )

    def also_in_rl(ids: Index) -> npt.NDArray[np.bool_]:
        rl = ids[(fates == RL) | (fates == BOTH)]
        found: npt.NDArray[np.bool_] = (fates == CONTRASTIVE) & (ids != 0) & np.isin(ids, rl[rl != 0])
        return found

    shared = also_in_rl(roster.content)
    trained = (fates == RL) | (fates == BOTH) | (fates == CONTRASTIVE)
    report.shared = SharedTargets(
        media=int((shared & ~roster.is_text).sum()),
        text=int((shared & roster.is_text).sum()),
        contents=len(np.unique(roster.content[shared])),
        queries=int(also_in_rl(roster.query).sum()),
        without_id=int((trained & (roster.content == 0)).sum()),
    )
    return report
