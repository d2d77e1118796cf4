# SPDX-License-Identifier: Apache-2.0
"""What a script of `data_preprocess/` has to give: its options, the files that it reads, and the pair of a row.

Everything else (reading, parts, worker processes, resuming, media, bad rows, the data card) is done by convert/job.py.
A converter is pickled to worker processes and keeps no state between rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from embedrl_verl.convert.inputs import InputRoot
from embedrl_verl.data.schema import Media, PairRecord
from embedrl_verl.errors import ConfigError, DataError

_MISSING: Any = object()


class RowError(DataError):
    """A row cannot become a pair: it is rejected and counted, and the job goes on. `field` is the column at fault, as
    `conversations[1].value`; "" for the whole row."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"field {field}: {reason}" if field else reason)
        self.field, self.reason = field, reason


@dataclass(frozen=True)
class Shard:
    """The rows of a file that belong to one data source. The same file may be in several shards.

    Attributes:
        file: path relative to the input root, with "/"; .parquet, .jsonl, .jsonl.gz, or .arrow (`save_to_disk`).
        source: data source of the records. Caps count by it. "" when only the rows tell.
        stop: rows of the file that are used, from its first; None: all.
        note: anything that `convert` wants to know of the shard, such as the mode of LLaVA-Hound.
    """

    file: str
    source: str
    stop: int | None = None
    note: str = ""


@dataclass(frozen=True)
class RawRow:
    """Row number `row` of a file (from 0; of jsonl line - 1), plain values by column. The readers raise `RowError`."""

    shard: Shard
    row: int
    values: Mapping[str, Any] = field(repr=False)
    media_root: Path | None = None

    def pair_id(self, source: str | None = None) -> str:
        """ "<source>:<file without extension>:<row>": stable, and unique within a source."""
        name = self.shard.file.removesuffix(".gz").rsplit(".", 1)[0]
        return f"{self.shard.source if source is None else source}:{name}:{self.row}"

    def value(self, name: str, default: Any = _MISSING) -> Any:
        """The column's value; without a default the column must exist."""
        if name not in self.values and default is _MISSING:
            raise RowError(name, f"the column is missing; the row has {', '.join(self.values) or 'none'}")
        return self.values.get(name, default)

    def text(self, name: str, default: Any = _MISSING) -> str:
        """A string. Null and a missing column are the default, without one an error."""
        value = self.value(name, default)
        return as_text(default if value is None and default is not _MISSING else value, name)

    def texts(self, name: str) -> tuple[str, ...]:
        """A string or a list of strings, as a tuple; null is ()."""
        value = self.value(name)
        if isinstance(value, list):
            return tuple(as_text(part, f"{name}[{index}]") for index, part in enumerate(value))
        return () if value is None else (as_text(value, name),)


def option(default: Any, text: str, choices: Sequence[str] = ()) -> Any:
    """A field that is an option of the command line, with its help. With `MISSING` as default it must be given."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Options:
    """A data class whose fields are made by `option`."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value, choices = getattr(self, one.name), one.metadata["choices"]
            if choices and value and not set(value if isinstance(value, tuple) else (value,)) <= set(choices):
                raise ConfigError(f"{one.name} must be one of {', '.join(choices)}; got {value!r}")


@dataclass(frozen=True)
class Converter(Options):
    """A source of pair records, and the options of its script; name and licence (as the source declares it) stand in
    the data card."""

    name: ClassVar[str]
    licence: ClassVar[str] = "not declared"

    @property
    def settings(self) -> dict[str, Any]:
        """All that changes the records, for the data card; a conversion can only be resumed with the same."""
        return asdict(self)

    def shards(self, root: InputRoot) -> list[Shard]:
        """What to read, in the order of the records. Raises DataError if the root has none of the expected files."""
        raise NotImplementedError

    def convert(self, row: RawRow) -> PairRecord | None:
        """The pair of a row; None is "not used" (counted, no error). Raises RowError for a bad row. Images are paths
        relative to the media root, or the bytes of image files; the job checks them."""
        raise NotImplementedError


def as_text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise RowError(field, f"must be a string; got {show(value)}")
    return value


def as_media(value: Any, field: str) -> Media:
    """A path (string), bytes, or the `datasets` struct {bytes, path}, of which bytes win."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str | bytes) or not value:
        rule = "must be a path, the bytes of an image, or a struct of bytes and path"
        raise RowError(field, f"{rule}; got {show(value)}")
    return value


def as_images(value: Any, field: str) -> tuple[Media, ...]:
    """No, one or several images: null, "", one value of `as_media`, or a list of such values."""
    if isinstance(value, list):
        return tuple(as_media(part, f"{field}[{index}]") for index, part in enumerate(value))
    return () if value is None or value == "" else (as_media(value, field),)


def show(value: Any) -> str:
    """A value for a message: short, with its type."""
    if value is None:
        return "null"
    text = f"{len(value)} bytes" if isinstance(value, bytes) else repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
