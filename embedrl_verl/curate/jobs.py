# SPDX-License-Identifier: Apache-2.0
"""Numbered tasks in worker processes, with a journal: after kill -9 the same command goes on where it was.

A task writes its file (complete or not at all) and returns what is to be remembered, as JSON; that goes to the journal
after the file. A task that is in the journal is not done again; one that was killed before its entry is done again and
writes the same bytes.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from tqdm import tqdm

from embedrl_verl.data import pool
from embedrl_verl.data.files import disk_errors, write_json
from embedrl_verl.errors import ConfigError

Entry = dict[str, Any]
Task = TypeVar("Task")
logger = logging.getLogger(__name__)
ROWS_PER_PART = 50_000


def worker_count(workers: int | None) -> int:
    """Worker processes; None: the CPUs that this process may use."""
    if workers is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers < 1:
        raise ConfigError(f"workers must be at least 1; got {workers}")
    return workers


def run_tasks(
    function: Callable[[Task], Entry],
    tasks: Sequence[Task],
    journal: Path,
    *,
    workers: int,
    label: str,
    watch: Callable[[Entry], None] | None = None,
) -> list[Path]:
    """Run the tasks that are not in the journal. Returns the journal's files, in the order of the tasks.

    Args:
        function: importable by worker processes; depends on its task alone.
        tasks: picklable.
        journal: folder of the journal; made if missing.
        workers: processes; with 1 the tasks run in this one.
        label: of the progress bar, and of the log lines without a terminal.
        watch: sees each entry, old and new, and may raise to stop.

    Raises:
        ResourceError: full disk, killed worker. Tasks that are done stay in the journal.
        What a task, or `watch`, raises.
    """
    with disk_errors(journal):
        journal.mkdir(parents=True, exist_ok=True)
    files = [journal / f"{number:06d}.json" for number in range(len(tasks))]
    todo = [number for number, file in enumerate(files) if not file.is_file()]
    done = len(files) - len(todo)
    if done and todo:
        logger.warning("%s: %d of %d parts are there already", label, done, len(tasks))
    if watch is not None:
        for number in sorted({*range(len(tasks))} - {*todo}):
            watch(read_entry(files[number]))
    with tqdm(total=len(tasks), initial=done, desc=label, unit="part", disable=not sys.stderr.isatty()) as bar:
        numbered = ((files[number], tasks[number]) for number in todo)
        for file in pool.run_tasks(_run_one, function, numbered, max(1, min(workers, len(todo)))):
            bar.update()
            done += 1
            if bar.disable:
                logger.info("%s: %d of %d parts", label, done, len(tasks))
            if watch is not None:
                watch(read_entry(file))
    return files


def read_entry(file: Path) -> Entry:
    """An entry of the journal."""
    entry: Entry = json.loads(file.read_bytes())
    return entry


def rejected_in(journal: Path) -> list[dict[str, Any]]:
    """The lines for `rejected.jsonl` of all entries, in the order of the tasks."""
    return [line for file in sorted(journal.glob("*.json")) for line in read_entry(file)["rejected"]]


def _run_one(function: Callable[[Task], Entry], task: tuple[Path, Task]) -> Path:
    file, arguments = task
    if multiprocessing.parent_process() is not None:
        pa.set_cpu_count(1)  # the processes share the work
    with disk_errors(file.parent.parent.parent):
        write_json(file, function(arguments))
    return file
