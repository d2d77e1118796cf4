# SPDX-License-Identifier: Apache-2.0
"""What content ids say of a data set: how many distinct queries and targets each source has, and which images were put
together. `false_negatives` is the probability that another pair of the source has the same query or target: the share
of in-batch negatives that would be false without the masks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embedrl_verl.curate.report import JobReport
from embedrl_verl.data.build import Report, write_lines
from embedrl_verl.data.identity import false_negative_share
from embedrl_verl.data.parquet import read_batches, read_rows
from embedrl_verl.data.writer import PairWriter
from embedrl_verl.tables import table

KINDS = ("given", "text", "media", "near")
LARGEST_SHOWN, TEXT_SHOWN = 3, 60
GROUPS_LISTED, MEMBERS_LISTED, PAIRS_TO_LOOK_AT = 1000, 20, 400
GROUPS_FILE = "near_duplicates.jsonl"
PAIRS_FILE = "near_duplicates.parquet"


def id_report(values: dict[str, Any]) -> JobReport:
    """The report of `count_ids`, with a table for people."""
    rows = []
    for name, source in values["sources"].items():
        first = source["largest"][0]
        common = f"{first['pairs']} x {first['text'] or first['target_id']!r}" if first["pairs"] > 1 else ""
        counts = [source[key] for key in ("pairs", *KINDS, "contents", "queries")]
        rows.append([name, *counts, f"{source['false_negatives']:.2%}", common])
    head = ["data source", "pairs", "own id", *KINDS[1:], "targets", "queries", "same", "commonest target"]
    lines = table(head, *rows, left=(0, len(head) - 1))
    lines.append(
        "own id, text, media, near: where target ids come from. same: probability that another pair of the source "
        "has the same query or target (never a negative)"
    )
    if values["near_groups"]:
        lines.append(
            f"{values['near_groups']} groups of near-duplicate images with {values['near_media']} target media; look "
            f"at them: {GROUPS_FILE}, and embedrl data show --limit {PAIRS_TO_LOOK_AT} {PAIRS_FILE}"
        )
    return JobReport(values, [*lines, f"{values['rows']} rows read, {values['rejected']} left out"])


def count_ids(parts: Sequence[Path], reports: Sequence[Report]) -> dict[str, Any]:
    """Count what is in written parts; see the module. Memory: 24 bytes a pair."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for report in reports:
        for name, kinds in report["ids"].items():
            counts[name].update(kinds)
    codes = {name: code for code, name in enumerate(sorted(counts))}
    columns = [np.zeros((3, 0), np.int64)]
    for part in parts:
        for _, batch in read_batches(part, ["data_source", "query_id", "target_id"]):
            names, *ids = (column.to_pylist() for column in batch.columns)
            columns.append(np.array([[codes[name] for name in names], *([*map(hash, side)] for side in ids)]))
    source, query, target = np.concatenate(columns, axis=1)
    sources, shown = dict[str, Any](), dict[int, dict[str, Any]]()
    for name, code in codes.items():
        rows = np.flatnonzero(source == code)
        _, first, repeats = np.unique(target[rows], return_index=True, return_counts=True)
        largest = np.lexsort((first, -repeats))[:LARGEST_SHOWN]
        listed = [{"pairs": pairs, "share": pairs / len(rows)} for pairs in repeats[largest].tolist()]
        shown |= zip(rows[first[largest]].tolist(), listed, strict=True)
        sources[name] = {
            "pairs": len(rows),
            **{kind: counts[name][kind] for kind in KINDS},
            "contents": len(repeats),
            "queries": len(np.unique(query[rows])),
            "false_negatives": false_negative_share(query[rows], target[rows]),
            "largest": listed,
        }
    start = 0
    for part, report in zip(parts, reports, strict=True):
        numbers = np.array([row - start for row in sorted(shown) if start <= row < start + report["records"]], np.int64)
        for here, batch in read_rows(part, numbers, ["target", "target_id"]):
            for number, found in zip(here.tolist(), batch.to_pylist(), strict=True):
                text = " ".join((found["target"]["text"] or "").split())
                text = text if len(text) <= TEXT_SHOWN else text[: TEXT_SHOWN - 1] + "…"
                shown[start + number].update(target_id=found["target_id"], text=text)
        start += report["records"]
    near = [line["group"] for report in reports for line in report["near"]]
    totals = {"rows": sum(report["rows"] for report in reports), "near_groups": len({*near}), "near_media": len(near)}
    return {"sources": sources, "rejected": sum(len(report["rejected"]) for report in reports), **totals}


def write_near_duplicates(out: Path, parts: Sequence[Path], near: Sequence[Mapping[str, str]]) -> None:
    """List the largest groups of near-duplicate images in `near_duplicates.jsonl`, and write pairs of them, group by
    group, to `near_duplicates.parquet`, for `embedrl data show`."""
    sizes = Counter(line["group"] for line in near)
    largest = sorted(sizes, key=lambda group: (-sizes[group], group))[:GROUPS_LISTED]
    members: dict[str, list[dict[str, str]]] = {group: [] for group in largest}
    for line in near:
        if len(members.get(line["group"], range(MEMBERS_LISTED))) < MEMBERS_LISTED:
            members[line["group"]].append({name: line[name] for name in ("pair_id", "medium", "sha256")})
    groups = ({"group": group, "media": sizes[group], "members": listed} for group, listed in members.items())
    write_lines(out / GROUPS_FILE, groups)
    named = dict.fromkeys(line["pair_id"] for listed in members.values() for line in listed)
    wanted = {name: place for place, name in enumerate([*named][:PAIRS_TO_LOOK_AT])}
    rows: dict[int, pa.RecordBatch] = {}
    for part in parts:
        for first, batch in read_batches(part, ["pair_id"]):
            places = [place for place, name in enumerate(batch[0].to_pylist()) if name in wanted]
            for _, found in read_rows(part, np.array(places, np.int64) + first):
                rows |= {wanted[found["pair_id"][at].as_py()]: found.slice(at, 1) for at in range(found.num_rows)}
    with PairWriter(out / PAIRS_FILE) as writer:
        for place in sorted(rows):
            writer.write(rows[place])
