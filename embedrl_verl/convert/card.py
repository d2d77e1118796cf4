# SPDX-License-Identifier: Apache-2.0
"""The data card: what a data set folder holds, what it was made from and how, in JSON and for people. No dates, no
machine: the same input and options give the same card."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from embedrl_verl.convert.media_store import MediaCounts
from embedrl_verl.convert.plan import Plan
from embedrl_verl.convert.sampling import preset
from embedrl_verl.data.files import FORMAT, part_name

CARD_TEXT_FILE = "data_card.md"
CAUSES_SHOWN, MAX_CAUSES = 20, 1000
OTHER_CAUSES = "(other causes)"
BY_ROW = "(rows say it)"
"""Shown for rows whose data source is only known when they are converted."""


def make_card(
    *,
    build: Mapping[str, Any],
    media_root: str | None,
    plan: Plan,
    reports: Mapping[int, Mapping[str, Any]],
    hashes: Mapping[str, str | None],
    rejected: Iterable[Mapping[str, Any]],
) -> dict[str, Any]:
    """The data card as plain values.

    Args:
        build: see `plan.build_facts`.
        media_root: as it is to be written; left out when no record has a path.
        reports: counts of the parts, by index.
        hashes: file of the input -> SHA-256, or None where it is not known.
        rejected: the lines of `rejected.jsonl`.
    """
    media = MediaCounts()
    for report in reports.values():
        media.add(MediaCounts(**report["media"]))
    causes, examples = count_causes(rejected)
    sampling = dict(build["sampling"])
    name = str(sampling["preset"])
    by_source = _by_source(plan, reports)
    if name:
        table = preset(name)
        sampling["preset_from"], sampling["preset_note"] = table.origin, table.note
        sampling["weights"] = table.source_weights({source: counts["records"] for source, counts in by_source.items()})
        if table.by_draw:
            sampling["draws"] = {source: table.weights[source] for source in sampling["weights"]}
        named = {*table.sources, *sampling["caps"]}
        sampling["not_in_preset"] = [
            source for source in by_source if sampling["default_cap"] is None and source not in named
        ]
    input_files = [
        dict(entry)
        | {"sha256": hashes[entry["file"]]}
        | ({"fault": plan.faults[entry["file"]]} if entry["file"] in plan.faults else {})
        for entry in build["input"]["files"]
    ]
    return {
        "format": FORMAT,
        "name": build["converter"],
        "tool": build["tool"],
        "licence": build["licence"],
        "records": sum(report["records"] for report in reports.values()),
        "media_root": media_root if media.paths else None,
        "by_source": by_source,
        "without_instruction": _sum_by_source(reports, "without_instruction"),
        "rejected": {
            "rows": sum(report["rejected"] for report in reports.values()),
            "files": len(plan.faults),
            "causes": [
                {"cause": cause, "rows": count, "example": examples[cause]}
                for cause, count in causes.most_common(CAUSES_SHOWN)
            ],
        },
        "media": dict(build["media"]) | vars(media),
        "sampling": sampling,
        "settings": dict(build["settings"]),
        "shard_rows": build["shard_rows"],
        "input": {"location": build["input"]["location"], "files": input_files},
        "parts": [
            {"file": part_name(index), **{key: reports[index][key] for key in ("records", "bytes", "sha256")}}
            for index in sorted(reports)
        ],
    }


def count_causes(rejected: Iterable[Mapping[str, Any]]) -> tuple[Counter[str], dict[str, str]]:
    """Rows by cause (numbers and quoted values left out, so that like goes to like), and where each is first seen. Of
    very many different causes the later ones are counted together."""
    causes: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for entry in rejected:
        field = re.sub(r"\[\d+\]", "[]", str(entry["field"]))
        cause = re.sub(r"""(['"]).*?\1|\b\d+(?:[.x]\d+)?\b""", "…", str(entry["reason"]))
        cause = f"{field}: {cause}" if field else cause
        if cause not in causes and len(causes) >= MAX_CAUSES:
            cause = OTHER_CAUSES
        causes[cause] += 1
        examples.setdefault(cause, describe_rejected(entry))
    return causes, examples


def describe_rejected(entry: Mapping[str, Any]) -> str:
    """A line of `rejected.jsonl` as a sentence: file, row, field, reason."""
    place = "".join(f", {name} {entry[name]}" for name in ("row", "line") if name in entry)
    field = f", field {entry['field']}" if entry["field"] else ""
    return f"{entry['file']}{place}{field}: {entry['reason']}"


def same_build(card: Mapping[str, Any], build: Mapping[str, Any]) -> str:
    """ "" if the card's data set was made by this build; else what differs."""
    files = [{key: file[key] for key in ("file", "bytes", "rows")} for file in card["input"]["files"]]
    found = {
        "tool": card["tool"],
        "converter": card["name"],
        "licence": card["licence"],
        "settings": card["settings"],
        "sampling": {key: card["sampling"].get(key) for key in build["sampling"]},
        "media": {key: card["media"].get(key) for key in build["media"]},
        "shard_rows": card["shard_rows"],
        "input": {"location": card["input"]["location"], "files": files},
    }
    return difference(found, build)


def difference(before: Any, now: Any, name: str = "") -> str:
    """The first value that differs, as "name was a, is b"; "" if all are equal."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in [*now, *(key for key in before if key not in now)]:
            found = difference(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
            if found:
                return found
        return ""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return next((found for i, (a, b) in pairs if (found := difference(a, b, f"{name}[{i}]"))), "")
    if before == now:
        return ""
    if isinstance(before, list) and isinstance(now, list):
        return f"{name} had {len(before)} entries, has {len(now)}"
    return f"{name} was {before!r}, is {now!r}"


def card_text(card: Mapping[str, Any]) -> str:
    """The data card for people, in Markdown."""
    lines = [
        f"# Data card: {card['name']}",
        "",
        f"{card['records']:,} pairs in {len(card['parts'])} parquet files, written by {card['tool']}.",
        f"Licence: {card['licence']}.",
        "",
    ]
    lines += [
        "| data source | rows | sampled | pairs | not used | rejected | kinds |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for source, counts in card["by_source"].items():
        kinds = ", ".join(f"{kind} ({count:,})" for kind, count in counts["kinds"].items())
        numbers = " | ".join(f"{counts[key]:,}" for key in ("rows", "sampled", "records", "unused", "rejected"))
        lines.append(f"| {source or BY_ROW} | {numbers} | {kinds} |")
    wordless = without_instruction_text(card)
    if wordless:
        lines += ["", f"{wordless}."]
    media = card["media"]
    lines += [
        "",
        f"Media: {media['images']:,} images, {media['videos']:,} videos, {media['frames']:,} frames given as images; "
        f"place {media['place']}, checked by {media['verify']}.",
    ]
    if media["animated"]:
        lines.append(f"{media['animated']:,} images are animated or have several pages; training sees the first.")
    lines.append(f"Media root: {card['media_root'] or 'not needed'}.")
    sampling = card["sampling"]
    if sampling["preset"]:
        lines += ["", f"Sampling: preset {sampling['preset']} ({sampling['preset_from']}). {sampling['preset_note']}"]
        lines += [f"{outside}." for outside in [outside_preset_text(card)] if outside]
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
    rejected = card["rejected"]
    if rejected["rows"] or rejected["files"]:
        lines += [
            "",
            f"Rejected: {rejected['rows']:,} rows, {rejected['files']:,} files damaged (rejected.jsonl has them all).",
            "",
        ]
        lines += [f"- {cause['rows']:,} x {cause['cause']} (first: {cause['example']})" for cause in rejected["causes"]]
    lines += ["", "| input file | rows | bytes | SHA-256 |", "|---|---:|---:|---|"]
    for file in card["input"]["files"]:
        lines.append(f"| {file['file']} | {file['rows']:,} | {file['bytes']:,} | {file['sha256'] or 'not known'} |")
    return "\n".join(lines) + "\n"


def _sum_by_source(reports: Mapping[int, Mapping[str, Any]], name: str) -> dict[str, int]:
    total: Counter[str] = Counter()
    for report in reports.values():
        total.update(report[name])
    return dict(sorted(total.items()))


def without_instruction_text(card: Mapping[str, Any]) -> str:
    """A line on pairs whose query has no instruction; "" if every pair has one."""
    found = card["without_instruction"]
    if not found:
        return ""
    listed = ", ".join(f"{source} {count:,}" for source, count in found.items())
    return f"{sum(found.values()):,} pairs have no instruction: {listed}"


def outside_preset_text(card: Mapping[str, Any]) -> str:
    """A line on data sources that the preset says nothing of; "" if there are none."""
    found = card["sampling"].get("not_in_preset")
    if not found:
        return ""
    listed = ", ".join(source or BY_ROW for source in found)
    return f"The preset {card['sampling']['preset']} does not name {listed}: all rows are used"


def _by_source(plan: Plan, reports: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    selected = plan.selected()
    result: dict[str, dict[str, Any]] = {
        source: {"rows": rows, "sampled": selected[source], "records": 0, "unused": 0, "rejected": 0, "kinds": {}}
        for source, rows in plan.available.items()
    }
    for report in reports.values():
        of_shard = result[report["source"]]
        of_shard["unused"] += report["unused"]
        of_shard["rejected"] += report["rejected"]
        for source, kinds in report["kinds"].items():
            entry = result.setdefault(
                source, {"rows": 0, "sampled": 0, "records": 0, "unused": 0, "rejected": 0, "kinds": {}}
            )
            entry["records"] += sum(kinds.values())
            for kind, count in kinds.items():
                entry["kinds"][kind] = entry["kinds"].get(kind, 0) + count
    for entry in result.values():
        entry["kinds"] = dict(sorted(entry["kinds"].items()))
    return result
