# SPDX-License-Identifier: Apache-2.0
"""What an earlier conversion wrote to a folder, and the removal of that and nothing else (`--restart`).

What is to go is noted in `_work/` before the first file goes, so that the next run ends a removal that was cut short.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embedrl_verl.convert.card import CARD_TEXT_FILE
from embedrl_verl.convert.plan import PLAN_FILE
from embedrl_verl.data.files import (
    CARD_FILE,
    COMMAND_FILE,
    FORMAT,
    LOCK_FILE,
    MEDIA_FOLDER,
    PART_PATTERN,
    REJECTED_FILE,
    WORK_FOLDER,
    begin_work,
    disk_errors,
    only_writer,
    read_object,
    write_json,
)
from embedrl_verl.errors import ConfigError

REMOVAL_FILE = "removal.json"
NO_STATE = (COMMAND_FILE, LOCK_FILE)
"""In the work folder of every data command from its start."""
STORED = re.compile(r"[0-9a-f]{2}/([0-9a-f]{64}\.[a-z0-9]+|\..+\.tmp)")
"""Names that `media_store` gives."""


@dataclass(frozen=True)
class Earlier:
    """What conversions wrote to a folder.

    Attributes:
        parts: file names.
        stored_media: `media/` is theirs.
        is_going: its removal has begun.
    """

    parts: Sequence[str]
    stored_media: bool
    is_going: bool = False

    def paths(self, out: Path) -> list[Path]:
        """Everything to remove but `_work/`; the data card last."""
        media = [MEDIA_FOLDER] if self.stored_media else []
        return [out / name for name in (*media, *self.parts, REJECTED_FILE, CARD_TEXT_FILE, CARD_FILE)]


def earlier_conversion(out: Path) -> Earlier | None:
    """What is there of an earlier conversion, begun or finished; None without one.

    Raises:
        ConfigError: a file of a name that conversions write, or a work folder, that none wrote.
    """
    work = out / WORK_FOLDER
    removal, plan, card = (_read(path) for path in (work / REMOVAL_FILE, work / PLAN_FILE, out / CARD_FILE))
    if card is not None and not _is_of_conversion(card):
        raise ConfigError(f"{out / CARD_FILE} is not the data card of a conversion; name another folder")
    if removal is not None:
        found = Earlier(removal["parts"], removal["stored_media"], is_going=True)
    else:
        _check_work(work, plan)
        builds = [build for build in (plan, card) if build is not None]
        parts = {file.with_suffix(".parquet").name for file in work.glob("part-*.json")} if plan is not None else set()
        parts |= {str(part["file"]) for part in card["parts"]} if card is not None else set()
        there = sorted(path.name for path in out.glob(PART_PATTERN) if path.name in parts)
        found = Earlier(there, any(build["media"]["place"] == "files" for build in builds))
    is_ours = removal is not None or plan is not None or card is not None
    foreign = sorted(path.name for path in out.glob(PART_PATTERN) if path.name not in found.parts)
    if not is_ours:
        foreign += [name for name in (REJECTED_FILE, CARD_TEXT_FILE) if (out / name).exists()]
    if foreign:
        raise ConfigError(f"{out} holds {foreign[0]}, which no conversion wrote; move it away, or name another folder")
    return found if is_ours else None


def check_media_folder(out: Path, place: str, earlier: Earlier | None) -> None:
    """Keep `--media files` out of a `media/` with files that no conversion stored."""
    media = out / MEDIA_FOLDER
    if place != "files" or (earlier is not None and earlier.stored_media) or not media.exists():
        return
    if not media.is_dir() or next(media.iterdir(), None) is not None:
        raise ConfigError(
            f"{media} was not written by a conversion, and --media files would mix its own files into it; move it "
            "away, or name another folder with --out"
        )


def remove_earlier(out: Path, earlier: Earlier, needed: Iterable[Path], command: Sequence[str]) -> None:
    """Remove what `earlier_conversion` has found; `_work/` stays, without a plan.

    Args:
        needed: what the next conversion reads: input files, media root.
        command: noted in `_work/`, see `begin_work`.

    Raises:
        ConfigError: something needed would go, `media/` holds files that no conversion stored, or another process is
            writing the folder. Nothing has been removed.
    """
    _check_removal(out, earlier, needed)
    if not (out / WORK_FOLDER).is_dir():
        begin_work(out, command)
    with disk_errors(out), only_writer(out):
        now = earlier_conversion(out)  # another process may have gone on with it until here
        earlier = earlier if now is None else now
        noted = asdict(earlier)
        write_json(out / WORK_FOLDER / REMOVAL_FILE, {key: noted[key] for key in ("parts", "stored_media")})
        for path in earlier.paths(out):
            if path.name == MEDIA_FOLDER:
                _remove_stored(path)
            else:
                path.unlink(missing_ok=True)
        for path in (out / WORK_FOLDER).iterdir():
            if path.name not in (*NO_STATE, REMOVAL_FILE):
                path.unlink()
        (out / WORK_FOLDER / REMOVAL_FILE).unlink()


def _check_removal(out: Path, earlier: Earlier, needed: Iterable[Path]) -> None:
    """Whether the removal of an earlier conversion takes nothing else with it."""
    going = {path.resolve() for path in (*earlier.paths(out), out / WORK_FOLDER)}
    for path in needed:
        full = path.expanduser().resolve()
        if not going.isdisjoint((full, *full.parents)):
            raise ConfigError(
                f"--restart would remove {path}, which this conversion reads; copy it to another folder, or name "
                "another folder with --out"
            )
    media = out / MEDIA_FOLDER
    if earlier.stored_media and (foreign := _not_stored(media)) is not None:
        raise ConfigError(f"--restart would remove {foreign}, which no conversion wrote; move it away")


def _is_of_conversion(card: Mapping[str, Any]) -> bool:
    """Later steps write cards too; their inputs are a list."""
    return card.get("format") == FORMAT and all(isinstance(card.get(key), dict) for key in ("input", "media"))


def _check_work(work: Path, plan: Mapping[str, Any] | None) -> None:
    if not work.exists() or (plan is not None and {"converter", "media", "input"} <= plan.keys()):
        return
    foreign = sorted(path.name for path in work.iterdir() if path.name not in NO_STATE and path.suffix != ".tmp")
    if foreign:
        raise ConfigError(
            f"{work} is not the work of a conversion (it holds {foreign[0]}); finish it with its command, which "
            f"{COMMAND_FILE} there names, or name another folder"
        )


def _not_stored(media: Path) -> Path | None:
    """A file of `media/` with a name that conversions do not give; None without one."""
    for path in media.rglob("*"):
        is_file = path.is_symlink() or not path.is_dir()
        if is_file and not STORED.fullmatch(path.relative_to(media).as_posix()):
            return path
    return None


def _remove_stored(media: Path) -> None:
    """A `media/` that is a link stays, empty."""
    if media.is_dir():
        for folder in media.iterdir():
            shutil.rmtree(folder)
        if not media.is_symlink():
            media.rmdir()


def _read(path: Path) -> dict[str, Any] | None:
    return read_object(path) if path.is_file() else None
