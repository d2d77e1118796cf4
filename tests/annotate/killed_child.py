# SPDX-License-Identifier: Apache-2.0
"""Run by test_killed.py: a small job in a forked child that kills itself at its k-th write, and its resumption.

    python killed_child.py FOLDER STEP

For every STEP-th k, until a run gets through alive: a new folder, killed at write k (of a journal entry, half of it is
written first), and then gone on with; and one folder that is killed again and again. Prints one JSON line: kills, and
what differs from an unbroken run.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import fakes

from embedrl_verl.annotate import runner, seeds

WRITES = ("pwrite", "fsync", "replace", "ftruncate", "unlink", "rmdir", "mkdir")


def arm(k: int) -> None:
    """Die at the k-th of the calls that change the disk."""
    left = [k]

    def wrap(name):
        original = getattr(os, name)

        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                if name == "pwrite":
                    file, data, place = args
                    original(file, bytes(data)[: len(data) // 2], place)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(os, name, call)

    for name in WRITES:
        wrap(name)


def run(files: list[Path], out: Path, k: int | None, forbidden: set[str] = frozenset()) -> bool:
    """A run in a child; True if it got through."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) == (status == signal.SIGKILL) and status in (0, signal.SIGKILL), status
        return status == 0
    code = 1
    try:
        runner._FLUSH_S = 0.01
        if k is not None:
            arm(k)
        backend = fakes.FakeBackend(fakes.some_bad)
        assert fakes.job(files, out, backend).run(say=lambda line: None) == 0
        asked_twice = [seed for seed in forbidden if any(f"seed={seed}," in body for body in backend.asked)]
        assert not asked_twice, asked_twice
        code = 0
    finally:
        os._exit(code)


def journalled(out: Path) -> set[str]:
    """Seeds of all requests whose answer is in a journal."""
    found = set()
    for journal in out.glob("_work/journal-*.jsonl"):
        for line in journal.read_bytes().split(b"\n")[:-1]:
            entry = json.loads(line)
            if "errand" in entry:
                found.add(str(seeds.seed_of(0, entry["id"], entry["errand"], entry["try"])))
    return found


def main() -> None:
    folder, step = Path(sys.argv[1]), int(sys.argv[2])
    files = [fakes.pair_file(folder / "a.parquet", 7), folder / "b.parquet"]
    fakes.write_pairs([replace(pair, pair_id=f"b{pair.pair_id}") for pair in fakes.pairs(5)], files[1])
    assert run(files, folder / "unbroken", None)
    expected = fakes.contents(folder / "unbroken")
    different, kills, k, through = [], 0, 1, False
    while not through:
        out = folder / "killed"
        through = run(files, out, k)
        kills += not through
        assert run(files, out, None, journalled(out))
        if fakes.contents(out) != expected:
            different.append(k)
        shutil.rmtree(out)
        k += step
    again, gone_on = folder / "again", 0
    while not run(files, again, 9 + gone_on):  # a little further each time, so that it ends
        gone_on += 1
    if fakes.contents(again) != expected:
        different.append(-1)
    print(json.dumps({"kills": kills, "again": gone_on, "different": different, "files": sorted(expected)}))


if __name__ == "__main__":
    main()
