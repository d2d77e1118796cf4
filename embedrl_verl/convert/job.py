# SPDX-License-Identifier: Apache-2.0
"""A conversion from start to end: which rows are used, parts in worker processes, ids that come twice, the data card.

Which rows make which part is a function of input and options. Workers make the parts (data/build.py); those with the
`pair_id` of an earlier record are made again, with these rows rejected. So after kill -9 the same command goes on.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, replace
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
from embedrl_verl.convert.restart import remove_earlier
from embedrl_verl.convert.rows import as_arrow, count_rows
from embedrl_verl.convert.sampling import METHODS, Sampling, preset, presets, sampling_from_options
from embedrl_verl.data.build import Report, building, finish, list_causes, make_parts
from embedrl_verl.data.files import CARD_FILE, MEDIA_FOLDER, part_name, read_object, sha256_of
from embedrl_verl.data.parquet import read_batches
from embedrl_verl.errors import ConfigError, DataError


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
    sampling = sampling_from_options(options.cap, options.preset, options.sample, options.seed)
    root = InputRoot(options.input, without=out, media_root=options.media_root)
    shards = converter.shards(root)
    sources = {shard.source for shard in shards}
    if unknown := sorted(
        set(sampling.caps) - sources - set(preset(sampling.preset).sources if sampling.preset else ())
    ):
        raise ConfigError(f"--cap names the source {unknown[0]!r}; the input has {', '.join(sorted(sources))}")
    files = {shard.file: root.path(shard.file) for shard in shards}
    facts = _build_facts(root, converter, options, sampling, files)
    if options.restart:
        remove_earlier(out, [*files.values(), *([root.media_root] if root.media_root else [])], command)
    store = MediaStore(options.media, options.verify, root.media_root, out)
    store.check_folder()
    with building(out, facts, command, anew="begin anew with --restart") as work:
        if work is None:
            return read_object(out / CARD_FILE)
        store.remove_stale()
        arrow = {name: as_arrow(name, path, work / "arrow") for name, path in files.items()}
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
    root: InputRoot, converter: Converter, options: JobOptions, sampling: Sampling, files: Mapping[str, Path]
) -> dict[str, Any]:
    """All that decides the output. Files of the hub are pinned by the commit; local ones by their content."""
    said = {name: value for name, value in converter.settings.items() if value not in ("", ())}
    said |= {"media": options.media, "verify": options.verify, "shard_rows": options.shard_rows}
    real: dict[Path, str] = {}
    for name, path in files.items() if not root.commit else ():
        if (other := real.setdefault(path.resolve(), name)) != name:
            raise DataError(f"{name} is {other} under another name (a link); take one of them away, or name the files")
    return {
        "tool": f"embedrl-verl {__version__}",
        "command": converter.name,
        "licence": options.licence or converter.licence,
        "settings": said,
        "sampling": asdict(sampling),
        "location": root.location,
        "media_root": root.media_root and os.path.abspath(root.media_root),
        "input": [
            {"file": name, "bytes": path.stat().st_size, "sha256": None if root.commit else sha256_of(path)}
            for name, path in files.items()
        ],
    }


def _plan(
    shards: Sequence[Shard], arrow: dict[str, Path], rows: dict[str, int], sampling: Sampling, shard_rows: int
) -> tuple[list[Task], dict[str, int]]:
    """The tasks in order, and the rows of each source before sampling. Positions count over all files of a source."""
    lengths = [min(rows[shard.file], shard.stop or rows[shard.file]) for shard in shards]
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
    return tasks, available


def _make_all(make: PartMaker, tasks: Sequence[Task], work: Path, options: JobOptions) -> list[Report]:
    """The reports of all parts, with every `pair_id` once."""
    total = sum(len(task.rows) for task in tasks)
    out, share, label = work.parent, options.max_bad_share, make.converter.name

    def parts(tasks: Sequence[Task]) -> list[Report]:
        return make_parts(make, tasks, work, rows=total, workers=options.workers, max_bad_share=share, label=label)

    reports = parts(tasks)
    if repeated := _repeated_rows(tasks, reports, out):
        # Without its report a part is made again, in full if the job is killed here: the ids are then found again.
        for number in repeated:
            (work / f"{part_name(number)}.json").unlink()
        reports = parts([replace(task, repeated=repeated.get(number, {})) for number, task in enumerate(tasks)])
    if not any(report["records"] for report in reports):
        causes = list_causes(reports, out)
        why = f". Causes:\n{causes}" if causes else ": the converter uses none of them"
        raise DataError(
            f"no pair could be made of {total} rows{why}\nMend the input or the options, and start again with --restart"
        )
    return reports


def _repeated_rows(tasks: Sequence[Task], reports: Sequence[Report], out: Path) -> dict[int, dict[int, str]]:
    """Part -> row of its file -> why it is rejected: the first record of an id, in order of the parts, stays."""
    files = (out / part_name(number) for number in range(len(tasks)))
    columns = (
        batch.column(0).cast(pa.large_string()) for file in files for _, batch in read_batches(file, ["pair_id"])
    )
    ids = pa.concat_arrays([pa.array([], pa.large_string()), *columns])  # in one piece: a chunk would hold all values
    codes = ids.dictionary_encode().indices.to_numpy()
    _, first, place = np.unique(codes, return_index=True, return_inverse=True)
    rows = [np.setdiff1d(task.rows, report["skipped"]) for task, report in zip(tasks, reports, strict=True)]
    parts = np.repeat(np.arange(len(tasks)), [len(of_part) for of_part in rows]).tolist()
    numbers = [number for of_part in rows for number in of_part.tolist()]
    found: dict[int, dict[int, str]] = defaultdict(dict)
    for again in np.flatnonzero(first[place] != np.arange(len(codes))).tolist():
        earlier = int(first[place[again]])
        why = f"must be unique; {tasks[parts[earlier]].where(numbers[earlier])} has it too"
        found[parts[again]][numbers[again]] = why
    return dict(found)
