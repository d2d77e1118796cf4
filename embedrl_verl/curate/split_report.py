# SPDX-License-Identifier: Apache-2.0
"""What a split did: `split.json`, and a table for people.

Of each data source: pairs (without rejected ones), verdicts and fates (pairs by each), candidates (pairs that RL may
draw), wanted (pairs that RL is to get; null = not limited).

shared: contrastive pairs whose target content is that of an RL pair too, media and text, by whether the content has
media (or an id of the source) or is a text alone; contents, distinct ones of them; queries, contrastive pairs whose
query_id an RL pair has; without_id, pairs of both sets that have no target_id, and are not counted here.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from embedrl_verl.annotate.verdict_file import VERDICTS
from embedrl_verl.curate.report import JobReport
from embedrl_verl.curate.roster import Roster
from embedrl_verl.curate.split import BOTH, FATES, Fates, SplitSettings, also_in_rl, candidates_by_source
from embedrl_verl.tables import table


def split_report(roster: Roster, fates: Fates, settings: SplitSettings) -> JobReport:
    """Count what became of the rows."""
    draw, candidates = settings.draw(), candidates_by_source(roster, settings)
    sources: dict[str, Any] = {}
    for code, name in sorted(enumerate(roster.names), key=lambda item: item[1]):
        rows, gives = roster.good & (roster.source == code), settings.gives_rl(name)
        verdicts = np.bincount(roster.verdict[rows] + 1, minlength=len(VERDICTS) + 1).tolist()[1:]
        counts = np.bincount(fates[rows], minlength=len(FATES)).tolist()
        sources[name] = {
            "pairs": int(rows.sum()),
            "verdicts": dict(zip(VERDICTS, verdicts, strict=True)) if roster.judged else {},
            "candidates": len(candidates[name]) if gives else 0,
            "wanted": draw.cap(name) if gives else 0,
            "fates": {fate: count for fate, count in zip(FATES, counts, strict=True) if count},
        }
    again = also_in_rl(roster.content, fates)
    shared = {
        "media": int((again & ~roster.is_text).sum()),
        "text": int((again & roster.is_text).sum()),
        "contents": len(np.unique(roster.content[again])),
        "queries": int(also_in_rl(roster.query, fates).sum()),
        "without_id": int(((fates <= BOTH) & (roster.content == 0)).sum()),
    }
    values = {"sources": sources, "shared": shared, "rejected": len(roster.rejected)}
    return JobReport(values, _lines(values))


def _lines(values: dict[str, Any]) -> list[str]:
    rows, total = [], Counter[str]()
    for name, source in values["sources"].items():
        fates = Counter(source["fates"])
        total += fates
        both, judged = fates["rl and contrastive"], [source["verdicts"].get(verdict, "-") for verdict in VERDICTS]
        out = sum(count for fate, count in fates.items() if fate.startswith("left out"))
        rows.append(
            [name, source["pairs"], *judged, fates["contrastive"] + both, fates["rl"] + both, source["candidates"], out]
        )
    lines = table(["data source", "pairs", *VERDICTS, "contrastive", "RL", "of", "left out"], *rows)
    lines += [f"{fate}: {total[fate]}" for fate in FATES if total[fate]]
    if not any(total[fate] for fate in FATES if fate.startswith("rl")):
        lines.append("NOTE no pair is left for RL: rl/ is empty; see --rl-from")
    shared = values["shared"]
    if shared["media"] or shared["text"]:
        lines.append(
            f"{shared['media'] + shared['text']} contrastive pairs have a target content that RL has too "
            f"({shared['media']} with media, {shared['text']} of text alone; {shared['contents']} contents); see "
            "--disjoint-targets"
        )
    notes = (
        (shared["queries"], "contrastive pairs have a query that RL has too"),
        (shared["without_id"], "pairs without target_id were not compared; see embedrl data content-ids"),
        (values["rejected"], "rows rejected"),
    )
    return lines + [f"{count} {note}" for count, note in notes if count]
