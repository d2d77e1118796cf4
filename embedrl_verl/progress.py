# SPDX-License-Identifier: Apache-2.0
"""One progress line in the terminal of a run: steps, reward, Hit@1 and seconds a step.

verl's own bar lives in a Ray actor and shows none of that. This one reads the JSONL that verl's logger `file` writes,
in a thread of the process that started the run.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from tqdm import tqdm

PRINTED = ".printed"
"""Ending of the file beside the metrics with what a reward function prints."""


def metrics_path(config: Any) -> Path | None:
    """Where verl's logger `file` writes this run's metrics; None when that logger is off."""
    loggers = config.trainer.logger
    if "file" not in ([loggers] if isinstance(loggers, str) else list(loggers)):
        return None
    named = os.environ.get("VERL_FILE_LOGGER_PATH")
    root = Path(os.path.expanduser(os.environ.get("VERL_FILE_LOGGER_ROOT", ".")))
    return Path(named) if named else root / config.trainer.project_name / f"{config.trainer.experiment_name}.jsonl"


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


@contextmanager
def progress_line(path: Path | None, *, interval: float = 1.0) -> Iterator[None]:
    """Follow the metrics file, every `interval` seconds, while the run goes on; without a file do nothing."""
    if path is None:
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(path, stop, interval), daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _follow(path: Path, stop: threading.Event, interval: float) -> None:
    bar: tqdm[Any] | None = None
    offset = 0
    latest: dict[str, float] = {}
    reported, printed = False, 0
    while True:
        is_last = stop.is_set()  # before the look: what is there at the end is read all the same
        if path.with_suffix(PRINTED).is_file():
            new = path.with_suffix(PRINTED).read_bytes()[printed:].rpartition(b"\n")[0]
            if new:
                printed += len(new) + 1
                tqdm.write(new.decode(errors="replace"))
        if path.is_file():
            with path.open("rb") as handle:
                handle.seek(offset)
                whole = handle.read().rpartition(b"\n")[0]
            offset += len(whole) + bool(whole)
            for line in whole.splitlines():
                entry = json.loads(line)
                latest.update(entry["data"])
                if not reported and (left_out := describe_left_out(latest)):
                    reported = True
                    tqdm.write(left_out)
                if entry["step"] == 0:
                    tqdm.write(f"before training  {describe(latest)}")
                    continue
                if bar is None:
                    total = int(latest.get("embedrl/total_steps", 0)) or None
                    bar = tqdm(total=total, initial=entry["step"] - 1, desc="EG-RL", unit="step", leave=True)
                bar.set_postfix_str(describe(latest), refresh=False)
                bar.update(entry["step"] - bar.n)
        if is_last:
            break
        stop.wait(interval)
    if bar is not None:
        bar.close()
