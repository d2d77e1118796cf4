# SPDX-License-Identifier: Apache-2.0
"""What a source has to say: which files it reads, and how one of their rows becomes pair records.

Everything else (reading, sharding, worker processes, resuming, media, bad rows, the data card) is `convert.job`'s. A
converter is pickled to worker processes, keeps no state between rows, and depends on nothing but the row it is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from embedrl_verl.data.schema import Media, PairRecord
from embedrl_verl.errors import DataError

Setting = str | int | float | bool | None
_MISSING = object()


class RowError(DataError):
    """A row cannot become a pair; the job rejects the row, counts it and goes on.

    Args:
        field: column at fault, as `qry_image_path` or `conversations[1].value`; "" for the whole row.
        reason: rule, and the value found. The job adds file and row.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"field {field}: {reason}" if field else reason)
        self.field = field
        self.reason = reason

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str]]:
        return RowError, (self.field, self.reason)


@dataclass(frozen=True)
class Shard:
    """Rows start..stop-1 of one file, all of one data source. The same file may be in several shards.

    Attributes:
        file: path relative to the input root, with "/"; .parquet, .jsonl, .jsonl.gz, or .arrow (`save_to_disk`).
        source: data source of the records. Caps count by it. "" when only the rows tell.
        start, stop: rows of the file, from 0; stop None is the file's end.
        note: anything that `convert` wants to know of the shard, such as the mode of LLaVA-Hound.
    """

    file: str
    source: str
    start: int = 0
    stop: int | None = None
    note: str = ""


@dataclass(frozen=True)
class RawRow:
    """One row as the file has it, and where it is from. The readers raise `RowError` naming the column.

    Attributes:
        shard: the shard that it belongs to.
        row: number in the file, from 0 (for jsonl: line - 1; blank lines count).
        values: plain Python values by column.
    """

    shard: Shard
    row: int
    values: Mapping[str, Any] = field(repr=False)

    def pair_id(self, suffix: str = "") -> str:
        """ "<source>:<file without extension>:<row>[:suffix]": stable, and unique within a source."""
        name = self.shard.file.removesuffix(".gz").rsplit(".", 1)[0]
        return f"{self.shard.source}:{name}:{self.row}" + (f":{suffix}" if suffix else "")

    def value(self, name: str, default: Any = _MISSING) -> Any:
        """The column's value; without a default the column must exist."""
        if name not in self.values:
            if default is _MISSING:
                raise RowError(name, f"the column is missing; the row has {', '.join(self.values) or 'none'}")
            return default
        return self.values[name]

    def text(self, name: str, default: str | None = None) -> str:
        """A string. Null (and a missing column, with a default) is the default, else an error; "" is a string."""
        value = self.value(name, default) if default is not None else self.value(name)
        return as_text(default if value is None else value, name)

    def texts(self, name: str) -> tuple[str, ...]:
        """A string or a list of strings, as a tuple; null is ()."""
        value = self.value(name)
        if value is None:
            return ()
        if isinstance(value, list):
            return tuple(as_text(part, f"{name}[{index}]") for index, part in enumerate(value))
        return (as_text(value, name),)

    def image(self, name: str) -> Media:
        """The one image of a column, see `as_media`; null or "" is an error."""
        return as_media(self.value(name), name)

    def images(self, name: str) -> tuple[Media, ...]:
        """No, one or several images: null, "", one value of `as_media`, or a list of such values."""
        value = self.value(name)
        if value is None or value == "":
            return ()
        if isinstance(value, list):
            return tuple(as_media(part, f"{name}[{index}]") for index, part in enumerate(value))
        return (as_media(value, name),)


class Converter(Protocol):
    """A source of pair records.

    Attributes:
        name: of the source, lower case; stands in the data card.
        licence: as the source declares it, or "not declared".
    """

    name: str
    licence: str

    @property
    def settings(self) -> Mapping[str, Setting]:
        """All that changes the records, for the data card; a conversion can only be resumed with the same."""
        ...

    def shards(self, root: InputRoot) -> list[Shard]:
        """What to read, in the order of the records. Raises DataError if the root has none of the expected files."""
        ...

    def convert(self, row: RawRow) -> Iterable[PairRecord]:
        """The pairs of a row: usually one; none is "not used" (counted, no error). Raises RowError for a bad row.

        Images are paths relative to the media root, or the bytes of image files as they are; the job checks them.
        """
        ...


class InputRoot(Protocol):
    """The folder (or hub repository) of a source's files."""

    def files(self, *patterns: str) -> list[str]:
        """Paths relative to the root, with "/", of the files that match any glob pattern ("**" = any depth), without
        doubles, in natural order (part-2 before part-10) pattern by pattern."""
        ...


def as_text(value: Any, field: str) -> str:
    """The value if it is a string. Raises RowError."""
    if not isinstance(value, str):
        raise RowError(field, f"must be a string; got {show(value)}")
    return value


def as_media(value: Any, field: str) -> Media:
    """A path (string), bytes, or the `datasets` struct {bytes, path}, of which bytes win. Raises RowError."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str | bytes) or not value:
        raise RowError(
            field, f"must be a path, the bytes of an image, or a struct of bytes and path; got {show(value)}"
        )
    return value


def show(value: Any) -> str:
    """A value for a message: short, with its type."""
    if value is None:
        return "null"
    text = f"{len(value)} bytes" if isinstance(value, bytes) else repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
