# SPDX-License-Identifier: Apache-2.0
"""Which pair goes where: the contrastive set, the RL set, or neither, and why. Decided on the roster alone, so the
result depends on the order of the pairs, not on how they lie in files nor on the number of processes. (docs/data.md has
the paper's two readings of which pairs feed RL.)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from embedrl_verl.annotate.verdict_file import VERDICTS
from embedrl_verl.convert.sampling import Sampling, preset
from embedrl_verl.curate.roster import Index, Mask, Roster
from embedrl_verl.errors import ConfigError, DataError

RlFrom = Literal["mismatch", "match", "all"]
Unknown = Literal["left_out", "match"]
Disjoint = Literal["off", "media", "all"]
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


@dataclass(frozen=True)
class SplitSettings:
    """See the options of `embedrl data split`. `rl_rows` and `rl_preset` have exact numbers of sources, `rl_rows_each`
    is the most of each other one (None: all, or none where some are named)."""

    rl_from: RlFrom = "mismatch"
    rl_rows: Mapping[str, int] = field(default_factory=dict)
    rl_rows_each: int | None = None
    rl_preset: str = ""
    allow_short: bool = False
    sampling: Literal["even", "random"] = "even"
    seed: int = 0
    unknown: Unknown = "left_out"
    keep_rl_matches: bool = False
    contrastive_without: tuple[str, ...] = ()
    disjoint_targets: Disjoint = "off"

    def __post_init__(self) -> None:
        for name, kind in (("rl_from", RlFrom), ("unknown", Unknown), ("disjoint_targets", Disjoint)):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(kind))}; got {getattr(self, name)!r}")
        for source, rows in (("a source", self.rl_rows_each or 0), *self.rl_rows.items()):
            if rows < 0:
                raise ConfigError(f"the RL pairs of {source} must be at least 0; got {rows}")
        if self.keep_rl_matches and self.disjoint_targets != "off":
            raise ConfigError("keep_rl_matches puts pairs in both sets; disjoint_targets must be off then")
        self.draw()

    def named_rows(self) -> dict[str, int]:
        return {**(preset(self.rl_preset).caps if self.rl_preset else {}), **self.rl_rows}

    def draw(self) -> Sampling:
        named = {source: rows for source, rows in self.named_rows().items() if rows}
        return Sampling(named, self.rl_rows_each or None, self.sampling, self.seed, self.rl_preset)

    def gives_rl(self, source: str) -> bool:
        named = self.named_rows()
        others = not named if self.rl_rows_each is None else self.rl_rows_each > 0
        return bool(named.get(source, others))


def decide(roster: Roster, settings: SplitSettings) -> Fates:
    """The fate of every row. Raises DataError: a named source is missing or has too few candidates; target ids are
    needed and missing."""
    match, mismatch = _matches(roster, settings), roster.verdict == VERDICTS.index("mismatch")
    candidates, drawn = candidates_by_source(roster, settings), np.zeros(len(roster), np.bool_)
    _check_named(candidates, roster, settings)
    draw = settings.draw()
    for name, rows in candidates.items():
        if settings.gives_rl(name):
            chosen = draw.choose(name, len(rows))
            drawn[rows if chosen is None else rows[chosen]] = True
    out = np.isin(roster.source, [at for at, name in enumerate(roster.names) if name in settings.contrastive_without])
    fates = np.full(len(roster), UNKNOWN, np.int8)
    fates[mismatch] = UNDRAWN
    fates[match] = CONTRASTIVE
    fates[match & out] = SOURCE_OUT
    fates[drawn] = RL
    if settings.keep_rl_matches:
        fates[drawn & match & ~out] = BOTH
    fates[~roster.good] = REJECTED
    if settings.disjoint_targets != "off":
        if without := int((((fates == RL) | (fates == CONTRASTIVE)) & (roster.content == 0)).sum()):
            raise DataError(
                f"disjoint_targets compares target_ids, and {without} pairs have none; "
                "fill them first with embedrl data content-ids"
            )
        apart = ~roster.is_text if settings.disjoint_targets == "media" else roster.good
        fates[also_in_rl(roster.content, fates) & apart] = TARGET_IN_RL
    return fates


def candidates_by_source(roster: Roster, settings: SplitSettings) -> dict[str, Index]:
    """The rows that RL may draw, ascending, by data source."""
    mismatch = roster.verdict == VERDICTS.index("mismatch")
    chosen = {"mismatch": mismatch, "match": _matches(roster, settings), "all": roster.good}[settings.rl_from]
    rows = np.flatnonzero(roster.good & chosen)
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
