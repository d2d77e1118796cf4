# SPDX-License-Identifier: Apache-2.0
"""Look at every pair before anything is trained: records, ids, media, prompt lengths.

The training data set and `embedrl data check` share this code: the first stops at problems, the second lists them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from embedrl_verl.config.schema import MediaConfig
from embedrl_verl.data.files import pair_files
from embedrl_verl.data.identity import ContentId, content_id
from embedrl_verl.data.media import MediaLimits, load_item, resolve_media_path
from embedrl_verl.data.parquet import SCHEMA, scan_pairs
from embedrl_verl.data.prompts import frames_of_file, load_prompt_media, prompt_messages
from embedrl_verl.data.schema import SIDES, PairRecord, Side
from embedrl_verl.errors import DataError, MediaError, ResourceError
from embedrl_verl.families import Family, token_side
from embedrl_verl.platforms.machine import machine_memory

if TYPE_CHECKING:  # imports verl, which only counting needs
    from embedrl_verl.data.lengths import PromptMeter

logger = logging.getLogger(__name__)
GIB = 1 << 30
SAID_FROM = 0.1
"""Share of the machine's memory from which media in the rows are worth a warning."""


@dataclass(frozen=True)
class LocatedPair:
    """A record and where it was read: file, and row counted from 0."""

    file: str
    row: int
    record: PairRecord

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}, pair {self.record.pair_id!r}"


@dataclass(frozen=True)
class Problem:
    """Why a row, or with row None a whole file, cannot be used. `message` names file, row and field."""

    file: str
    row: int | None
    message: str
    data_source: str = ""


@dataclass(frozen=True)
class PairFacts:
    """What only the media can tell: by side the frames of a video file (0 without) and the prompt's tokens (None: not
    counted), and which contents the pair is of."""

    file_frames: dict[Side, int]
    tokens: dict[Side, int | None]
    content: ContentId

    def overlong(self, max_prompt_length: int) -> dict[Side, int]:
        """Sides whose prompt is over the limit, with their tokens."""
        return {side: count for side, count in self.tokens.items() if count is not None and count > max_prompt_length}


def locate_pairs(files: Iterable[str]) -> tuple[list[LocatedPair], list[Problem]]:
    """All well-formed records in order, and a problem for every other row; ids must be unique."""
    files = list(files)
    check_memory(files)
    found = list(scan_located(files))
    pairs = [one for one in found if isinstance(one, LocatedPair)]
    return pairs, [one for one in found if isinstance(one, Problem)]


def scan_located(files: Iterable[str]) -> Iterator[LocatedPair | Problem]:
    """As `locate_pairs`, one after another: what is held is the ids, not the records with their media."""
    first_with: dict[str, tuple[str, int]] = {}
    for file in files:
        try:
            parts = _parts(file)
        except DataError as error:
            yield Problem(file, None, str(error))
            continue
        for part in parts:
            try:
                yield from _scan_part(part, first_with)
            except DataError as error:
                yield Problem(part, None, str(error))


def _scan_part(file: str, first_with: dict[str, tuple[str, int]]) -> Iterator[LocatedPair | Problem]:
    for row, record in scan_pairs(file):
        if isinstance(record, DataError):
            yield Problem(file, row, str(record))
            continue
        pair = LocatedPair(file, row, record)
        first = first_with.setdefault(record.pair_id, (file, row))
        if first == (file, row):
            yield pair
        else:
            message = f"{pair}: pair_id must be unique; {first[0]}, row {first[1]} has it too"
            yield Problem(file, row, message, record.data_source)


def _parts(file: str) -> list[str]:
    """The parts of a folder, or the file itself, which need not be there."""
    return [str(part) for part in pair_files([file])] if Path(file).is_dir() else [file]


def embedded_bytes(path: str) -> int:
    """Bytes of media in the rows of a parquet file, from its footer alone. Equal media of a row group may count once,
    so that it takes at least so much to hold them."""
    footer = pq.read_metadata(path)
    groups = (footer.row_group(group) for group in range(footer.num_row_groups))
    columns = (group.column(column) for group in groups for column in range(group.num_columns))
    held = 0
    for column in columns:
        names = column.path_in_schema.split(".")
        if names[-1] == "bytes" and names[0] in SCHEMA.names:  # other columns are not read
            held += column.total_uncompressed_size
    return held


def check_memory(files: Iterable[str]) -> None:
    """Warn when the media in the rows of files, which training keeps in memory, take much of the machine's (or
    container's); refuse what cannot fit. Every process of a `torchrun` on the machine holds them. Files that cannot be
    read are left to whoever reads their rows."""
    held, named = 0, ""
    for file in files:
        try:
            here = sum(map(embedded_bytes, _parts(file)))
        except (OSError, pa.ArrowException, DataError):
            continue
        held += here
        named = named or (file if here else "")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    total = machine_memory().total
    text = (
        f"media in the rows of {named} and the files beside it take {held / GIB:.1f} GiB in each of {processes} "
        f"process(es), and training keeps them in memory; the machine has {total / GIB:.1f} GiB. Media in files of "
        "their own are read when they are needed: convert the data again with --media files"
    )
    if held * processes > total:
        raise ResourceError(text)
    if held * processes > SAID_FROM * total:
        logger.warning(text)


@dataclass(frozen=True)
class PairInspector:
    """Loads the media of a pair as a rollout would, and counts its prompts when there is a meter."""

    settings: MediaConfig
    family: Family
    media_root: str | None
    meter: PromptMeter | None

    def inspect(self, pair: LocatedPair) -> PairFacts:
        """Facts of a pair; the MediaError of a medium that cannot be used names file, row and field."""
        record, field = pair.record, ""
        frames: dict[Side, int] = {}
        tokens: dict[Side, int | None] = {}
        try:
            for side in SIDES:
                field = side
                frames[side], tokens[side] = self._side(record, side)
            for index, item in enumerate(record.negatives):
                field = f"negatives[{index}]"
                load_item(item, self.media_root, max_frames=self.settings.max_frames)
            content = content_id(record, self.media_root)
        except MediaError as error:
            raise MediaError(f"{pair}, field {field}: {error}") from error
        return PairFacts(frames, tokens, content)

    def _side(self, record: PairRecord, side: Side) -> tuple[int, int | None]:
        """Frames of a video file, and tokens of the prompt."""
        settings, video = self.settings, record.item(side).video
        limits = MediaLimits.of(settings, token_side(self.family), settings.max_frames)
        file_frames = 0
        if video is not None and video.path is not None:
            file_frames = frames_of_file(video.path, video.fps, limits, self.media_root)
        for frame in video.frames if video else ():  # also those that no prompt draws
            if isinstance(frame, str):
                resolve_media_path(frame, self.media_root)
        messages = prompt_messages(
            record,
            side,
            family=self.family,
            style=settings.prompt_style,
            few_shot=settings.few_shot,
            max_frames=settings.max_frames,
            file_frames=file_frames,
        )
        images, videos = load_prompt_media(messages, limits, self.media_root)
        return file_frames, self.meter.count(messages, images, videos) if self.meter else None

    def inspect_all(self, pairs: Sequence[LocatedPair], threads: int) -> Iterator[PairFacts | MediaError]:
        """Facts or the error of every pair, in order; decoding runs in threads."""

        def facts_or_error(pair: LocatedPair) -> PairFacts | MediaError:
            try:
                return self.inspect(pair)
            except MediaError as error:
                return error

        with ThreadPoolExecutor(threads) as pool:
            results = pool.map(facts_or_error, pairs)
            yield from tqdm(results, total=len(pairs), desc="checking pairs", unit="pair", disable=None)
