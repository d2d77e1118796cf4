# SPDX-License-Identifier: Apache-2.0
"""Pairs from a user's own files: parquet, JSON lines, or a folder written by `datasets` (`save_to_disk`).

Without a column map a row has the fields of a pair record itself: `query` and `target`, each a text or an object with
text, images, video, kind, instruction, tcot; optional pair_id, data_source, instruction, query_id, target_id,
negatives. So our own parquet files can be read.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from embedrl_verl.convert.column_map import ITEM_KEYS, ColumnMap, Reference, item_of, load_column_map
from embedrl_verl.convert.converter import InputRoot, RawRow, RowError, Setting, Shard, as_text, show
from embedrl_verl.convert.inputs import natural_key
from embedrl_verl.data.files import REJECTED_FILE, WORK_FOLDER
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.errors import ConfigError, DataError

PATTERNS = ("**/*.parquet", "**/*.jsonl", "**/*.jsonl.gz", "**/data-*.arrow")


class GenericConverter:
    """Rows of any columns by a map.

    Args:
        columns: the map; None: rows have the fields of pair records.
        source: data source of all records; "" if the map or the rows say it.
        default_source: data source of rows that do not say it.
        pattern: glob pattern of the files to read; "" for all kinds that can be read.
        licence: of the data; "" = not declared.
    """

    name = "generic"

    def __init__(
        self,
        columns: ColumnMap | None,
        source: str = "",
        default_source: str = "own",
        pattern: str = "",
        licence: str = "",
    ) -> None:
        self.columns, self.pattern = columns, pattern
        self.source, self.default_source = source, default_source
        self.licence = licence or "not declared"

    @property
    def settings(self) -> Mapping[str, Setting]:
        """The map, flat, and the source."""
        own = {"source": self.source, "default_source": self.default_source, "pattern": self.pattern}
        plain = {} if self.columns is None else self.columns.as_plain()
        return own | {f"columns.{key}": _setting(value) for key, value in plain.items()}

    def shards(self, root: InputRoot) -> list[Shard]:
        """All files that can be read, each a shard."""
        patterns = (self.pattern,) if self.pattern else PATTERNS
        names = [name for name in root.files(*patterns) if self.pattern or not _is_ours(PurePosixPath(name))]
        if not names:
            raise DataError(f"no file fits {', '.join(patterns)}; the input must be a file or folder of such files")
        return [Shard(name, self._constant_source()) for name in sorted(names, key=natural_key)]

    def convert(self, row: RawRow) -> Iterable[PairRecord]:
        """The pair of a row."""
        record = self._own_form(row) if self.columns is None else self._mapped(row, self.columns)
        return (record,)

    def _mapped(self, row: RawRow, columns: ColumnMap) -> PairRecord:
        texts = {key: _optional_text(reference, row.values) for key, reference in columns.record.items()}
        source = self.source or texts.get("data_source", "") or self.default_source
        query, target = (_mapped_item(getattr(columns, side), row.values, side) for side in ("query", "target"))
        return PairRecord(
            pair_id=_pair_id(row, columns.record["pair_id"].look_up(row.values), source)
            if "pair_id" in columns.record
            else _numbered(row, source),
            data_source=source,
            instruction=texts.get("instruction", ""),
            query=query,
            target=target,
            query_id=texts.get("query_id", ""),
            target_id=texts.get("target_id", ""),
            negatives=tuple(
                item
                for index, fields in enumerate(columns.negatives)
                for item in _spread(fields, row.values, f"negatives[{index}]")
            ),
        )

    def _own_form(self, row: RawRow) -> PairRecord:
        values = row.values
        if "query" not in values and "target" not in values:
            raise RowError(
                "",
                "has neither query nor target; say which columns they are with --column query.text=..., --column "
                f"target.text=..., or a map (--columns). The row has {', '.join(values) or 'none'}",
            )
        source = self.source or _own_text(values, "data_source") or self.default_source
        negatives = values.get("negatives") or []
        if not isinstance(negatives, list):
            raise RowError("negatives", f"must be a list; got {show(negatives)}")
        return PairRecord(
            pair_id=_pair_id(row, values.get("pair_id"), source),
            data_source=source,
            instruction=_own_text(values, "instruction"),
            query=_own_item(row.value("query"), "query"),
            target=_own_item(row.value("target"), "target"),
            query_id=_own_text(values, "query_id"),
            target_id=_own_text(values, "target_id"),
            negatives=tuple(_own_item(item, f"negatives[{index}]") for index, item in enumerate(negatives)),
        )

    def _constant_source(self) -> str:
        """The source, if it is the same for all rows."""
        if self.source or self.columns is None:
            return self.source
        reference = self.columns.record.get("data_source", Reference(constant=self.default_source))
        return str(reference.constant or "")


def make_generic(arguments: argparse.Namespace) -> GenericConverter:
    """From the options of `add_generic_options`."""
    columns = load_column_map(arguments.columns, arguments.column, arguments.value)
    in_map = columns is not None and "data_source" in columns.record
    if in_map and arguments.source:
        raise ConfigError("the column map says data_source, and --source too; leave one out")
    return GenericConverter(columns, arguments.source, _name_of(arguments.input), arguments.pattern, arguments.licence)


def add_generic_options(parser: argparse.ArgumentParser) -> None:
    """The options of `data_preprocess/generic.py` beside the common ones."""
    parser.add_argument("--columns", metavar="FILE", help="column map in YAML")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="KEY=COLUMN",
        help="one entry of the map, as query.text=question or target.images=photo; may be given again",
    )
    parser.add_argument(
        "--value",
        action="append",
        default=[],
        metavar="KEY=TEXT",
        help="a constant, as 'instruction=Find the caption of this photo.'; may be given again",
    )
    parser.add_argument(
        "--source", default="", help="data source of all rows (what the rows say, else the input's name)"
    )
    parser.add_argument("--pattern", default="", metavar="GLOB", help="files of the folder to read, as train/*.parquet")


def _mapped_item(fields: Mapping[str, Reference], row: Mapping[str, Any], side: str) -> Item:
    values = {key: reference.look_up(row) for key, reference in fields.items()}
    return item_of(values, lambda key: fields[key].name, side)


def _spread(fields: Mapping[str, Reference], row: Mapping[str, Any], side: str) -> Iterable[Item]:
    """The negatives of one map: where its columns hold lists of equal length, one negative an entry; empty ones go."""
    values = {key: reference.look_up(row) for key, reference in fields.items()}
    lists = {key: value for key, value in values.items() if isinstance(value, list)}
    lengths = {len(value) for value in lists.values()}
    if len(lengths) > 1:
        found = ", ".join(f"{fields[key].name} {len(value)}" for key, value in lists.items())
        raise RowError(side, f"the lists of a negative's fields must be equally long; got {found}")
    count = lengths.pop() if lengths else 1
    for index in range(count):
        one = {key: value[index] if key in lists else value for key, value in values.items()}
        item = item_of(one, lambda key: fields[key].name, f"{side}, entry {index}")
        if not item.is_empty:
            yield item


def _own_item(value: Any, side: str) -> Item:
    if isinstance(value, str):
        return Item(text=value)
    if not isinstance(value, Mapping):
        raise RowError(side, f"must be a text or an object; got {show(value)}")
    for key in value:
        if key not in ITEM_KEYS:
            raise RowError(f"{side}.{key}", f"unknown field; known are {', '.join(ITEM_KEYS)}")
    return item_of(value, lambda key: f"{side}.{key}", side)


def _own_text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    return "" if value is None else as_text(value, name)


def _optional_text(reference: Reference, row: Mapping[str, Any]) -> str:
    value = reference.look_up(row)
    if isinstance(value, int) and not isinstance(value, bool):  # ids are often numbers
        return str(value)
    return "" if value is None else as_text(value, reference.name)


def _pair_id(row: RawRow, value: Any, source: str) -> str:
    """The row's own id behind the source's name, or its number in the file."""
    if value is None or value == "":
        return _numbered(row, source)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return as_text(value, "pair_id")


def _numbered(row: RawRow, source: str) -> str:
    return source + row.pair_id().removeprefix(row.shard.source)


def _name_of(location: str) -> str:
    """A data source's name from a path or hub id: lower case, letters, digits and _."""
    name = PurePosixPath(location.split("@")[0].rstrip("/")).name
    return re.sub(r"[^a-z0-9]+", "_", name.split(".")[0].lower()).strip("_") or "own"


def _is_ours(path: PurePosixPath) -> bool:
    """Hidden files, and what data commands write beside pair records."""
    return path.name.startswith(".") or path.name == REJECTED_FILE or WORK_FOLDER in path.parts


def _setting(value: Any) -> Setting:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return repr(value)
