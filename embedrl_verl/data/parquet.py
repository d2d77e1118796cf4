# SPDX-License-Identifier: Apache-2.0
"""Pair records in parquet: one row a pair.

| column | type |
|---|---|
| pair_id, data_source, instruction | string |
| query_id, target_id (optional) | string |
| query, target | struct {text, kind, instruction, tcot: string, images: list<media>, video: video} |
| negatives (optional) | list of the same struct |

media = struct {path: string, bytes: binary}; video = struct {frames: list<media>, path: string, fps: double}. Null
means empty everywhere, and of a struct only the fields that are used need to exist. A media struct with bytes is
those bytes (its path is then only a name, as in files written by `datasets`). Other columns are ignored. Arrow's
other forms of a type (large, view, dictionary, as of pandas' categories) are the type.

Rows are counted from 0 over the whole file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedrl_verl.data.files import publish, temporary_name
from embedrl_verl.data.schema import Item, Media, PairRecord, Video
from embedrl_verl.errors import DataError

MEDIA = pa.struct([("path", pa.string()), ("bytes", pa.binary())])
VIDEO = pa.struct([("frames", pa.list_(MEDIA)), ("path", pa.string()), ("fps", pa.float64())])
ITEM = pa.struct(
    [
        ("text", pa.string()),
        ("images", pa.list_(MEDIA)),
        ("video", VIDEO),
        ("kind", pa.string()),
        ("instruction", pa.string()),
        ("tcot", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("data_source", pa.string()),
        ("instruction", pa.string()),
        ("query", ITEM),
        ("target", ITEM),
        ("query_id", pa.string()),
        ("target_id", pa.string()),
        ("negatives", pa.list_(ITEM)),
    ]
)
OPTIONAL_COLUMNS = ("query_id", "target_id", "negatives")
ROWS_PER_BATCH = 256
BYTES_PER_BATCH = 256 << 20
ROWS_PER_GROUP = 1024
READ_BUFFER = 1 << 20
BYTES_PER_GROUP = 16 << 20


def read_pairs(path: str | Path) -> Iterator[PairRecord]:
    """The records of a file, in order, read in small batches."""
    for _, record in scan_pairs(path):
        if isinstance(record, DataError):
            raise record
        yield record


def scan_pairs(path: str | Path) -> Iterator[tuple[int, PairRecord | DataError]]:
    """Every row number (from 0) with its record, or with the error that says why it is none."""
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error
    with file:
        check_schema(file.schema_arrow, path)
        columns = [name for name in SCHEMA.names if name in file.schema_arrow.names]
        row = 0
        try:
            # A group at a time: a batch over several groups of large media would hold all of them.
            for group in range(file.num_row_groups):
                facts = file.metadata.row_group(group)
                rows = BYTES_PER_BATCH * facts.num_rows // max(facts.total_byte_size, 1)
                rows = max(1, min(ROWS_PER_BATCH, rows))
                for batch in in_pieces(file, rows, row_groups=[group], columns=columns):
                    for values in batch.to_pylist():
                        yield row, record_or_error(values, path, row)
                        row += 1
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read after row {row} ({error})") from error


def in_pieces(file: pq.ParquetFile, rows: int, **options: Any) -> Iterator[pa.RecordBatch]:
    """`file.iter_batches(rows, **options)`, in smaller ones from where one would not fit: an Arrow array holds 2 GiB.

    The footer does not tell: a value that a group's dictionary holds once counts once there.
    """
    done = 0
    while True:
        row = 0
        try:
            for batch in file.iter_batches(batch_size=rows, **options):
                new = max(done - row, 0)
                row += batch.num_rows
                if new < batch.num_rows:
                    done = row
                    yield batch.slice(new)
            return
        except (pa.ArrowNotImplementedError, pa.ArrowCapacityError):
            if rows == 1:
                raise
            rows //= 2


class PairWriter:
    """Writes records to a parquet file, in order, with bounded memory: a row group is written when it has
    `ROWS_PER_GROUP` records or `BYTES_PER_GROUP` bytes of media. Pages carry checksums. A context manager."""

    def __init__(self, path: str | Path) -> None:
        self._writer = pq.ParquetWriter(path, SCHEMA, write_page_checksum=True)
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def __enter__(self) -> PairWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._write_group()
        finally:
            self._writer.close()

    def add(self, record: PairRecord) -> None:
        """Append a record."""
        self._rows.append(_row_from_record(record))
        self._bytes += sum(len(media) for media in _media_of(record) if isinstance(media, bytes))
        if len(self._rows) == ROWS_PER_GROUP or self._bytes >= BYTES_PER_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA))
        self._rows, self._bytes = [], 0


def write_pairs(records: Iterable[PairRecord], path: str | Path) -> None:
    """Write records to a parquet file, in order; the folder is made if missing.

    The file appears when it is whole: a record that cannot be written leaves what was there before.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(target)
    try:
        with PairWriter(temporary) as writer:
            for record in records:
                writer.add(record)
        publish(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def check_schema(found: pa.Schema, path: str | Path) -> None:
    """Raise DataError, naming file and field, if a file of this schema does not hold pair records."""
    for field in SCHEMA:
        if field.name in found.names:
            _check_type(found.field(field.name).type, field.type, f"{path}, field {field.name}")
        elif field.name not in OPTIONAL_COLUMNS:
            raise DataError(f"{path}: column {field.name!r} is missing; the file has {', '.join(found.names)}")


def _check_type(found: pa.DataType, wanted: pa.DataType, where: str) -> None:
    """Recursive check; an all-null column passes, and so does any form in which Arrow keeps the type."""
    if pa.types.is_dictionary(found):
        found = found.value_type
    if pa.types.is_null(found):
        return
    if pa.types.is_struct(wanted):
        if not pa.types.is_struct(found):
            raise DataError(f"{where}: must be a struct; got {found}")
        names = [field.name for field in wanted]
        for field in found:
            if field.name not in names:
                raise DataError(f"{where}.{field.name}: unknown field; known are {', '.join(names)}")
            _check_type(field.type, wanted.field(field.name).type, f"{where}.{field.name}")
        return
    if pa.types.is_list(wanted):
        if not is_list(found):
            raise DataError(f"{where}: must be a list; got {found}")
        _check_type(found.value_type, wanted.value_type, f"{where}[]")
        return
    accepted: dict[pa.DataType, tuple[Callable[[pa.DataType], bool], ...]] = {
        pa.string(): (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
        pa.binary(): (
            *(pa.types.is_binary, pa.types.is_large_binary),
            *(pa.types.is_binary_view, pa.types.is_fixed_size_binary),
        ),
        pa.float64(): (pa.types.is_floating, pa.types.is_integer),
    }
    if not any(test(found) for test in accepted[wanted]):
        raise DataError(f"{where}: must be {wanted}; got {found}")


def is_list(kind: pa.DataType) -> bool:
    """Whether values are lists, in whatever form Arrow keeps them."""
    types = pa.types
    forms = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return any(test(kind) for test in forms)


def record_or_error(values: dict[str, Any], path: str | Path, row: int) -> PairRecord | DataError:
    """A row's plain values as a record, or the error that names file, row (from 0) and field."""
    try:
        return _record(values)
    except DataError as error:
        return DataError(f"{path}, row {row}: {error}")


def _record(values: dict[str, Any]) -> PairRecord:
    for side, other in (("query", "target"), ("target", "query")):
        if values[side] is None:
            raise DataError(f"field {side}: null; a pair needs both sides, and this {other} has no partner")
    return PairRecord(
        pair_id=values["pair_id"] or "",
        data_source=values["data_source"] or "",
        instruction=values["instruction"] or "",
        query=_item(values["query"], "query"),
        target=_item(values["target"], "target"),
        target_id=values.get("target_id") or "",
        negatives=tuple(_item(item, f"negatives[{i}]") for i, item in enumerate(values.get("negatives") or ())),
        query_id=values.get("query_id") or "",
    )


def _item(values: dict[str, Any] | None, field: str) -> Item:
    if values is None:
        raise DataError(f"field {field}: null")
    video = values.get("video")
    try:
        return Item(
            text=values.get("text") or "",
            images=_media_list(values.get("images"), f"{field}.images"),
            video=None if video is None else _video(video, f"{field}.video"),
            instruction=values.get("instruction") or "",
            kind=values.get("kind"),
            tcot=values.get("tcot") or "",
        )
    except DataError as error:
        raise _in_field(error, field) from error


def _video(values: dict[str, Any], field: str) -> Video:
    frames = _media_list(values.get("frames"), f"{field}.frames")
    fps = values.get("fps")
    try:
        return Video(frames=frames, path=values.get("path"), fps=None if fps is None else float(fps))
    except DataError as error:
        raise _in_field(error, field) from error


def _in_field(error: DataError, field: str) -> DataError:
    """The error with the name of its field, once."""
    return error if str(error).startswith("field ") else DataError(f"field {field}: {error}")


def _media_list(values: list[dict[str, Any] | None] | None, field: str) -> tuple[Media, ...]:
    media: list[Media] = []
    for index, value in enumerate(values or ()):
        reference = value and (value.get("bytes") or value.get("path"))
        if not reference:
            raise DataError(f"field {field}[{index}]: must have a path or bytes; both are empty")
        media.append(reference)
    return tuple(media)


def _media_of(record: PairRecord) -> Iterator[Media]:
    for item in (record.query, record.target, *record.negatives):
        yield from item.images
        if item.video is not None:
            yield from item.video.frames


def _row_from_record(record: PairRecord) -> dict[str, Any]:
    items = {"query": _row_from_item(record.query), "target": _row_from_item(record.target)}
    return {**vars(record), **items, "negatives": [_row_from_item(item) for item in record.negatives]}


def _row_from_item(item: Item) -> dict[str, Any]:
    video = item.video and {**vars(item.video), "frames": _structs(item.video.frames)}
    return {**vars(item), "images": _structs(item.images), "video": video}


def _structs(several: Iterable[Media]) -> list[dict[str, str | bytes | None]]:
    return [
        {"path": media, "bytes": None} if isinstance(media, str) else {"path": None, "bytes": media}
        for media in several
    ]


def opened(path: str | Path) -> pq.ParquetFile:
    """Read through a small buffer, not a whole row group ahead; damaged pages are noticed if they have checksums."""
    return pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_BUFFER, page_checksum_verification=True)
