# SPDX-License-Identifier: Apache-2.0
"""What a conversion adds to the data card of data/build.py, in JSON and for people, and its table for the terminal."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from embedrl_verl.convert.media_store import COUNTS
from embedrl_verl.convert.part import Task
from embedrl_verl.convert.sampling import Sampling, preset
from embedrl_verl.data.build import Report
from embedrl_verl.data.files import REJECTED_FILE, media_root_of

BY_ROW = "(rows say it)"
"""Data source of rows that say theirs when they are converted."""
COLUMNS = {"rows": "rows", "sampled": "sampled", "records": "pairs", "unused": "not used", "rejected": "rejected"}


def card_facts(
    reports: Sequence[Report],
    available: Mapping[str, int],
    tasks: Sequence[Task],
    sampling: Sampling,
    facts: Mapping[str, Any],
    rows: Mapping[str, int],
) -> dict[str, Any]:
    """Counts by source, media and sampling; `available` are the rows of each source before the caps."""
    by_source: dict[str, dict[str, Any]] = {}

    def of(source: str) -> dict[str, Any]:
        return by_source.setdefault(source or BY_ROW, {**dict.fromkeys(COLUMNS, 0), "kinds": {}})

    for source, count in available.items():
        of(source)["rows"] = count
    for task, report in zip(tasks, reports, strict=True):
        counts = of(task.shard.source)
        counts["sampled"] += len(task.rows)
        counts["unused"] += report["unused"]
        counts["rejected"] += len(report["rejected"])
        for source, kinds in sorted(report["kinds"].items()):
            of(source)["records"] += sum(kinds.values())
            of(source)["kinds"] = dict(sorted((Counter(of(source)["kinds"]) + Counter(kinds)).items()))
    media = {**dict.fromkeys(COUNTS, 0), **_sum(report["media"] for report in reports)}
    return {
        "by_source": by_source,
        "without_instruction": _sum(report["without_instruction"] for report in reports),
        "media": {"place": facts["settings"]["media"], "verify": facts["settings"]["verify"], **media},
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
    total: Counter[str] = Counter()
    for some in counts:
        total.update(some)
    return dict(sorted(total.items()))


def card_notes(card: Mapping[str, Any]) -> list[str]:
    """Lines of the data card for people."""
    media, sampling = card["media"], card["sampling"]
    counts = f"{media['images']:,} images, {media['videos']:,} videos, {media['frames']:,} frames given as images"
    lines = [f"{remark}.\n" for remark in _remarks(card)]
    lines += [f"Media: {counts}; place {media['place']}, checked by {media['verify']}."]
    if sampling["preset"]:
        lines += ["", f"Sampling: preset {sampling['preset']} ({sampling['preset_from']}). {sampling['preset_note']}"]
        weights = ", ".join(f"{source}: {weight}" for source, weight in sampling["weights"].items())
        if weights:
            lines.append(f"Weights of contrastive training: `contrastive.source_weights={{{weights}}}`")
        if sampling.get("draws"):
            draws = ", ".join(f"{source} {draw}" for source, draw in sampling["draws"].items())
            lines.append(
                "They are the shares of the draws divided by these pairs, the largest 1. After a filter, or with other "
                f"folders, divide by the pairs of each source that are trained on; the shares are {draws}."
            )
    elif sampling["caps"] or sampling["default_cap"]:
        caps = [f"{source} {cap:,}" for source, cap in sampling["caps"].items()]
        caps += [f"others {sampling['default_cap']:,}"] if sampling["default_cap"] else []
        lines += ["", f"Sampling: at most {', '.join(caps)} rows, {sampling['method']}, seed {sampling['seed']}."]
    return lines


def _remarks(card: Mapping[str, Any]) -> list[str]:
    """What a user should know: sources outside the preset, pairs without instruction, animated images."""
    found = []
    if outside := card["sampling"].get("not_in_preset"):
        found.append(f"The preset {card['sampling']['preset']} does not name {', '.join(outside)}: all rows are used")
    if wordless := card["without_instruction"]:
        listed = ", ".join(f"{source} {count:,}" for source, count in wordless.items())
        found.append(f"{sum(wordless.values()):,} pairs have no instruction: {listed}")
    if animated := card["media"]["animated"]:
        found.append(f"{animated:,} images are animated or have several pages; training sees the first frame")
    return found


def print_card(card: Mapping[str, Any], out: str) -> None:
    """The table by source, the causes of rejected rows, and where the pairs are."""
    width = max([len("data source"), *map(len, card["by_source"])])
    print(f"{'data source':{width}}  {'  '.join(f'{title:>9}' for title in COLUMNS.values())}  kinds")
    for source, counts in card["by_source"].items():
        kinds = ", ".join(f"{kind} ({count})" for kind, count in counts["kinds"].items())
        print(f"{source:{width}}  {'  '.join(f'{counts[key]:>9}' for key in COLUMNS)}  {kinds}")
    for remark in _remarks(card):
        print(remark)
    for cause in card["rejected"]["causes"]:
        print(f"REJECTED {cause['rows']} x {cause['cause']} (first: {cause['example']})")
    if card["rejected"]["rows"]:
        print(f"all rejected rows: {os.path.join(out, REJECTED_FILE)}")
    root = media_root_of(out)
    print(f"{card['records']} pairs in {len(card['parts'])} file(s): {out}" + (f" (media root {root})" if root else ""))
