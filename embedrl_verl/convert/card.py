# SPDX-License-Identifier: Apache-2.0
"""What a conversion adds to the data card of data/build.py, in JSON and for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from embedrl_verl.convert.media_store import COUNTS
from embedrl_verl.convert.part import Task
from embedrl_verl.convert.sampling import Sampling, preset
from embedrl_verl.data.build import Report
from embedrl_verl.data.files import CARD_TEXT_FILE, media_root_of

BY_ROW = "(rows say it)"
"""Data source of rows that say theirs when they are converted."""


def card_facts(
    reports: Sequence[Report],
    available: Mapping[str, int],
    tasks: Sequence[Task],
    sampling: Sampling,
    facts: Mapping[str, Any],
    rows: Mapping[str, int],
) -> dict[str, Any]:
    """Counts by source, media and sampling; `available` are the rows of each source before the caps."""
    zeros = dict.fromkeys(("rows", "sampled", "records", "unused", "rejected"), 0)
    by_source: dict[str, dict[str, Any]] = {
        source or BY_ROW: {**zeros, "rows": rows, "kinds": Counter()} for source, rows in available.items()
    }
    for task, report in zip(tasks, reports, strict=True):
        counts = by_source[task.shard.source or BY_ROW]
        counts["sampled"] += len(task.rows)
        counts["unused"] += report["unused"]
        counts["rejected"] += len(report["rejected"])
        for source, kinds in sorted(report["kinds"].items()):
            counts = by_source.setdefault(source, {**zeros, "kinds": Counter()})
            counts["records"] += sum(kinds.values())
            counts["kinds"].update(kinds)
    return {
        "by_source": by_source,
        "without_instruction": _sum(report["without_instruction"] for report in reports),
        "media": {
            **{"place": facts["settings"]["media"], "verify": facts["settings"]["verify"]},
            **dict.fromkeys(COUNTS, 0),
            **_sum(report["media"] for report in reports),
        },
        "sampling": {**facts["sampling"], **(_of_preset(sampling, by_source) if sampling.preset else {})},
        "input_rows": dict(rows),
    }


def _of_preset(sampling: Sampling, by_source: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    table = preset(sampling.preset)
    weights = table.source_weights({source: counts["records"] for source, counts in by_source.items()})
    named = {*table.sources, *sampling.caps}
    outside = [source for source in by_source if sampling.default_cap is None and source not in named]
    found = {"preset_from": table.origin, "preset_note": table.note, "weights": weights, "not_in_preset": outside}
    return found | ({"draws": {source: table.weights[source] for source in weights}} if table.by_draw else {})


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    return dict(sorted(sum(map(Counter, counts), Counter[str]()).items()))


def card_notes(card: Mapping[str, Any]) -> list[str]:
    """Lines of the data card for people, what a user should know first."""
    media, sampling = card["media"], card["sampling"]
    lines = []
    if outside := sampling.get("not_in_preset"):
        lines.append(f"The preset {sampling['preset']} does not name {', '.join(outside)}: all rows are used.\n")
    if wordless := card["without_instruction"]:
        listed = ", ".join(f"{source} {count:,}" for source, count in wordless.items())
        lines.append(f"{sum(wordless.values()):,} pairs have no instruction: {listed}.\n")
    if media["animated"]:
        lines.append(
            f"{media['animated']:,} images are animated or have several pages; training sees the first frame.\n"
        )
    counts = f"{media['images']:,} images, {media['videos']:,} videos, {media['frames']:,} frames given as images"
    lines.append(f"Media: {counts}; place {media['place']}, checked by {media['verify']}.")
    if sampling["preset"]:
        lines += ["", f"Sampling: preset {sampling['preset']} ({sampling['preset_from']}). {sampling['preset_note']}"]
        if weights := ", ".join(f"{source}: {weight}" for source, weight in sampling["weights"].items()):
            lines.append(f"Weights of contrastive training: `contrastive.source_weights={{{weights}}}`")
        if draws := ", ".join(f"{source} {draw}" for source, draw in sampling.get("draws", {}).items()):
            lines.append(
                "They are the shares of the draws divided by these pairs, the largest 1. After a filter, or with other "
                f"folders, divide by the pairs of each source that are trained on; the shares are {draws}."
            )
    elif sampling["caps"] or sampling["default_cap"]:
        caps = [f"{source} {cap:,}" for source, cap in sampling["caps"].items()]
        caps += [f"others {sampling['default_cap']:,}"] if sampling["default_cap"] else []
        lines += ["", f"Sampling: at most {', '.join(caps)} rows, {sampling['method']}, seed {sampling['seed']}."]
    return lines


def print_card(card: Mapping[str, Any], out: str) -> None:
    """The data card for people without its list of input files, and where the pairs are."""
    print(Path(out, CARD_TEXT_FILE).read_text(encoding="utf-8").partition("\nMade by ")[0])
    root = media_root_of(out)
    print(f"{card['records']} pairs in {len(card['parts'])} file(s): {out}" + (f" (media root {root})" if root else ""))
