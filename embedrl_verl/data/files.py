# SPDX-License-Identifier: Apache-2.0
"""Data set folders, and the parquet files of pair records behind the paths that a user names.

A data set folder holds `part-00000.parquet` ..., `media/` (its media root, if media were extracted), `data_card.json`
and `data_card.md`, and `rejected.jsonl`. While a command writes it there is also `_work/` with the state to resume
from; `data_card.json` is written last, then `_work/` goes.

Files are written whole or not at all, and what a card says of the files beside it a later step need not find out again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedrl_verl.errors import ConfigError, DataError, ResourceError

PART_PATTERN = "part-*.parquet"
CARD_FILE = "data_card.json"
CARD_TEXT_FILE = "data_card.md"
REJECTED_FILE = "rejected.jsonl"
VERDICTS_FILE = "verdicts.parquet"
MEDIA_FOLDER = "media"
WORK_FOLDER = "_work"
COMMAND_FILE = "command.txt"
LOCK_FILE = "lock"
FORMAT = "embedrl pair records 1"
NOT_DECLARED = "not declared"
STALE = ".*.[0-9]*.tmp"
"""Files of killed writers, see `temporary_name`."""
_CHUNK = 1 << 20


@contextmanager
def disk_errors(where: str | Path) -> Iterator[None]:
    """Turn what the system says of a disk that is full or cannot be written into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"{where}: the disk is full; what is finished is kept. Free space, then run the same command again"
            ) from error
        raise ResourceError(f"{where}: cannot be written ({error})") from error


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    return digest.hexdigest()


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
    card = _card_of(path)
    folder = card.parent
    if not card.is_file():
        return str(folder / MEDIA_FOLDER) if (folder / MEDIA_FOLDER).is_dir() else None
    root = read_object(card).get("media_root")
    return None if root is None else str(folder / root)  # an absolute path stays as it is


def _card_of(path: str | Path) -> Path:
    return (Path(path) if Path(path).is_dir() else Path(path).parent) / CARD_FILE


def common_media_root(paths: Iterable[str | Path]) -> str | None:
    """The media root that the data cards of these files and folders agree on; None if they name none. A card without a
    root says that its rows have no paths; a file without a card says nothing, and could mean another root. The
    root is absolute."""
    paths = list(paths)
    found = {path: media_root_of(path) for path in paths}
    roots = {os.path.abspath(root) for root in found.values() if root is not None}
    silent = [path for path in paths if found[path] is None and not _card_of(path).is_file()]
    if roots and silent:
        raise ConfigError(
            f"{silent[0]} has no data card, and others have the media root {min(roots)}; set data.media_root "
            "(commands: --media-root)"
        )
    if len(roots) > 1:
        raise ConfigError(
            f"the inputs must have one media root; got {', '.join(sorted(roots))}. `embedrl data content-ids` with all "
            "of them writes one folder with one root"
        )
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


def card_beside(file: Path) -> dict[str, Any]:
    """The data card of the folder that a file lies in; {} without one."""
    card = file.parent / CARD_FILE
    return read_object(card) if card.is_file() else {}


def part_facts(path: Path, rows: int) -> dict[str, Any]:
    """A part's line in the data card."""
    return {"file": path.name, "records": rows, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def known_hash(file: Path) -> str | None:
    """SHA-256 of a part as the card beside it says, if the size agrees."""
    for part in card_beside(file).get("parts", ()):
        if part.get("file") == file.name and part.get("bytes") == file.stat().st_size:
            return str(part["sha256"]) if part.get("sha256") else None
    return None


def licences_of(files: Iterable[Path]) -> str:
    """What the cards beside the files declare, each licence once."""
    folders = {file.parent: file for file in files}.values()
    return "; ".join(dict.fromkeys(str(card_beside(file).get("licence") or NOT_DECLARED) for file in folders))


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


def stamp_of(path: str | Path) -> str:
    """Size and times of change of a file, to notice that it is another one."""
    stat = os.stat(path)
    return f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def temporary_name(path: Path) -> Path:
    """A name beside the file that nobody else uses, also on another machine of a shared disk, and that no pattern of
    finished files matches."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


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
