# SPDX-License-Identifier: Apache-2.0
"""What content ids say of a data set: how many distinct queries and targets each source has, and which images were put
together.

`false_negatives` is the probability that another pair of the same source, drawn at random, has the same query or the
same target: the share of in-batch negatives that would be false without the masks. It is high where answers are few
classes ("yes"); the paper leaves such sets (HatefulMemes, N24News, VOC2007) out of contrastive training.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embedrl_verl.curate.folders import write_lines
from embedrl_verl.curate.jobs import read_entry
from embedrl_verl.curate.records import PartWriter, batches, rows_at
from embedrl_verl.data.identity import false_negative_share
from embedrl_verl.errors import DataError

LARGEST_SHOWN = 3
GROUPS_LISTED = 1000
MEMBERS_LISTED = 20
PAIRS_TO_LOOK_AT = 400
GROUPS_FILE = "near_duplicates.jsonl"
PAIRS_FILE = "near_duplicates.parquet"
TEXT_SHOWN = 60


@dataclass
class SourceReport:
    """One data source.

    Attributes:
        pairs: written.
        given, text, media, near: pairs whose target id is the source's own; a text's; of media; of near-duplicate
            media.
        contents, queries: distinct ids of targets and of queries.
        false_negatives: probability in [0, 1], see the module.
        largest: the commonest targets: pairs, share, target_id, text (shortened).
    """

    pairs: int = 0
    given: int = 0
    text: int = 0
    media: int = 0
    near: int = 0
    contents: int = 0
    queries: int = 0
    false_negatives: float = 0.0
    largest: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class IdReport:
    """The whole data set.

    Attributes:
        sources: by name, sorted.
        rows: read.
        rejected: rows that were left out, see `rejected.jsonl`.
        near_groups, near_media: groups of near-duplicate images, and the media of targets in them (with repeats).
    """

    sources: dict[str, SourceReport] = field(default_factory=dict)
    rows: int = 0
    rejected: int = 0
    near_groups: int = 0
    near_media: int = 0

    @property
    def exit_code(self) -> int:
        """0, or 3 if rows were left out."""
        return DataError.exit_code if self.rejected else 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def load(cls, path: Path) -> IdReport:
        """Read the JSON of `as_dict`."""
        values = json.loads(path.read_bytes())
        return cls(
            **{**values, "sources": {name: SourceReport(**source) for name, source in values["sources"].items()}}
        )

    def lines(self) -> list[str]:
        """A table for people."""
        width = max([len("data source"), *map(len, self.sources)])
        head = f"{'data source':{width}}  {'pairs':>9}  {'own id':>8}  {'text':>9}  {'media':>9}  {'near':>7}"
        lines = [head + f"  {'targets':>9}  {'queries':>9}  {'same':>6}  commonest target"]
        for name, source in self.sources.items():
            first = source.largest[0] if source.largest else None
            common = (
                f"{first['pairs']} x {first['text'] or first['target_id']!r}" if first and first["pairs"] > 1 else ""
            )
            lines.append(
                f"{name:{width}}  {source.pairs:>9}  {source.given:>8}  {source.text:>9}  {source.media:>9}  "
                f"{source.near:>7}  {source.contents:>9}  {source.queries:>9}  {source.false_negatives:>6.2%}  {common}"
            )
        lines.append(
            "own id, text, media, near: where target ids come from. same: probability that another pair of the source "
            "has the same query or target (never a negative)"
        )
        if self.near_groups:
            lines.append(
                f"{self.near_groups} groups of near-duplicate images with {self.near_media} target media; look at "
                f"them: {GROUPS_FILE}, and embedrl data show --limit {PAIRS_TO_LOOK_AT} {PAIRS_FILE}"
            )
        lines.append(f"{self.rows} rows read, {self.rejected} left out")
        return lines


def make_report(parts: Sequence[Path], entries: Sequence[Path]) -> IdReport:
    """The report of written parts (in order) and the journal's entries of their tasks.

    Memory: 26 bytes a pair while it counts.
    """
    report = IdReport()
    for file in entries:
        entry = read_entry(file)
        report.rows += entry["rows"]
        report.rejected += len(entry["rejected"])
        report.near_media += len(entry["near"])
        for name, counts in entry["sources"].items():
            source = report.sources.setdefault(name, SourceReport())
            for kind, count in counts.items():
                setattr(source, kind, getattr(source, kind) + count)
                source.pairs += count
    report.near_groups = len({line["group"] for file in entries for line in read_entry(file)["near"]})
    report.sources = dict(sorted(report.sources.items()))
    codes = {name: code for code, name in enumerate(report.sources)}
    source_parts, content_parts = [np.zeros(0, np.int16)], [np.zeros((2, 0), np.int64)]
    for part in parts:
        for _, batch in batches(part, ["data_source", "query_id", "target_id"]):
            source_parts.append(np.fromiter((codes[name] for name in batch[0].to_pylist()), np.int16, batch.num_rows))
            ids = [np.fromiter(map(hash, names.to_pylist()), np.int64, batch.num_rows) for names in batch.columns[1:]]
            content_parts.append(np.stack(ids))
    sources, (queries, contents) = np.concatenate(source_parts), np.concatenate(content_parts, axis=1)
    wanted: dict[int, list[dict[str, Any]]] = {}
    for name, code in codes.items():
        rows = np.flatnonzero(sources == code)
        _, first, counts = np.unique(contents[rows], return_index=True, return_counts=True)
        source, number = report.sources[name], len(rows)
        source.contents = len(counts)
        source.queries = len(np.unique(queries[rows]))
        source.false_negatives = false_negative_share(queries[rows], contents[rows])
        for place in np.lexsort((first, -counts))[:LARGEST_SHOWN].tolist():
            line = {"pairs": int(counts[place]), "share": float(counts[place] / number), "target_id": "", "text": ""}
            source.largest.append(line)
            wanted.setdefault(int(rows[first[place]]), []).append(line)
    _name_contents(parts, wanted)
    return report


def write_near_duplicates(out: Path, parts: Sequence[Path], entries: Sequence[Path]) -> None:
    """List the largest groups of near-duplicate images in `near_duplicates.jsonl`, and write pairs of them, group by
    group, to `near_duplicates.parquet`, for `embedrl data show`."""
    sizes: Counter[str] = Counter()
    for file in entries:
        sizes.update(line["group"] for line in read_entry(file)["near"])
    members: dict[str, list[dict[str, str]]] = {
        group: [] for group, _ in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:GROUPS_LISTED]
    }
    for file in entries:
        for line in read_entry(file)["near"]:
            listed = members.get(line["group"])
            if listed is not None and len(listed) < MEMBERS_LISTED:
                listed.append({"pair_id": line["pair_id"], "medium": line["medium"], "sha256": line["sha256"]})
    groups = ({"group": group, "media": sizes[group], "members": listed} for group, listed in members.items())
    write_lines(out / GROUPS_FILE, groups)
    wanted: dict[str, int] = {}
    for listed in members.values():
        for line in listed:
            if len(wanted) < PAIRS_TO_LOOK_AT:
                wanted.setdefault(line["pair_id"], len(wanted))
    rows = []
    for part in parts:
        numbers: list[int] = []
        for first_row, batch in batches(part, ["pair_id"]):
            numbers += [first_row + place for place, name in enumerate(batch[0].to_pylist()) if name in wanted]
        rows += rows_at(part, numbers)
    rows.sort(key=lambda batch: wanted[batch["pair_id"][0].as_py()])
    with PartWriter(out / PAIRS_FILE) as writer:
        for batch in rows:
            writer.write(batch)


def _name_contents(parts: Sequence[Path], wanted: dict[int, list[dict[str, Any]]]) -> None:
    """Fill in id and text of contents, from a row (over all parts) that has them."""
    start = 0
    for part in parts:
        rows = sum(batch.num_rows for _, batch in batches(part, ["data_source"]))
        numbers = sorted(number - start for number in wanted if start <= number < start + rows)
        for number, batch in zip(numbers, rows_at(part, numbers), strict=True):
            text = " ".join((batch["target"][0].as_py()["text"] or "").split())
            shown = text if len(text) <= TEXT_SHOWN else text[: TEXT_SHOWN - 1] + "…"
            for line in wanted[start + number]:
                line |= {"target_id": batch["target_id"][0].as_py(), "text": shown}
        start += rows
