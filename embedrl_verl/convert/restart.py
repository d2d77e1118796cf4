# SPDX-License-Identifier: Apache-2.0
"""`--restart`: the removal of what an earlier conversion wrote to a folder, and of nothing else."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from embedrl_verl.data.build import BUILD_FILE
from embedrl_verl.data.files import (
    CARD_FILE,
    CARD_TEXT_FILE,
    MEDIA_FOLDER,
    PART_PATTERN,
    REJECTED_FILE,
    WORK_FOLDER,
    begin_work,
    disk_errors,
    only_writer,
    read_object,
)
from embedrl_verl.errors import ConfigError

OWN_PART = re.compile(r"part-\d{5,}\.parquet")
STORED = re.compile(r"[0-9a-f]{2}")
"""Folders of `media/`."""


def remove_earlier(out: Path, needed: Iterable[Path], command: Sequence[str]) -> None:
    """Remove parts, cards, `rejected.jsonl` and `_work/` of an earlier conversion. Stored media stay: they are named by
    their content.

    Args:
        needed: what the next conversion reads: input files, media root.

    Raises:
        ConfigError: something of a person or something needed would go. Nothing has been removed.
    """
    work, card = out / WORK_FOLDER, out / CARD_FILE
    state = next((file for file in (work / BUILD_FILE, card) if file.is_file()), None)
    if state is None:
        return  # `building` refuses what is there
    if not _is_of_conversion(read_object(state)):
        raise ConfigError(f"{state} is not of a conversion; name another folder with --out")
    parts = sorted(out.glob(PART_PATTERN))
    named = {part["file"] for part in read_object(card)["parts"]} if state == card else None
    for part in parts:
        if not (OWN_PART.fullmatch(part.name) if named is None else part.name in named):
            raise ConfigError(f"{part} was written by no conversion; move it away, or name another folder")
    going = [*parts, out / REJECTED_FILE, out / CARD_TEXT_FILE, work, card]
    for path in needed:
        full = path.expanduser().resolve()
        if not {one.resolve() for one in going}.isdisjoint((full, *full.parents)):
            raise ConfigError(
                f"--restart would remove {path}, which this conversion reads; copy it to another folder, or name "
                "another folder with --out"
            )
    begin_work(out, [*command, "--restart"])
    with disk_errors(out), only_writer(out):
        if card.is_file():
            os.replace(card, work / BUILD_FILE)  # unfinished from here on, whenever this is killed
        for path in going[:-2]:
            path.unlink(missing_ok=True)
        shutil.rmtree(work)


def check_media_folder(out: Path, place: str) -> None:
    """Keep `--media files` out of a `media/` with files of a person."""
    media = out / MEDIA_FOLDER
    if place != "files" or not media.exists():
        return
    if foreign := next((path for path in media.iterdir() if not STORED.fullmatch(path.name)), None):
        raise ConfigError(
            f"{foreign} was not written by a conversion, and --media files would mix its own files with it; move it "
            "away, or name another folder with --out"
        )


def _is_of_conversion(state: Mapping[str, Any]) -> bool:
    """Both a data card and what `building` notes have it; other commands draw no sample."""
    return isinstance(state.get("sampling"), dict)
