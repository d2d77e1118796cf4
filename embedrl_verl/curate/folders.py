# SPDX-License-Identifier: Apache-2.0
"""Data set folders that curation writes: begun, resumed, finished; with a data card as the converters write one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedrl_verl import __version__
from embedrl_verl.convert.card import CARD_TEXT_FILE, count_causes, difference
from embedrl_verl.curate.jobs import Entry, rejected_in
from embedrl_verl.curate.records import remove_temporary_files
from embedrl_verl.data.files import (
    CARD_FILE,
    FORMAT,
    PART_PATTERN,
    REJECTED_FILE,
    WORK_FOLDER,
    begin_work,
    known_hash,
    licences_of,
    only_writer,
    publish,
    read_object,
    temporary_name,
    write_atomically,
    write_json,
)
from embedrl_verl.errors import ConfigError, DataError

STATE_FILE = "state.json"
CAUSES_SHOWN = 20


@contextmanager
def work_in(
    out: Path, build: Mapping[str, Any], files: Sequence[Path], command: Sequence[str]
) -> Iterator[Path | None]:
    """Begin a folder, or go on with it; one process at a time.

    Args:
        out: folder to write.
        build: tool, settings and inputs (`build_facts`): a folder is only resumed with the same.
        files: of the input; changed files are noticed by their size and time of change.
        command: what finishes the folder, noted for the user.

    Yields:
        the path of `out/_work`; None if the folder is already finished, by the same build.

    Raises:
        ConfigError: the folder is of another build or of none, or another process is writing it.
    """
    work, build = out / WORK_FOLDER, json.loads(json.dumps(build))
    if (out / CARD_FILE).is_file() and not work.exists():
        changed = difference(read_object(out / CARD_FILE).get("build"), build)
        if changed:
            raise ConfigError(f"{out} was made with other options or input: {changed}; name another folder")
        yield None
        return
    if not work.exists() and next(out.glob(PART_PATTERN), None) is not None:
        raise ConfigError(f"{out} holds parquet files that this command did not write; name another folder")
    begin_work(out, command)
    with only_writer(out):
        state = {**build, "stamps": [file.stat().st_mtime_ns for file in files]}
        if not (work / STATE_FILE).is_file():
            write_json(work / STATE_FILE, state)
        elif changed := difference(read_object(work / STATE_FILE), state):
            raise ConfigError(
                f"{out} was begun with other options or input: {changed}. Finish it with the same, or remove the folder"
            )
        remove_temporary_files(out)
        yield work


def build_facts(command: str, settings: Mapping[str, Any], files: Sequence[Path]) -> dict[str, Any]:
    """What a data set is made by and from: equal facts give equal files."""
    inputs = [{"file": str(file), "bytes": file.stat().st_size, "sha256": known_hash(file)} for file in files]
    return {"tool": f"embedrl-verl {__version__}", "command": command, "settings": dict(settings), "input": inputs}


def finish(
    out: Path,
    name: str,
    build: Mapping[str, Any],
    *,
    parts: Sequence[Mapping[str, Any]],
    by_source: Mapping[str, int],
    media_root: str | None,
    rejected: Path,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write the data card, last of all files, and remove `_work`.

    Args:
        name: what the data set is, for people.
        parts: of `embedrl_verl.data.files.part_facts`, in order.
        by_source: pairs of each data source.
        media_root: absolute; None if no record has a path.
        rejected: `rejected.jsonl`.
        facts: more to be told, beside the counts.
    """
    causes, examples = count_causes(read_lines(rejected))
    card = {
        "format": FORMAT,
        "name": name,
        "tool": build["tool"],
        "licence": licences_of([Path(entry["file"]) for entry in build["input"]]),
        "records": sum(part["records"] for part in parts),
        "media_root": media_root,
        "by_source": {source: {"records": count} for source, count in sorted(by_source.items())},
        "rejected": {
            "rows": sum(causes.values()),
            "causes": [
                {"cause": cause, "rows": count, "example": examples[cause]}
                for cause, count in causes.most_common(CAUSES_SHOWN)
            ],
        },
        **(facts or {}),
        "build": dict(build),
        "parts": list(parts),
    }
    write_atomically(out / CARD_TEXT_FILE, _card_text(card))
    write_json(out / CARD_FILE, card)
    shutil.rmtree(out / WORK_FOLDER)


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> int:
    """Write a JSON-lines file, complete or not at all. Returns the number of lines."""
    temporary, count = temporary_name(path), 0
    with open(temporary, "w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            count += 1
    publish(temporary, path)
    return count


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSON-lines file; none if there is no file."""
    if path.is_file():
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)


def stop_if_bad(rejected: Sequence[Mapping[str, Any]], rows: int, max_bad_share: float, file: Path) -> None:
    """Raise when too many rows cannot be used; `rejected.jsonl` is written before."""
    if len(rejected) <= max_bad_share * rows:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_lines(file, rejected)
    causes, examples = count_causes(rejected)
    listed = [f"  {count} x {cause} (first: {examples[cause]})" for cause, count in causes.most_common(5)]
    raise DataError(
        "\n".join([f"{len(rejected)} of {rows} rows cannot be used, over the limit of {max_bad_share:.2%}:", *listed])
        + f"\n{file} has all that were found. Mend the input and write a new folder, or run the same command with a "
        "higher --max-bad-share to leave them out"
    )


def bad_rows_watch(journal: Path, rows: int, max_bad_share: float, file: Path) -> Callable[[Entry], None]:
    """Calls `stop_if_bad` as soon as the entries that `run_tasks` shows it have too many."""
    bad = 0

    def count(entry: Entry) -> None:
        nonlocal bad
        bad += len(entry["rejected"])
        if bad > max_bad_share * rows:
            stop_if_bad(rejected_in(journal), rows, max_bad_share, file)

    return count


def _card_text(card: Mapping[str, Any]) -> str:
    lines = [
        f"# Data card: {card['name']}",
        "",
        f"{card['records']:,} pairs in {len(card['parts'])} parquet files, written by {card['tool']}.",
        f"Licence: {card['licence']}.",
        f"Media root: {card['media_root'] or 'not needed'}.",
        "",
        "| data source | pairs |",
        "|---|---:|",
        *(f"| {source} | {counts['records']:,} |" for source, counts in card["by_source"].items()),
    ]
    rejected = card["rejected"]
    if rejected["rows"]:
        lines += ["", f"Rejected: {rejected['rows']:,} rows ({REJECTED_FILE} has them all).", ""]
        lines += [f"- {cause['rows']:,} x {cause['cause']} (first: {cause['example']})" for cause in rejected["causes"]]
    settings = ", ".join(f"{name} {value}" for name, value in card["build"]["settings"].items())
    lines += ["", f"Made by `{card['build']['command']}` with {settings}.", ""]
    lines += ["| input file | bytes | SHA-256 |", "|---|---:|---|"]
    for file in card["build"]["input"]:
        lines.append(f"| {file['file']} | {file['bytes']:,} | {file['sha256'] or 'not known'} |")
    return "\n".join(lines) + "\n"
