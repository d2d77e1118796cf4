# SPDX-License-Identifier: Apache-2.0
"""Look at every pair before anything is trained: records, ids, media, prompt lengths.

The training data set and `embedrl data check` share this code: the first stops at problems, the second lists them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from embedrl_verl.data.files import pair_files
from embedrl_verl.data.media import load_frames, load_item, resolve_media_path
from embedrl_verl.data.memory import check_memory
from embedrl_verl.data.parquet import scan_pairs
from embedrl_verl.data.prompts import load_prompt_media, prompt_messages
from embedrl_verl.data.schema import SIDES, Item, PairRecord, Side
from embedrl_verl.data.settings import DataSettings
from embedrl_verl.errors import DataError, MediaError
from embedrl_verl.families import Family, token_side

if TYPE_CHECKING:  # imports verl, which only counting needs
    from embedrl_verl.data.lengths import PromptMeter


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
    """What only decoding can tell, by side: frames of a video file (0 without), prompt tokens (None: not counted)."""

    file_frames: dict[Side, int]
    tokens: dict[Side, int | None]

    def overlong(self, max_prompt_length: int) -> dict[Side, int]:
        """Sides whose prompt is over the limit, with their tokens."""
        return {side: count for side, count in self.tokens.items() if count is not None and count > max_prompt_length}


def locate_pairs(files: Iterable[str]) -> tuple[list[LocatedPair], list[Problem]]:
    """All well-formed records in order, and a problem for every other row; ids must be unique.

    Args:
        files: parquet files, or data set folders, which stand for their parts.

    Raises:
        ResourceError: the media in their rows do not fit into the machine's memory.
    """
    pairs: list[LocatedPair] = []
    problems: list[Problem] = []
    files = list(files)
    check_memory(part for file in files for part in _readable_parts(file))
    for found in scan_located(files):
        if isinstance(found, Problem):
            problems.append(found)
        else:
            pairs.append(found)
    return pairs, problems


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
            yield from _scan_part(part, first_with)


def _parts(file: str) -> list[str]:
    """The parts of a folder, or the file itself, which need not be there; DataError as `pair_files`."""
    return [str(part) for part in pair_files([file])] if Path(file).is_dir() else [file]


def _readable_parts(file: str) -> list[str]:
    try:
        return _parts(file)
    except DataError:  # the scan says why
        return []


def _scan_part(file: str, first_with: dict[str, tuple[str, int]]) -> Iterator[LocatedPair | Problem]:
    try:
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
    except DataError as error:
        yield Problem(file, None, str(error))


@dataclass(frozen=True)
class PairInspector:
    """Loads the media of a pair as a rollout would, and counts its prompts when there is a meter."""

    settings: DataSettings
    family: Family
    media_root: str | None
    meter: PromptMeter | None

    def inspect(self, pair: LocatedPair) -> PairFacts:
        """Facts of a pair.

        Raises:
            MediaError: an image or a video is missing, refused or unreadable; the message names file, row and field.
            ConfigError: the processor does not take fitted media as they are.
        """
        file_frames: dict[Side, int] = {}
        tokens: dict[Side, int | None] = {}
        field = ""
        try:
            for side in SIDES:
                field = side
                file_frames[side], tokens[side] = self._inspect_side(pair.record, side)
            for index, item in enumerate(pair.record.negatives):
                field = f"negatives[{index}]"
                load_item(item, self.media_root, max_frames=self.settings.max_frames)
        except MediaError as error:
            raise MediaError(f"{pair}, field {field}: {error}") from error
        return PairFacts(file_frames, tokens)

    def _inspect_side(self, record: PairRecord, side: Side) -> tuple[int, int | None]:
        item, settings = record.item(side), self.settings
        for path in _paths(item):
            resolve_media_path(path, self.media_root)
        count = 0
        if item.video is not None and item.video.path is not None:
            count = len(load_frames(item.video, self.media_root, settings.max_frames)[0])
        messages = prompt_messages(
            record,
            side,
            family=self.family,
            style=settings.prompt_style,
            few_shot=settings.few_shot,
            max_frames=settings.max_frames,
            file_frames=count,
        )
        limits = settings.limits(token_side(self.family))
        images, videos = load_prompt_media(messages, limits, self.media_root)
        return count, self.meter.count(messages, images, videos) if self.meter else None

    def inspect_all(self, pairs: Sequence[LocatedPair], threads: int) -> Iterator[PairFacts | MediaError]:
        """Facts or the error of every pair, in order; decoding runs in threads."""
        with ThreadPoolExecutor(threads) as pool:
            results = pool.map(self._facts_or_error, pairs)
            yield from tqdm(results, total=len(pairs), desc="checking pairs", unit="pair", disable=None)

    def _facts_or_error(self, pair: LocatedPair) -> PairFacts | MediaError:
        try:
            return self.inspect(pair)
        except MediaError as error:
            return error


def _paths(item: Item) -> list[str]:
    """All media paths of an item, also of frames that no prompt draws."""
    media = list(item.images)
    if item.video is not None:
        media += [*item.video.frames, *([item.video.path] if item.video.path else [])]
    return [reference for reference in media if isinstance(reference, str)]
