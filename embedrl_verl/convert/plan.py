# SPDX-License-Identifier: Apache-2.0
"""The plan of a conversion: which rows of which file make which part.

A function of input and options alone, so that a resumed run has the same parts as an unbroken one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from embedrl_verl import __version__
from embedrl_verl.convert.converter import Converter, Shard
from embedrl_verl.convert.inputs import Root
from embedrl_verl.convert.rows import FileSurvey, Rows, survey
from embedrl_verl.convert.sampling import Sampling, preset
from embedrl_verl.errors import ConfigError, DataError

PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class Unit:
    """Rows that make one part.

    Attributes:
        index: number of the part.
        first, count: first row, and how many.
        chosen: the rows, ascending, if they do not follow each other.
        anchor: see `FileSurvey.anchor`.
    """

    index: int
    shard: Shard
    first: int
    count: int
    chosen: Rows | None = field(repr=False)
    anchor: tuple[int, int]

    @property
    def rows(self) -> Rows:
        """Ascending row numbers of `shard.file`."""
        return np.arange(self.first, self.first + self.count) if self.chosen is None else self.chosen


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first row is read.

    Attributes:
        shards: as the converter names them, with their ends filled in.
        chosen: by shard, the rows that are used; None = all.
        surveys: by file.
        available: rows by source, before sampling.
        shard_rows: rows of one part at most.
    """

    shards: tuple[Shard, ...]
    chosen: tuple[Rows | None, ...]
    surveys: Mapping[str, FileSurvey]
    available: Mapping[str, int]
    shard_rows: int

    def selected(self) -> dict[str, int]:
        """Rows that are used, by source."""
        counts: dict[str, int] = defaultdict(int)
        for shard, chosen in zip(self.shards, self.chosen, strict=True):
            counts[shard.source] += _length(shard) if chosen is None else len(chosen)
        return dict(counts)

    @property
    def total(self) -> int:
        """Rows that are used."""
        return sum(self.selected().values())

    @property
    def files(self) -> list[str]:
        """Files that are read, in order, each once."""
        return list(dict.fromkeys(shard.file for shard in self.shards))

    @property
    def faults(self) -> dict[str, str]:
        """File -> why it cannot be read, or ends early."""
        return {name: self.surveys[name].fault for name in self.files if self.surveys[name].fault}

    def units(self) -> Iterator[Unit]:
        """The parts in order; their rows are made when they are asked for."""
        index = 0
        for shard, chosen in zip(self.shards, self.chosen, strict=True):
            length = _length(shard) if chosen is None else len(chosen)
            for start in range(0, length, self.shard_rows):
                rows = None if chosen is None else chosen[start : start + self.shard_rows]
                first = shard.start + start if rows is None else int(rows[0])
                count = min(self.shard_rows, length - start)
                yield Unit(index, shard, first, count, rows, self.surveys[shard.file].anchor(first))
                index += 1


def make_plan(root: Root, converter: Converter, sampling: Sampling, shard_rows: int) -> Plan:
    """Ask the converter for its shards, count their rows and draw the sample."""
    if shard_rows < 1:
        raise ConfigError(f"a part must have at least 1 row; got {shard_rows}")
    named = converter.shards(root)
    if not named:
        raise DataError(f"{root.location}: the converter {converter.name} finds nothing to read there")
    surveys = {name: survey(root, name) for name in dict.fromkeys(shard.file for shard in named)}
    shards = tuple(_with_end(shard, surveys[shard.file].rows) for shard in named)
    available: dict[str, int] = defaultdict(int)
    for shard in shards:
        available[shard.source] += _length(shard)
    _check_caps(sampling, available)
    return Plan(shards, tuple(_choose(shards, available, sampling)), surveys, dict(available), shard_rows)


def build_facts(
    root: Root, converter: Converter, sampling: Sampling, plan: Plan, media: Mapping[str, Any], licence: str
) -> dict[str, Any]:
    """All that decides the output: two conversions with equal facts write the same files."""
    return {
        "tool": f"embedrl-verl {__version__}",
        "converter": converter.name,
        "licence": licence,
        "settings": dict(converter.settings),
        "sampling": {
            "preset": sampling.preset,
            "method": sampling.method,
            "seed": sampling.seed,
            "default_cap": sampling.default_cap,
            "caps": {source: sampling.caps[source] for source in sorted(sampling.caps)},
        },
        "media": dict(media),
        "shard_rows": plan.shard_rows,
        "input": {
            "location": root.location,
            "files": [{"file": name, "bytes": root.size(name), "rows": plan.surveys[name].rows} for name in plan.files],
        },
    }


def _choose(shards: tuple[Shard, ...], available: Mapping[str, int], sampling: Sampling) -> Iterator[Rows | None]:
    """By shard, the rows that are used; positions count over all shards of a source."""
    positions = {source: sampling.choose(source, total) for source, total in available.items()}
    before: dict[str, int] = defaultdict(int)
    for shard in shards:
        first, length = before[shard.source], _length(shard)
        before[shard.source] += length
        chosen = positions[shard.source]
        if chosen is None:
            yield None
        else:
            low, high = np.searchsorted(chosen, (first, first + length))
            yield chosen[low:high] - first + shard.start


def _with_end(shard: Shard, rows: int) -> Shard:
    """The shard with `start` and `stop` within the file."""
    stop = rows if shard.stop is None else min(shard.stop, rows)
    return Shard(shard.file, shard.source, min(shard.start, stop), stop, shard.note)


def _length(shard: Shard) -> int:
    assert shard.stop is not None
    return shard.stop - shard.start


def _check_caps(sampling: Sampling, available: Mapping[str, int]) -> None:
    of_preset = preset(sampling.preset).sources if sampling.preset else {}
    unknown = sorted(set(sampling.caps) - set(available) - set(of_preset))
    if unknown:
        raise ConfigError(f"--cap names the source {unknown[0]!r}; the input has {', '.join(sorted(available))}")
