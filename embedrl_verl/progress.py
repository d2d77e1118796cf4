# SPDX-License-Identifier: Apache-2.0
"""One progress line in the terminal of a run: steps, reward, Hit@1 and seconds a step.

verl's own bar lives in a Ray actor and shows none of that. This one reads the JSONL that verl's logger `file` writes,
in a thread of the process that started the run.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm


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
    if path is None:
        return None
    if path.is_file() and path.stat().st_size > 0:
        number = 1
        while path.with_name(f"{path.name}.{number}").exists():
            number += 1
        path.rename(path.with_name(f"{path.name}.{number}"))
    return path


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


class ProgressLine:
    """Context manager that follows the metrics file while the run goes on; without a file it does nothing."""

    def __init__(self, path: Path | None, *, interval: float = 1.0) -> None:
        self._path = path
        self._interval = interval
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ProgressLine:
        if self._path is not None:
            self._thread = threading.Thread(target=self._follow, args=(self._path,), daemon=True, name="progress")
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _follow(self, path: Path) -> None:
        bar: tqdm[Any] | None = None
        offset = 0
        latest: dict[str, float] = {}
        said = False
        while True:
            last_look = self._stop.is_set()
            if path.is_file():
                with path.open() as handle:
                    handle.seek(offset)
                    lines = handle.read()
                complete = lines.rfind("\n") + 1
                offset += len(lines[:complete].encode())
                for line in lines[:complete].splitlines():
                    entry = json.loads(line)
                    latest.update(entry["data"])
                    if not said and (left_out := describe_left_out(latest)):
                        said = True
                        tqdm.write(left_out)
                    if entry["step"] == 0:
                        tqdm.write(f"before training  {describe(latest)}")
                        continue
                    if bar is None:
                        total = int(latest.get("embedrl/total_steps", 0)) or None
                        bar = tqdm(total=total, initial=entry["step"] - 1, desc="EG-RL", unit="step", leave=True)
                    bar.set_postfix_str(describe(latest), refresh=False)
                    bar.update(entry["step"] - bar.n)
            if last_look:
                break
            self._stop.wait(self._interval)
        if bar is not None:
            bar.close()
