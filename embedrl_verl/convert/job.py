# SPDX-License-Identifier: Apache-2.0
"""A conversion from start to end: which rows are used, parts in worker processes, ids that come twice, the data card.

Which rows make which part is a function of input and options. Workers make the parts (data/build.py); those with the
`pair_id` of an earlier record are made again, with these rows rejected. So after kill -9 the same command goes on.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embedrl_verl import __version__
from embedrl_verl.convert.card import card_facts, card_notes
from embedrl_verl.convert.converter import Converter, Options, Shard, option
from embedrl_verl.convert.inputs import InputRoot
from embedrl_verl.convert.media_store import PLACES, VERIFY, MediaStore
from embedrl_verl.convert.part import PartMaker, Task
from embedrl_verl.convert.restart import check_media_folder, remove_earlier
from embedrl_verl.convert.rows import as_arrow, count_rows
from embedrl_verl.convert.sampling import METHODS, Sampling, preset, presets, sampling_from_options
from embedrl_verl.data.build import Report, building, finish, list_causes, make_parts
from embedrl_verl.data.files import CARD_FILE, MEDIA_FOLDER, STALE, part_name, read_object, sha256_of
from embedrl_verl.data.parquet import read_batches
from embedrl_verl.errors import ConfigError, DataError

ARROW_FOLDER = "arrow"


@dataclass(frozen=True)
class JobOptions(Options):
    """The options of every converter."""

    input: str = option(MISSING, "folder, file, or hub id owner/name[@revision]")
    out: str = option(MISSING, "data set folder to write, or to go on with")
    media_root: str = option("", "folder that paths of media are relative to (the input's)")
    media: str = option("keep", "as they come, embedded as bytes, or all as files in OUT/media, by hash", PLACES)
    verify: str = option("decode", "of media nothing, files and headers, or every image and video", VERIFY)
    cap: tuple[str, ...] = option((), "[SOURCE=]ROWS, rows used of each source, or of one; may be given again")
    preset: str = option("", "caps of a published recipe", tuple(presets()))
    sample: str = option("even", "how rows under a cap are drawn", METHODS)
    seed: int = option(0, "of --sample random")
    workers: int = option(len(os.sched_getaffinity(0)), "processes")
    shard_rows: int = option(5_000, "input rows of one part")
    max_bad_share: float = option(0.01, "stop when a larger share of the rows cannot be used")
    licence: str = option("", "licence for the data card, instead of the source's own words")
    restart: bool = option(False, "remove what an earlier run wrote to OUT, and begin anew")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers < 1 or self.shard_rows < 1:
            raise ConfigError(f"workers and shard_rows must be at least 1; got {self.workers} and {self.shard_rows}")
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError(f"the share of bad rows must be between 0 and 1; got {self.max_bad_share}")


def run_conversion(converter: Converter, options: JobOptions, command: Sequence[str] = ()) -> dict[str, Any]:
    """Make a data set folder, or go on with one; `command` does so after a crash. Returns its data card."""
    out = Path(options.out)
    sampling = sampling_from_options(options.cap, options.preset, method=options.sample, seed=options.seed)
    root = InputRoot(options.input, without=out, media_root=options.media_root)
    shards = converter.shards(root)
    _check_caps(sampling, {shard.source for shard in shards})
    names = list(dict.fromkeys(shard.file for shard in shards))
    facts = _build_facts(root, converter, options, sampling, names)
    if options.restart:
        remove_earlier(out, [*map(root.path, names), *([root.media_root] if root.media_root else [])], command)
    check_media_folder(out, options.media)
    store = MediaStore(options.media, options.verify, root.media_root, out)
    with building(out, facts, command, anew="begin anew with --restart") as work:
        if work is None:
            return read_object(out / CARD_FILE)
        for stale in (out / MEDIA_FOLDER).glob(f"??/{STALE}") if options.media == "files" else ():
            stale.unlink()  # of killed writers; no other is at work
        arrow = {name: as_arrow(name, root.path(name), work / ARROW_FOLDER) for name in names}
        rows = {name: count_rows(name, file) for name, file in arrow.items()}
        tasks, available = _plan(shards, arrow, rows, sampling, options.shard_rows)
        reports = _make_all(PartMaker(converter, store), tasks, work, options)
        more = card_facts(reports, available, tasks, sampling, facts, rows)
        media_root = MEDIA_FOLDER if options.media == "files" else facts["media_root"]
        said = {"licence": facts["licence"], "more": more, "notes": card_notes(more)}
        return finish(
            out, converter.name, facts, reports, media_root=(more["media"]["paths"] and media_root) or None, **said
        )


def _build_facts(
    root: InputRoot, converter: Converter, options: JobOptions, sampling: Sampling, names: Sequence[str]
) -> dict[str, Any]:
    """All that decides the output. Files of the hub are pinned by the commit; local ones by their content."""
    said = {name: value for name, value in converter.settings.items() if value not in ("", ())}
    said |= {"media": options.media, "verify": options.verify, "shard_rows": options.shard_rows}
    paths = {name: root.path(name) for name in names}
    real: dict[Path, str] = {}
    for name, path in paths.items() if not root.commit else ():
        if (other := real.setdefault(path.resolve(), name)) != name:
            raise DataError(f"{name} is {other} under another name (a link); take one of them away, or name the files")
    return {
        "tool": f"embedrl-verl {__version__}",
        "command": converter.name,
        "licence": options.licence or converter.licence,
        "settings": said,
        "sampling": {**vars(sampling), "caps": dict(sorted(sampling.caps.items()))},
        "location": root.location,
        "media_root": root.media_root and os.path.abspath(root.media_root),
        "input": [
            {"file": name, "bytes": path.stat().st_size, "sha256": None if root.commit else sha256_of(path)}
            for name, path in paths.items()
        ],
    }


def _check_caps(sampling: Sampling, sources: set[str]) -> None:
    of_preset = preset(sampling.preset).sources if sampling.preset else {}
    unknown = sorted(set(sampling.caps) - sources - set(of_preset))
    if unknown:
        raise ConfigError(f"--cap names the source {unknown[0]!r}; the input has {', '.join(sorted(sources))}")


def _plan(
    shards: Sequence[Shard], arrow: dict[str, Path], rows: dict[str, int], sampling: Sampling, shard_rows: int
) -> tuple[list[Task], dict[str, int]]:
    """The tasks in order, and the rows of each source before sampling. Positions count over all files of a source."""
    lengths = [rows[shard.file] if shard.stop is None else min(shard.stop, rows[shard.file]) for shard in shards]
    available: Counter[str] = Counter()
    for shard, length in zip(shards, lengths, strict=True):
        available[shard.source] += length
    positions = {source: sampling.choose(source, total) for source, total in available.items()}
    before: Counter[str] = Counter()
    tasks = []
    for shard, length in zip(shards, lengths, strict=True):
        chosen, start = positions[shard.source], before[shard.source]
        before[shard.source] += length
        wanted: Sequence[int] = range(length)
        if chosen is not None:
            low, high = np.searchsorted(chosen, (start, start + length))
            wanted = (chosen[low:high] - start).tolist()
        for begin in range(0, len(wanted), shard_rows):
            tasks.append(Task(shard, arrow[shard.file], wanted[begin : begin + shard_rows]))
    return tasks, dict(available)


def _make_all(make: PartMaker, tasks: Sequence[Task], work: Path, options: JobOptions) -> list[Report]:
    """The reports of all parts, with every `pair_id` once."""
    total = sum(len(task.rows) for task in tasks)

    def parts(tasks: Sequence[Task]) -> list[Report]:
        share, label = options.max_bad_share, make.converter.name
        return make_parts(make, tasks, work, rows=total, workers=options.workers, max_bad_share=share, label=label)

    reports = parts(tasks)
    repeated = _repeated_rows(tasks, reports, work.parent)
    if repeated:
        # Without its report a part is made again, in full if the job is killed here: the ids are then found again.
        for number in repeated:
            (work / f"{part_name(number)}.json").unlink()
        reports = parts([replace(task, repeated=repeated.get(number, {})) for number, task in enumerate(tasks)])
    if not any(report["records"] for report in reports):
        causes = list_causes(reports, work.parent)
        why = f". Causes:\n{causes}" if causes else ": the converter uses none of them"
        raise DataError(
            f"no pair could be made of {total} rows{why}\nMend the input or the options, and start again with --restart"
        )
    return reports


def _repeated_rows(tasks: Sequence[Task], reports: Sequence[Report], out: Path) -> dict[int, dict[int, str]]:
    """Part -> row of its file -> why it is rejected: the first record of an id, in order of the parts, stays."""
    parts = (out / part_name(number) for number in range(len(tasks)))
    columns = (batch.column(0) for part in parts for _, batch in read_batches(part, ["pair_id"]))
    of_parts = [pa.array([], pa.large_string()), *(column.cast(pa.large_string()) for column in columns)]
    ids = pa.concat_arrays(of_parts)  # in one piece: each chunk would hold all values
    codes = ids.dictionary_encode().indices.to_numpy()
    _, first, place = np.unique(codes, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[place] != np.arange(len(codes)))
    starts = np.cumsum([0, *(report["records"] for report in reports)])
    made: dict[int, list[int]] = {}

    def find(record: int) -> tuple[int, int]:
        part = int(np.searchsorted(starts, record, side="right")) - 1
        if part not in made:
            skipped = set(reports[part]["skipped"])
            made[part] = [row for row in tasks[part].rows if row not in skipped]
        return part, made[part][record - int(starts[part])]

    found: dict[int, dict[int, str]] = defaultdict(dict)
    for record in again.tolist():
        (part, row), (first_part, first_row) = find(record), find(int(first[place[record]]))
        found[part][row] = f"must be unique; {tasks[first_part].where(first_row)} has it too"
    return dict(found)
