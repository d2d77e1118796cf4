# SPDX-License-Identifier: Apache-2.0
"""What is to be embedded, cut into parts: lines of JSON, pair records, or the pictures of a folder.

A part is found again without what stands before it (a byte offset, row groups, names), and is read row by row.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from embedrl_verl.data.build import build_facts
from embedrl_verl.data.files import media_root_of, pair_files, stamp_of
from embedrl_verl.data.parquet import Span, scan_pairs, spans
from embedrl_verl.data.schema import PairRecord, Side
from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.model import Ask, ask_for
from embedrl_verl.model.tcots import PairSide

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

MEDIA_KEYS = ("image", "images", "video")


@dataclass(frozen=True)
class Lines:
    """`count` lines of a JSON-lines file from byte `offset` on; the first is line `first` (from 1)."""

    file: Path
    offset: int
    first: int
    count: int


@dataclass(frozen=True)
class Pictures:
    """Pictures of a folder, by their paths below it."""

    folder: Path
    names: tuple[str, ...]


Part = Lines | Span | Pictures


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    Attributes:
        side: of pair records, and the question that the Reasoner is asked.
        instruction: of rows that bring none.
        media_root: of paths; None: the folder of the JSON file, or as data cards say.
        max_frames: drawn from a video.
    """

    side: Side
    instruction: str = ""
    media_root: str | None = None
    max_frames: int = 8


class Row(NamedTuple):
    """A row: its id, where it stands (for people), and what decodes it.

    `ask` raises ConfigError or DataError, of this row alone; call it in a thread if the row has media."""

    id: str
    where: str
    ask: Callable[[], Ask]
    has_media: bool = True


class Inputs:
    """The inputs that a user names, in order: *.jsonl files, parquet files or data set folders of pair records, and
    folders of pictures (folders below them too).

    Attributes:
        parts: of about `rows` rows.
        count: rows of all.
        facts: what tells them from other inputs, for `build_facts`; `stamps`: times of change.

    Raises:
        DataError: an input is missing, is none of these, or holds nothing.
    """

    def __init__(self, paths: Sequence[str], rows: int) -> None:
        self.parts: list[Part] = []
        self.facts: list[dict[str, Any]] = []
        self.stamps: list[str] = []
        self.count = 0
        for path in map(Path, paths):
            if path.suffix == ".jsonl" and path.is_file():
                self._add_files([path])
                self._add(_lines(path, rows), lambda part: part.count)
            elif path.is_dir() and not any(path.glob("*.parquet")):
                self._add_pictures(path, rows)
            elif path.exists() and (path.is_dir() or path.suffix == ".parquet"):
                files = pair_files([path])
                self._add_files(files)
                self._add(spans(files, rows), lambda part: part.stop - part.start)
            else:
                raise DataError(
                    f"{path}: an input must be a *.jsonl file, a *.parquet file or folder of pair records, or a folder "
                    "of pictures that exists"
                )
        if not self.count:
            raise DataError(f"an input must have rows; {', '.join(map(str, paths))} has none")

    def _add_files(self, files: Sequence[Path]) -> None:
        self.facts += build_facts("", {}, files)["input"]
        self.stamps += map(stamp_of, files)

    def _add(self, parts: Sequence[Any], size: Callable[[Any], int]) -> None:
        self.parts += parts
        self.count += sum(map(size, parts))

    def _add_pictures(self, folder: Path, rows: int) -> None:
        names: list[str] = []
        told, size = hashlib.sha256(), 0
        for place, folders, files in os.walk(folder):
            folders.sort()
            names += (
                str(Path(place, name).relative_to(folder)) for name in sorted(files) if name.lower().endswith(PICTURES)
            )
        for name in names:
            stat = os.stat(folder / name)
            size += stat.st_size
            told.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode(errors="surrogateescape"))
        if not names:
            raise DataError(f"{folder} holds no pictures ({', '.join(PICTURES)}) and no parquet files")
        self.facts.append({"file": str(folder), "bytes": size, "sha256": told.hexdigest()})
        parts = [Pictures(folder, tuple(names[start : start + rows])) for start in range(0, len(names), rows)]
        self._add(parts, lambda part: len(part.names))


def _lines(file: Path, rows: int) -> list[Lines]:
    found: list[Lines] = []
    offset = start = number = first = 0
    with open(file, "rb") as lines:
        for line in lines:
            offset += len(line)
            number += 1
            if number - first == rows:
                found.append(Lines(file, start, first + 1, number - first))
                start, first = offset, number
    if number > first:
        found.append(Lines(file, start, first + 1, number - first))
    return found


def read_part(part: Part, how: Reading) -> Iterator[Row]:
    """The rows of a part, in order; one for every row of the input, also of those that cannot be used."""
    if isinstance(part, Lines):
        yield from _read_lines(part, how)
    elif isinstance(part, Pictures):
        for name in part.names:
            yield Row(name, str(part.folder / name), _asker({"image": name}, how, part.folder))
    else:
        root = how.media_root or media_root_of(part.file)
        for number, record in scan_pairs(part):
            where = f"{part.file}, row {number}"
            if isinstance(record, PairRecord):
                yield Row(record.pair_id, where, _pair_asker(PairSide(record, how.side, root), how))
            else:
                yield Row("", where, _refuser(record))


def _read_lines(part: Lines, how: Reading) -> Iterator[Row]:
    root = how.media_root or part.file.parent
    with open(part.file, "rb") as file:
        file.seek(part.offset)
        for number in range(part.first, part.first + part.count):
            where, name = f"{part.file}, line {number}", f"{part.file.name}:{number}"
            try:
                values = json.loads(file.readline())
                if not isinstance(values, Mapping):
                    raise ValueError(f"a {type(values).__name__}")
            except (ValueError, RecursionError) as error:
                yield Row(name, where, _refuser(DataError(f"a line must be a JSON object; it is not ({error})")))
                continue
            values = {key: value for key, value in values.items() if value is not None}
            given = values.pop("id", name)
            yield Row(str(given), where, _asker(values, how, root), not values.keys().isdisjoint(MEDIA_KEYS))


def _asker(values: Mapping[str, Any], how: Reading, root: str | Path) -> Callable[[], Ask]:
    return lambda: ask_for(values, how.side, instruction=how.instruction, media_root=root, max_frames=how.max_frames)


def _pair_asker(given: PairSide, how: Reading) -> Callable[[], Ask]:
    return lambda: ask_for(given.ask(how.max_frames), how.side, instruction=how.instruction)


def _refuser(error: DataError) -> Callable[[], Ask]:
    def refuse() -> Ask:
        raise error

    return refuse


ROW_ERRORS = (ConfigError, DataError)
"""What `Row.ask` raises."""
