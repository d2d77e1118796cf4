# SPDX-License-Identifier: Apache-2.0
"""Killed at any moment and started again, a job loses nothing, doubles nothing and asks for no answer twice.

The test runs this file: small jobs in forked children that kill themselves at the k-th of the calls that change the
disk, half of an answer written, and are started again. Printed is what came out otherwise than unbroken, and the
answers on the disk that were asked for again.
"""

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fakes

from embedrl_verl.annotate.answers import Answers
from embedrl_verl.annotate.backends import Reply
from embedrl_verl.annotate.prompts import seed_of
from embedrl_verl.annotate.relevance import RelevanceSettings, VerdictJob


@pytest.mark.slow
@pytest.mark.parametrize("command", ["annotate", "filter"])
def test_a_job_killed_at_any_write_ends_as_an_unbroken_one(command, tmp_path):
    child = [sys.executable, __file__, str(tmp_path), command]
    result = subprocess.run(child, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    assert found["different"] == found["repeated"] == []
    assert found["kills"] > 10 and found["again"] > 3 and found["kept"] > 10  # else nothing was tried


def arm(k):
    """Die at the k-th call that changes the disk."""
    calls = itertools.count(1)

    def call(name, original, *args, **kwargs):
        if next(calls) == k:
            if name == "write":
                original(args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    for name in ("write", "fsync", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, functools.partial(call, name, getattr(os, name)))


def job(folder, command, out):
    """Its backend keeps a line of every request in a file, across kills."""
    log = open(f"{out}.log", "a", buffering=1)  # noqa: SIM115
    one = fakes.job([folder / "in.parquet"], out, fakes.FakeBackend(fakes.some_bad))
    if command == "filter":
        words = fakes.FakeBackend(lambda text, digest: Reply(("yes", "no", "hm")[digest % 3], False, 5, 1))
        one = VerdictJob(one.files, out, RelevanceSettings(style="compact"), words, one.how)
    spoil = one.backend.spoil
    one.backend.spoil = lambda text, digest: log.write(f"{one.backend.asked[-1]}\n") and spoil(text, digest)
    return one


def stored(out):
    """Seeds of all requests whose answer is on the disk."""
    file, entries = out / "_work" / "answers.jsonl", []
    if file.exists():
        Answers(file, entries.append).close()
    return [seed_of(0, entry["id"], entry["question"], entry["try"]) for entry in entries]


def main(folder, command):
    def run(out, k=0):
        """A run in a child; True if it got through."""
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            assert status in (0, signal.SIGKILL), status
            return status == 0
        try:
            arm(k)
            assert job(folder, command, out).run(say=lambda line: None) == 0
            os._exit(0)
        finally:
            os._exit(1)

    tcots = [replace(p, query=replace(p.query, tcot="q"), target=replace(p.target, tcot="t")) for p in fakes.pairs(12)]
    file = fakes.pair_file(folder / "in.parquet", 12)
    if command == "filter":
        fakes.write_pairs(tcots, file)
    assert run(folder / "unbroken")
    expected = fakes.contents(folder / "unbroken")
    different, repeated, kept, kills, restarts = [], [], 0, 0, 0
    for k in (*range(1, 14), *range(14, 60, 3)):
        out, log = folder / f"killed{k}", folder / f"killed{k}.log"
        kills += not run(out, k)
        seeds, before = stored(out), len(log.read_text()) if log.exists() else 0
        kept = max(kept, len(seeds))
        assert run(out)
        different += [] if fakes.contents(out) == expected else [k]
        repeated += [seed for seed in seeds if f"seed={seed}," in log.read_text()[before:]]
    while not run(folder / "again", 9 + restarts):  # a little further each time, so that it ends
        restarts += 1
    different += [] if fakes.contents(folder / "again") == expected else [-1]
    print(json.dumps({"kills": kills, "kept": kept, "again": restarts, "different": different, "repeated": repeated}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
