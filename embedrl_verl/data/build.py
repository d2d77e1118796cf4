# SPDX-License-Identifier: Apache-2.0
"""A data set folder as a command makes it: parts in worker processes, bad rows, a data card.

1. `building` notes in `_work/` what the folder is made from. Other options or other input are refused; with the same
   the command goes on where it was killed.
2. `make_parts` runs one task for each part. A part gets its name when it is whole, and its report after that: a part
   with a report is never made again, one without is made again and has the same rows.
3. `finish` writes `rejected.jsonl`, the data card for people and, last, the data card; then `_work/` goes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from tqdm import tqdm

from embedrl_verl import __version__
from embedrl_verl.data.files import (
    CARD_FILE,
    CARD_TEXT_FILE,
    COMMAND_FILE,
    FORMAT,
    LOCK_FILE,
    PART_PATTERN,
    REJECTED_FILE,
    STALE,
    VERDICTS_FILE,
    WORK_FOLDER,
    begin_work,
    disk_errors,
    known_hash,
    licences_of,
    only_writer,
    part_facts,
    part_name,
    publish,
    read_object,
    temporary_name,
    write_atomically,
    write_json,
)
from embedrl_verl.data.pool import RunTasks, run_tasks
from embedrl_verl.errors import ConfigError, DataError, ResourceError

Task = TypeVar("Task")
Report: TypeAlias = dict[str, Any]
"""What a task remembers, JSON: `records` (in its part), `by_source` (name -> records), `rejected` (lines of
`rejected.jsonl`: file, row or line, field, reason, pair_id), and more of its own."""

BUILD_FILE = "build.json"
GONE_FOLDER = "._work_done"
CAUSES_SHOWN, MAX_CAUSES = 20, 1000
IN_FILE = re.compile(r"(?:.*?, row \d+: )?(?:field (?P<field>\S+): )?(?P<reason>.*)", re.DOTALL)
logger = logging.getLogger(__name__)


def build_facts(command: str, settings: Mapping[str, Any], files: Sequence[Path]) -> dict[str, Any]:
    """What a data set is made by and from: equal facts give equal rows."""
    inputs = [{"file": str(file), "bytes": file.stat().st_size, "sha256": known_hash(file)} for file in files]
    return {"tool": f"embedrl-verl {__version__}", "command": command, "settings": dict(settings), "input": inputs}


@contextmanager
def building(
    out: Path,
    facts: Mapping[str, Any],
    command: Sequence[str],
    *,
    stamps: Sequence[Any] = (),
    anew: str = "remove the folder",
) -> Iterator[Path | None]:
    """Begin a folder, or go on with it; one process at a time.

    Args:
        facts: `build_facts`, or more than these.
        command: finishes the folder; noted for the user.
        anew: what a user does who wants other options or input.
        stamps: of the input, such as times of change: they may not differ when a job goes on, and are not in the card.

    Yields:
        `out/_work`; None if the folder is finished already, by the same build.

    Raises:
        ConfigError: the folder was made or begun by another build or by none, or another process is writing it.
    """
    work, facts = out / WORK_FOLDER, json.loads(json.dumps(facts))
    shutil.rmtree(out / GONE_FOLDER, ignore_errors=True)
    if (out / CARD_FILE).is_file() and not work.exists():
        if changed := difference(read_object(out / CARD_FILE).get("build"), facts):
            raise ConfigError(f"{out} was made with other options or input: {changed}; name another folder, or {anew}")
        yield None
        return
    ours = (work / BUILD_FILE).is_file()
    own = {BUILD_FILE, COMMAND_FILE, LOCK_FILE}
    foreign = [path for path in work.glob("*") if path.name not in own and path.suffix != ".tmp"]
    foreign += [
        path for name in (PART_PATTERN, REJECTED_FILE, CARD_TEXT_FILE, VERDICTS_FILE) for path in sorted(out.glob(name))
    ]
    if foreign and not ours:
        name = foreign[0].relative_to(out)
        raise ConfigError(f"{out} holds {name}, which this command did not write; name another folder")
    with disk_errors(out):
        work.mkdir(parents=True, exist_ok=True)
    with only_writer(out), disk_errors(out):
        if ours and not (work / BUILD_FILE).is_file():  # its writer ended between our look and our lock
            shutil.rmtree(work)
            raise ConfigError(f"another process has just finished {out}; run the command again")
        state = json.loads(json.dumps({**facts, "stamps": list(stamps)}))
        if ours and (changed := difference(read_object(work / BUILD_FILE), state)):
            raise ConfigError(
                f"{out} was begun with other options or input: {changed}. Finish it with the same, or {anew}"
            )
        begin_work(out, command)
        write_json(work / BUILD_FILE, state)
        for stale in (*out.glob(STALE), *work.glob(STALE)):  # of killed writers; no other is at work
            stale.unlink()
        yield work


def make_parts(
    make: Callable[[Task, Path], Report],
    tasks: Sequence[Task],
    work: Path,
    *,
    rows: int,
    workers: int,
    max_bad_share: float,
    label: str,
    option: str = "--max-bad-share",
    run: RunTasks = run_tasks,
) -> list[Report]:
    """Run the tasks that have no report yet; returns all reports, in the order of the tasks.

    Args:
        make: makes the part of a task: writes the file that it is given (whole, see `PairWriter`), returns the report.
            Importable by worker processes, and depends on its task alone.
        tasks: can be pickled. Task number i makes `part-0000i.parquet` of the folder of `work`.
        rows: of the input, for the limit of bad ones.
        workers: processes; with 1 the tasks run in this one.
        label: of the progress bar, and of the log lines without a terminal.
        option: what a user sets `max_bad_share` by.
        run: what runs them, if not processes here.

    Raises:
        DataError: too many bad rows; the message has the causes, `rejected.jsonl` all that were found.
        ResourceError: full disk, killed worker. What is finished stays.
        What a task raises.
    """
    out = work.parent
    files = [work / f"{part_name(number)}.json" for number in range(len(tasks))]
    reports: dict[int, Report] = {number: read_object(file) for number, file in enumerate(files) if file.is_file()}
    todo = [number for number in range(len(tasks)) if number not in reports]
    if reports and todo:
        logger.warning("%s: %d of %d parts are there already", label, len(reports), len(tasks))
    jobs = ((number, tasks[number], out / part_name(number), files[number]) for number in todo)
    with tqdm(total=len(tasks), initial=len(reports), desc=label, unit="part", disable=not sys.stderr.isatty()) as bar:
        stop_if_bad(reports.values(), rows, max_bad_share, out, option)
        for number, report in run(_make_one, make, jobs, min(workers, len(todo))) if todo else ():
            # The part, not its report: NFS may remember for a minute that a name we have looked for is not there.
            if not (part := out / part_name(number)).is_file():
                raise ResourceError(f"{part} was written and is not here: {out} must be on a disk that all nodes share")
            reports[number] = report
            bar.update()
            if bar.disable:
                logger.info("%s: %d of %d parts", label, len(reports), len(tasks))
            stop_if_bad(reports.values(), rows, max_bad_share, out, option)
    return [reports[number] for number in range(len(tasks))]


def _make_one(make: Callable[[Task, Path], Report], job: tuple[int, Task, Path, Path]) -> tuple[int, Report]:
    number, task, part, file = job
    with disk_errors(part):
        report = make(task, part)
        report["part"] = part_facts(part, report["records"])
        write_json(file, report)
    return number, report


def finish(
    out: Path,
    name: str,
    facts: Mapping[str, Any],
    reports: Sequence[Report],
    *,
    media_root: str | None,
    licence: str = "",
    more: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Write `rejected.jsonl` and the data card, last of all files, and remove `_work`. Returns the card.

    Args:
        name: what the data set is, for people.
        media_root: absolute, or relative to `out`; None if no record has a path.
        licence: without one, what the cards beside the input declare.
        more: facts for the card, beside the counts.
        notes: lines of Markdown for people.
    """
    rejected = [line for report in reports for line in report["rejected"]]
    by_source: Counter[str] = Counter()
    for report in reports:
        by_source.update(report["by_source"])
    causes, examples = count_causes(rejected)
    card = {
        "format": FORMAT,
        "name": name,
        "tool": facts["tool"],
        "licence": licence or licences_of([Path(entry["file"]) for entry in facts["input"]]),
        "records": sum(report["records"] for report in reports),
        "media_root": media_root,
        "by_source": {source: {"records": count} for source, count in sorted(by_source.items())},
        "rejected": {
            "rows": len(rejected),
            "causes": [
                {"cause": cause, "rows": count, "example": examples[cause]}
                for cause, count in causes.most_common(CAUSES_SHOWN)
            ],
        },
        **(more or {}),
        "build": dict(facts),
        "parts": [report["part"] for report in reports],
    }
    with disk_errors(out):
        write_lines(out / REJECTED_FILE, rejected)
        write_atomically(out / CARD_TEXT_FILE, card_text(card, notes))
        write_json(out / CARD_FILE, card)
        os.replace(out / WORK_FOLDER, out / GONE_FOLDER)  # at once: half of it would be of no known build
        shutil.rmtree(out / GONE_FOLDER)
    return card


def stop_if_bad(
    reports: Iterable[Report], rows: int, max_bad_share: float, out: Path, option: str = "--max-bad-share"
) -> None:
    """Raise DataError, with the causes, when more than this share of `rows` is rejected; writes `rejected.jsonl`."""
    reports = list(reports)
    if (bad := sum(len(report["rejected"]) for report in reports)) <= max_bad_share * rows:
        return
    raise DataError(
        f"{bad} of {rows} rows cannot be used, over the limit of {max_bad_share:.2%}:\n{list_causes(reports, out)}\n"
        f"{out / REJECTED_FILE} has all that were found. Mend the input and write a new folder, or run the same "
        f"command with a higher {option} to leave them out"
    )


def list_causes(reports: Iterable[Report], out: Path) -> str:
    """The commonest causes of rejected rows, a line each; writes `rejected.jsonl`."""
    rejected = [line for report in reports for line in report["rejected"]]
    write_lines(out / REJECTED_FILE, rejected)
    causes, examples = count_causes(rejected)
    shown = causes.most_common(5)
    lines = [f"  {count} x {cause} (first: {examples[cause]})" for cause, count in shown]
    if left := causes.total() - sum(count for _, count in shown):
        lines.append(f"  {left} x other causes")
    return "\n".join(lines)


def rejection(file: str | Path, row: int, error: DataError, pair_id: str | None = None) -> dict[str, Any]:
    """A line of `rejected.jsonl` for a row of a parquet file (from 0); the error may begin with file and row."""
    parts = IN_FILE.fullmatch(str(error))
    assert parts is not None
    name, reason = parts["field"], parts["reason"]
    line = {"file": str(file), "row": row, "field": name or "", "reason": reason}
    return {**line, "pair_id": pair_id} if pair_id else line


def count_causes(rejected: Iterable[Mapping[str, Any]]) -> tuple[Counter[str], dict[str, str]]:
    """Rows by cause (numbers and quoted values left out, so that like goes to like), and where each is first seen. Of
    very many different causes the later ones are counted together."""
    causes: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for line in rejected:
        field = re.sub(r"\[\d+\]", "[]", str(line["field"]))
        cause = re.sub(r"""(?<!\w)(['"]).*?\1(?!\w)|\b\d+(?:[.x]\d+)?\b""", "…", str(line["reason"]))
        cause = f"{field}: {cause}" if field else cause
        if cause not in causes and len(causes) >= MAX_CAUSES:
            cause = "(other causes)"
        causes[cause] += 1
        place = "".join(f", {name} {line[name]}" for name in ("row", "line") if name in line)
        where = f", field {line['field']}" if line["field"] else ""
        examples.setdefault(cause, f"{line['file']}{place}{where}: {line['reason']}")
    return causes, examples


def difference(before: Any, now: Any, name: str = "") -> str:
    """The first value that differs, as "name was a, is b"; "" if all are equal."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        pairs = [(before.get(key), now.get(key), f"{name}.{key}".lstrip(".")) for key in {**now, **before}]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = [(a, b, f"{name}[{index}]") for index, (a, b) in enumerate(zip(before, now, strict=True))]
    elif isinstance(before, list) and isinstance(now, list):
        return f"{name} had {len(before)} entries, has {len(now)}"
    else:
        return "" if before == now else f"{name} was {before!r}, is {now!r}"
    return next((found for one in pairs if (found := difference(*one))), "")


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON-lines file, whole or not at all."""
    temporary = temporary_name(path)
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    publish(temporary, path)


def card_text(card: Mapping[str, Any], notes: Sequence[str] = ()) -> str:
    """The data card for people, in Markdown. No dates and no machine: equal builds have equal cards."""
    counts = list(next(iter(card["by_source"].values()), {"records": 0}))
    lines = [
        f"# Data card: {card['name']}",
        "",
        f"{card['records']:,} pairs in {len(card['parts'])} parquet files, written by {card['tool']}.",
        f"Licence: {card['licence']}.",
        f"Media root: {card['media_root'] or 'not needed'}.",
        "",
        f"| data source | {' | '.join(counts)} |",
        f"|---|{'---:|' * len(counts)}",
    ]
    for source, numbers in card["by_source"].items():
        lines.append(f"| {source} | {' | '.join(_cell(numbers.get(key)) for key in counts)} |")
    lines += ["", *notes] if notes else []
    rejected = card["rejected"]
    if rejected["rows"]:
        lines += ["", f"Rejected: {rejected['rows']:,} rows ({REJECTED_FILE} has them all).", ""]
        lines += [f"- {cause['rows']:,} x {cause['cause']} (first: {cause['example']})" for cause in rejected["causes"]]
    settings = ", ".join(f"{name} {value}" for name, value in card["build"]["settings"].items())
    lines += ["", f"Made by `{card['build']['command']}` with {settings}.", ""]
    lines += ["| input file | bytes | SHA-256 |", "|---|---:|---|"]
    lines += [
        f"| {one['file']} | {one['bytes']:,} | {one['sha256'] or 'not known'} |" for one in card["build"]["input"]
    ]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} ({count:,})" for name, count in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
