# SPDX-License-Identifier: Apache-2.0
"""What a run says of its course: steps, reward, Hit@1, seconds a step, and what is waited for.

verl's own bar lives in a Ray actor and shows none of that. A thread of the process that started the run reads the JSONL
that verl's logger `file` writes, and beside it the stage that the trainer's process has noted. A terminal gets a bar; a
file gets lines, one at least every `QUIET_S` seconds.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

PRINTED = ".printed"
"""Ending of the file beside the metrics with what a reward function prints."""
QUIET_S = 20.0
"""Longest time without a line."""


def loggers(config: Any) -> list[str]:
    """Names of verl's loggers that the run uses."""
    named = config.trainer.logger
    return [named] if isinstance(named, str) else list(named)


def metrics_path(config: Any) -> Path | None:
    """Where verl's logger `file` writes this run's metrics; None when that logger is off."""
    if "file" not in loggers(config):
        return None
    named = os.environ.get("VERL_FILE_LOGGER_PATH")
    root = Path(os.path.expanduser(os.environ.get("VERL_FILE_LOGGER_ROOT", ".")))
    return Path(named) if named else root / config.trainer.project_name / f"{config.trainer.experiment_name}.jsonl"


def stage_path(metrics: Path) -> Path:
    """Beside a metrics file: what its run is doing now, for the lines of the process that started it."""
    return metrics.with_suffix(".stage")


def note_stage(metrics: Path | None, what: str) -> None:
    """Say what is waited for from now on; nothing without a metrics file."""
    if metrics is not None:
        metrics.parent.mkdir(parents=True, exist_ok=True)
        stage_path(metrics).write_text(what)


def metrics_file(config: Any) -> Path | None:
    """`metrics_path`, made ready for a run.

    verl truncates the file at every start. An earlier part is kept as `<name>.<n>` so that resuming loses nothing.
    """
    path = metrics_path(config)
    if path is not None:
        path.with_suffix(PRINTED).unlink(missing_ok=True)
    if path is not None and path.is_file() and path.stat().st_size > 0:
        number = 1
        while path.with_name(f"{path.name}.{number}").exists():
            number += 1
        path.rename(path.with_name(f"{path.name}.{number}"))
    return path


@contextmanager
def prints_shown(config: Any) -> Iterator[None]:
    """Let what is printed here, in the trainer's process, reach the terminal: through Ray, or where Ray keeps it in its
    logs (`ray_kwargs.ray_init.log_to_driver=False`), through the progress line."""
    path = metrics_path(config)
    if path is None or config.ray_kwargs.ray_init.get("log_to_driver", True):
        yield
        return
    with path.with_suffix(PRINTED).open("a") as file, redirect_stdout(file):
        yield


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Metrics by step, from all parts of a run; a step run again after a resume counts with its last values.

    verl writes a number that is not finite as null: it is None here. A line without an end is not read: its step is
    still being written, or the run was killed while it wrote.
    """
    parts = sorted(path.parent.glob(f"{path.name}.*"), key=lambda part: int(part.suffix[1:]))
    result: dict[int, dict[str, float]] = {}
    for part in [*parts, path]:
        if not part.is_file():
            continue
        whole, _, _ = part.read_text().rpartition("\n")
        for line in whole.splitlines():
            entry = json.loads(line)
            result.setdefault(int(entry["step"]), {}).update(entry["data"])
    return result


def describe(metrics: dict[str, float]) -> str:
    """The text beside the bar for one step's metrics; what is not known (yet) is left out."""
    shown = (
        ("reward", "embedrl/reward/mean", "{:.3f}"),
        ("Hit@1", "embedrl/hit@1/mean", "{:.2f}"),
        ("well-formed", "embedrl/well_formed/mean", "{:.2f}"),
        ("s/step", "timing_s/step", "{:.1f}"),
        ("val Hit@1", "val-core/all/hit@1", "{:.3f}"),
    )
    return "  ".join(
        f"{label} {form.format(metrics[key])}" for label, key, form in shown if metrics.get(key) is not None
    )


def describe_left_out(metrics: dict[str, float]) -> str:
    """Pairs whose prompts are too long, by source; "" where none is."""
    parts = []
    for name, what in (("train", "training"), ("val", "validation")):
        key = f"data/left_out/{name}"
        if metrics.get(key):
            start = len(key) + 1
            sources = [f"{one[start:]} {count:.0f}" for one, count in metrics.items() if one.startswith(f"{key}/")]
            total = metrics[f"data/pairs/{name}"]
            parts.append(f"{metrics[key]:.0f} of {total:.0f} {what} pairs ({', '.join(sorted(sources))})")
    return f"left out, longer than data.max_prompt_length: {'; '.join(parts)}" if parts else ""


class Waiting:
    """Lines of a run, with one of what is waited for when there was none for `quiet_s` seconds.

    Attributes:
        what: what is waited for, in a few words.
    """

    def __init__(self, label: str, what: str, *, quiet_s: float = QUIET_S) -> None:
        self._label, self._quiet_s, self.what = label, quiet_s, ""
        self._spoken = time.monotonic()
        self.wait_for(what)

    def wait_for(self, what: str) -> None:
        """Something else than before, since now."""
        if what != self.what:
            self.what, self._since = what, time.monotonic()

    def say(self, text: str, *, own: bool = True) -> None:
        """A line, above a bar if there is one. own: false for what others print."""
        self._spoken = time.monotonic()
        tqdm.write(f"{self._label}: {text}" if own else text)
        sys.stdout.flush()

    def is_due(self) -> bool:
        """Whether the last line is `quiet_s` seconds ago."""
        return time.monotonic() - self._spoken >= self._quiet_s

    def look(self) -> None:
        """Say what is waited for, if a line is due."""
        if self.is_due():
            self.say(f"{self.what} ({time.monotonic() - self._since:.0f} s)")


@contextmanager
def repeated(look: Callable[[], None], *, interval: float = 1.0) -> Iterator[None]:
    """Call `look` every `interval` seconds in a thread, and once more at the end."""
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(interval):
            look()
        look()

    thread = threading.Thread(target=follow, daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def progress_line(
    path: Path | None, *, each_step: bool = False, interval: float = 1.0, quiet_s: float = QUIET_S
) -> Iterator[None]:
    """Follow the metrics file while the run goes on; without a file do nothing.

    Args:
        each_step: a line for every step, where there is no terminal.
        interval: seconds between two looks.
    """
    if path is None:
        yield
        return
    follower = _Follower(path, Waiting("EG-RL", "starting Ray", quiet_s=quiet_s), each_step)
    note_stage(path, follower.waiting.what)
    with repeated(follower.look, interval=interval):
        yield
    if follower.bar is not None:
        follower.bar.close()
    stage_path(path).unlink(missing_ok=True)  # an interrupted run keeps it: it says where that stands


class _Follower:
    def __init__(self, path: Path, waiting: Waiting, each_step: bool) -> None:
        self.waiting = waiting
        self._path, self._each_step, self._terminal = path, each_step, sys.stderr.isatty()
        self.bar: tqdm[Any] | None = None
        self._offset, self._printed, self._unsaid, self._reported = 0, 0, "", False
        self._latest: dict[str, float] = {}

    def look(self) -> None:
        """What is new in the files, and a line if one is due."""
        with suppress(FileNotFoundError):
            printed = self._path.with_suffix(PRINTED).read_bytes()[self._printed :].rpartition(b"\n")[0]
            if printed:
                self._printed += len(printed) + 1
                self.waiting.say(printed.decode(errors="replace"), own=False)
        for entry in self._new_entries():
            self._take(int(entry["step"]), entry["data"])
        with suppress(FileNotFoundError):
            self.waiting.wait_for(stage_path(self._path).read_text() or self.waiting.what)
        if self._unsaid and self.waiting.is_due():
            self._say_step()
        if self.bar is None:
            self.waiting.look()
        else:
            self.bar.set_description_str(f"EG-RL, {self.waiting.what}")

    def _new_entries(self) -> list[dict[str, Any]]:
        if not self._path.is_file():
            return []
        with self._path.open("rb") as handle:
            handle.seek(self._offset)
            whole = handle.read().rpartition(b"\n")[0]
        self._offset += len(whole) + bool(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def _take(self, step: int, data: dict[str, float]) -> None:
        self._latest.update(data)
        if not self._reported and (left_out := describe_left_out(self._latest)):
            self._reported = True
            self.waiting.say(left_out)
        shown, total = describe(self._latest), int(self._latest.get("embedrl/total_steps", 0))
        if step == 0:
            self.waiting.say(f"before training  {shown}")
        elif self._terminal:
            self.bar = self.bar or tqdm(total=total or None, initial=step - 1, unit="step")
            self.bar.set_postfix_str(shown, refresh=False)
            self.bar.update(step - self.bar.n)
        else:
            self._unsaid = f"step {step}{f'/{total}' if total else ''}  {shown}"
            if self._each_step or step == total:
                self._say_step()

    def _say_step(self) -> None:
        self.waiting.say(self._unsaid)
        self._unsaid = ""
