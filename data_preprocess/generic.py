# SPDX-License-Identifier: Apache-2.0
"""Your own data as pair records: jsonl, parquet, a folder of `datasets`, or a hub id; docs/data.md has the column map.

python data_preprocess/generic.py --input photos.jsonl --out data/photos --column query.images=photo \\
    --column target.text=caption --value 'instruction=Find the caption of this photo.'

Without a column map a row has the fields of a pair record itself: `query` and `target`, each a text or an object with
text, images, video, kind, instruction, tcot; optional pair_id, data_source, instruction, query_id, target_id,
negatives. So our own parquet files can be read.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, ClassVar

from embedrl_verl.convert.column_map import ITEM_KEYS, RECORD_KEYS, apply_map, columns_of, load_column_map
from embedrl_verl.convert.command import convert_main
from embedrl_verl.convert.converter import Converter, RawRow, RowError, Shard, as_images, as_text, option, show
from embedrl_verl.convert.inputs import InputRoot, natural_key
from embedrl_verl.data.files import CARD_FILE, COMMAND_FILE, REJECTED_FILE, WORK_FOLDER
from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.errors import ConfigError, DataError

PATTERNS = ("**/*.parquet", "**/*.jsonl", "**/*.jsonl.gz", "**/data-*.arrow")
TEXTS = ("text", "instruction", "kind", "tcot")
FASTEST = 1e6


@dataclass(frozen=True)
class Generic(Converter):
    columns: str = option("", "column map in YAML")
    column: tuple[str, ...] = option(
        (), "KEY=COLUMN, one entry of the map, as query.text=question or target.images=photo; may be given again"
    )
    value: tuple[str, ...] = option((), "KEY=TEXT, a constant, as 'instruction=Find the caption of this photo.'")
    source: str = option("", "data source of all rows; without it what the rows say, else the input's name")
    pattern: str = option("", "files of the folder to read, as train/*.parquet")

    name = "generic"

    # Of the instance: read once, and sent to the workers.
    mapping: ClassVar[dict[str, Any] | None] = None
    names: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        mapping = load_column_map(self.columns, self.column, self.value)
        if mapping is not None and "data_source" in mapping and self.source:
            raise ConfigError("the column map says data_source, and --source too; leave one out")
        object.__setattr__(self, "mapping", mapping)
        object.__setattr__(self, "names", columns_of(mapping) if mapping else {})

    @property
    def settings(self) -> dict[str, Any]:
        return {"source": self.source, "pattern": self.pattern, **({"columns": self.mapping} if self.mapping else {})}

    def shards(self, root: InputRoot) -> list[Shard]:
        patterns = (self.pattern,) if self.pattern else PATTERNS
        names = root.files(*patterns) if self.pattern else not_ours(root, root.files(*patterns))
        if not names:
            raise DataError(f"no file fits {', '.join(patterns)}; the input must be a file or folder of such files")
        default, source = name_of(root.location), self.source
        if not source and self.mapping is not None:
            said = self.mapping.get("data_source", {"value": default})
            source = str(said.get("value", "")) if isinstance(said, dict) else ""
        return [Shard(name, source, note=default) for name in sorted(names, key=natural_key)]

    def convert(self, row: RawRow) -> PairRecord:
        names = self.names
        if self.mapping is not None:
            values, names = apply_map(self.mapping, row.values, names)
            row = RawRow(row.shard, row.row, values)
        elif not {"query", "target"} & set(row.values):
            raise RowError(
                "",
                "has neither query nor target; say which columns they are with --column query.text=..., --column "
                f"target.text=..., or a map (--columns). The row has {', '.join(row.values) or 'none'}",
            )
        texts = {key: id_text(row.value(key, None), names.get(key, key)) for key in RECORD_KEYS}
        query, target = item_of(row.value("query"), "query", names), item_of(row.value("target"), "target", names)
        given = row.value("negatives", None) or []
        if not isinstance(given, list):
            raise RowError("negatives", f"must be a list; got {show(given)}")
        negatives = tuple(item_of(one, f"negatives[{index}]", names) for index, one in enumerate(given))
        if self.mapping is not None:
            negatives = tuple(one for one in negatives if not one.is_empty)
        source = self.source or texts["data_source"] or row.shard.note
        texts |= {"data_source": source, "pair_id": texts["pair_id"] or row.pair_id(source)}
        return PairRecord(**texts, query=query, target=target, negatives=negatives)


def item_of(values: Any, side: str, names: Mapping[str, str]) -> Item:
    """A side from a text or from raw values by field; `names` has the columns that a map took them from."""
    if isinstance(values, str):
        return Item(text=values)
    if not isinstance(values, Mapping):
        raise RowError(side, f"must be a text or an object; got {show(values)}")

    def name(key: str) -> str:
        return names.get(f"{side}.{key}", f"{side}.{key}")

    for key in values:
        if key not in ITEM_KEYS:
            raise RowError(name(key), f"unknown field; known are {', '.join(ITEM_KEYS)}")
    texts = {key: "" if values.get(key) is None else values[key] for key in TEXTS}
    for key, value in texts.items():
        if not isinstance(value, str):
            as_text(value, name(key))
    images, video = values.get("images"), values.get("video")
    images = () if images is None else as_images(images, name("images"))
    video = None if video is None else video_of(video, values.get("fps"), name)
    try:
        return Item(texts["text"], images, video, texts["instruction"], texts["kind"] or None, texts["tcot"])
    except DataError as error:
        raise RowError(side, str(error)) from error


def video_of(value: Any, fps: Any, name: Callable[[str], str]) -> Video | None:
    rate_name = name("fps")
    if isinstance(value, Mapping):  # {frames, path, fps}, as in our own files; or one struct of a path
        if value.get("bytes"):
            raise RowError(name("video"), "holds the bytes of a video file; write them to a file, and give its path")
        if fps is None:
            fps, rate_name = value.get("fps"), f"{name('video')}.fps"
        value = value.get("frames") or value.get("path")
    if value is None or value == "":
        return None
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or abs(fps) > FASTEST):
        raise RowError(rate_name, f"must be a number; got {show(fps)}")
    frames = as_images(value, name("video")) if isinstance(value, list) else ()
    path = None if isinstance(value, list) else as_text(value, name("video"))
    try:
        return Video(frames, path, None if fps is None else float(fps))
    except DataError as error:
        raise RowError(name("video"), str(error)) from error


def id_text(value: Any, name: str) -> str:
    """A text; null is "", and ids are often numbers."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return "" if value is None else as_text(value, name)


def name_of(location: str) -> str:
    """A data source's name from a path or hub id: lower case, letters, digits and _."""
    name = PurePosixPath(location.split("@")[0].rstrip("/")).name
    return re.sub(r"[^a-z0-9]+", "_", name.split(".")[0].lower()).strip("_") or "own"


def not_ours(root: InputRoot, names: list[str]) -> list[str]:
    """The files without hidden ones, and without what data commands write beside pair records. Raises DataError if a
    folder of pair records is unfinished."""
    for name in root.files(f"**/{WORK_FOLDER}/{COMMAND_FILE}"):
        path = root.path(name)
        raise DataError(
            f"{path.parent.parent} is unfinished (it has {WORK_FOLDER}/); finish it with: {path.read_text().strip()}"
        )
    made = {PurePosixPath(card).parent for card in root.files(f"**/{CARD_FILE}")}
    paths = [PurePosixPath(name) for name in names]
    hidden = {path for path in paths if any(part.startswith(".") for part in path.parts)}
    reports = {folder / REJECTED_FILE for folder in made}
    return [str(path) for path in paths if path not in hidden | reports]


if __name__ == "__main__":
    sys.exit(convert_main(Generic, __doc__))
