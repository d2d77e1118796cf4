# SPDX-License-Identifier: Apache-2.0
"""Data set folders, and the parquet files of pair records behind the paths that a user names.

A data set folder holds `part-00000.parquet` ..., `media/` (its media root, if media were extracted), `data_card.json`
and `data_card.md`, and `rejected.jsonl`. While a command writes it there is also `_work/` with the state to resume
from; `data_card.json` is written last, then `_work/` goes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedrl_verl.data.disk import disk_errors
from embedrl_verl.errors import ConfigError, DataError

PART_PATTERN = "part-*.parquet"
CARD_FILE = "data_card.json"
CARD_TEXT_FILE = "data_card.md"
REJECTED_FILE = "rejected.jsonl"
MEDIA_FOLDER = "media"
WORK_FOLDER = "_work"
COMMAND_FILE = "command.txt"
LOCK_FILE = "lock"


def part_name(index: int) -> str:
    """File name of a part: `part-00000.parquet`."""
    return f"part-{index:05d}.parquet"


def pair_files(paths: Iterable[str | Path]) -> list[Path]:
    """The parquet files behind files and data set folders, in order; a folder gives its sorted parts."""
    found: list[Path] = []
    for path in map(Path, paths):
        found += _parts_of(path) if path.is_dir() else [_existing(path)]
    seen: set[Path] = set()
    for path in found:
        if path.resolve() in seen:
            raise DataError(f"{path} is named twice; name every file and folder once")
        seen.add(path.resolve())
    return found


def media_root_of(path: str | Path) -> str | None:
    """Media root of a data set folder (or of the folder of a part), as its data card says; None without one."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    card = folder / CARD_FILE
    if not card.is_file():
        return str(folder / MEDIA_FOLDER) if (folder / MEDIA_FOLDER).is_dir() else None
    root = read_object(card).get("media_root")
    return None if root is None else str(folder / root)  # an absolute path stays as it is


def common_media_root(paths: Iterable[str | Path]) -> str | None:
    """The media root that the data cards of these files and folders agree on; None if they name none."""
    roots = {root for path in paths if (root := media_root_of(path)) is not None}
    if len(roots) > 1:
        raise ConfigError(f"the inputs have different media roots ({', '.join(sorted(roots))}); do one at a time")
    return roots.pop() if roots else None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file that a data command wrote."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); write the folder again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: must hold a JSON object; write the folder again")
    return found


def begin_work(folder: str | Path, command: Sequence[str]) -> Path:
    """Make `_work/` in a data set folder and note the command that finishes it. Returns the path of `_work/`."""
    work = Path(folder) / WORK_FOLDER
    with disk_errors(folder):
        work.mkdir(parents=True, exist_ok=True)
        write_atomically(work / COMMAND_FILE, shlex.join(command) + "\n")
    return work


@contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Keep other processes from writing a data set folder that has `_work/`; a process that is killed gives it free."""
    with open(Path(folder) / WORK_FOLDER / LOCK_FILE, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"another process is writing {folder}; wait for it, or end it") from error
        yield


def finishing_command(folder: str | Path) -> str:
    """The command that goes on with an unfinished folder; "" if it is not known."""
    file = Path(folder) / WORK_FOLDER / COMMAND_FILE
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a whole file so that after a crash it has the old or the new content: temporary name, fsync, rename."""
    target = Path(path)
    temporary = temporary_name(target)
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        publish(temporary, target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, content: Any) -> None:
    """`write_atomically` as indented JSON in UTF-8, keys in the order given."""
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def temporary_name(path: Path) -> Path:
    """A name beside the file that no other process uses and no pattern of finished files matches."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def publish(temporary: Path, target: Path, *, flush_folder: bool = True) -> None:
    """Flush a finished temporary file to the disk and give it its name. Without `flush_folder` the name is only sure to
    outlast a power failure after the next call with it, in the same folder."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
    if not flush_folder:
        return
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _parts_of(folder: Path) -> list[Path]:
    if (folder / WORK_FOLDER).exists():
        command = finishing_command(folder)
        how = f"finish it with: {command}" if command else "run the command that writes it again"
        raise DataError(f"{folder} is unfinished (it has {WORK_FOLDER}/); {how}")
    parts = sorted(folder.glob(PART_PATTERN), key=lambda part: (len(part.name), part.name))
    if not parts:
        raise DataError(f"{folder} has no {PART_PATTERN}; name a parquet file or a folder that a data command wrote")
    return parts


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    return path
