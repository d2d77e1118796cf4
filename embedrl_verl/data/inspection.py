# SPDX-License-Identifier: Apache-2.0
"""Look at every pair before anything is trained: media, ids of contents, lengths of prompts.

The training data set and `embedrl data check` share `PairInspector`: the first stops at problems, the second lists
them. What the first has found is kept in the cache of `datasets`, so that a run that is resumed, or another one on the
same data, decodes nothing again. It counts until something changes that it depends on: the files and all media in them
(size and time of change), media root, settings, tokenizer, processor, and this package's reading of them.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from embedrl_verl import tcot
from embedrl_verl.config.schema import MediaConfig
from embedrl_verl.data.files import publish, stamp_of, temporary_name
from embedrl_verl.data.identity import ContentId, content_id, record_digest
from embedrl_verl.data.media import MediaLimits, load_item, resolve_media_path
from embedrl_verl.data.prompts import frames_of_file, load_prompt_media, prompt_messages
from embedrl_verl.data.schema import SIDES, PairRecord, Side
from embedrl_verl.data.table import LocatedPair, PairTable, cache_folder
from embedrl_verl.errors import DataError, MediaError
from embedrl_verl.families import Family, token_side

if TYPE_CHECKING:  # imports verl, which only counting needs
    from embedrl_verl.data.lengths import PromptMeter

FACTS = np.dtype(
    [("row", "i8"), ("digest", "V16"), ("frames", "i4", 2), ("tokens", "i4", 2), ("content", "i8", 2)], align=True
)
"""What a row's media tell: number in the table, `record_digest`, and by side the frames of a video file (0 without),
the prompt's tokens (-1: not counted) and the content's id."""
Facts = npt.NDArray[np.void]
SAVED_EVERY = 5_000
"""Pairs, so that a start that is killed has not looked in vain."""
logger = logging.getLogger(__name__)


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


def inspect_rows(
    table: PairTable, numbers: Sequence[int], inspector: PairInspector, threads: int
) -> tuple[Facts, list[str]]:
    """Facts of rows that are records, in the order given, and what is wrong with media. Facts that an earlier start has
    kept are not found out again; rows with a fault are not kept."""
    kept = cache_folder() / f"checked-{_identity(table, inspector)}.npy"
    known = _load(kept)
    missing = [number for number in numbers if number not in known]
    errors: list[str] = []

    def look(number: int) -> tuple[Any, ...] | MediaError:
        pair = table[number]
        assert isinstance(pair, LocatedPair)
        try:
            facts = inspector.inspect(pair)
        except MediaError as error:
            return error
        tokens = [-1 if count is None else count for count in facts.tokens.values()]
        digest = record_digest(pair.record, inspector.media_root)
        return number, digest, list(facts.file_frames.values()), tokens, list(facts.content)

    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(look, missing)
        shown = tqdm(found, total=len(missing), desc="checking pairs", unit="pair", disable=None)
        for count, (number, one) in enumerate(zip(missing, shown, strict=True), start=1):
            if isinstance(one, MediaError):
                errors.append(str(one))
            else:
                known[number] = np.array(one, FACTS)
            if count % SAVED_EVERY == 0 or count == len(missing):
                _save(known, kept)
    facts = [known[number] for number in numbers if number in known]
    return (np.stack(facts) if facts else np.empty(0, FACTS)), errors


def _load(kept: Path) -> dict[int, Any]:
    if not kept.is_file():
        return {}
    try:
        found = np.load(kept)
    except (OSError, ValueError, EOFError) as error:
        logger.warning("%s is damaged (%s); all media are looked at again", kept, error)
        return {}
    return {int(one["row"]): one for one in found}


def _save(known: Mapping[int, Any], kept: Path) -> None:
    """What is kept only saves time, so a disk that cannot be written is no reason to stop."""
    if not known:
        return
    temporary = temporary_name(kept)
    try:
        with open(temporary, "wb") as file:
            np.save(file, np.stack([known[number] for number in sorted(known)]))
        publish(temporary, kept, flush_folder=False)
    except OSError as error:
        logger.warning("%s: cannot be written (%s); the next start looks at all media again", kept, error)
    finally:
        temporary.unlink(missing_ok=True)


def _identity(table: PairTable, inspector: PairInspector) -> str:
    """Of everything that facts depend on."""
    root = os.path.expanduser(inspector.media_root) if inspector.media_root else None
    parts = [
        table.identity,
        os.path.realpath(root) if root else "",
        repr(sorted(asdict(inspector.settings).items())),
        inspector.family,
        inspector.meter.identity if inspector.meter else "",
        _own_code(),
        *(f"{path}:{_stamp(path, root)}" for path in _media_paths(table)),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _media_paths(table: PairTable) -> Iterator[str]:
    """Paths of all media in a table, each once a column."""
    for name in ("query", "target", "negatives"):
        for chunk in table.column(name).chunks:
            for paths in _leaves(chunk):
                yield from filter(None, pc.unique(paths).to_pylist())


def _leaves(array: pa.Array, name: str = "") -> Iterator[pa.Array]:
    """All fields called path below an array."""
    if pa.types.is_struct(array.type):
        for field, child in zip(array.type, array.flatten(), strict=True):
            yield from _leaves(child, field.name)
    elif pa.types.is_list(array.type):
        yield from _leaves(pc.list_flatten(array))
    elif name == "path":
        yield array


def _stamp(path: str, media_root: str | None) -> str:
    try:
        return stamp_of(os.path.join(media_root or "", path))
    except (OSError, ValueError):  # the look at the row says what is wrong
        return "none"


@cache
def _own_code() -> str:
    """Digest of the code that reads media and writes prompts: facts of another one do not count."""
    folders = (Path(__file__).parent, Path(tcot.__file__).parent)
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.suffix in (".py", ".j2", ".txt"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def raise_if_any(messages: Sequence[str], file: str | Path) -> None:
    """DataError that shows the first of what is wrong with data."""
    shown = 10
    if messages:
        more = f"\n... and {len(messages) - shown} more" if len(messages) > shown else ""
        raise DataError(
            f"{len(messages)} row(s) cannot be used; `embedrl data check {file}` lists them:\n"
            + "\n".join(messages[:shown])
            + more
        )
