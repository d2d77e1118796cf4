# SPDX-License-Identifier: Apache-2.0
"""Run by test_killed.py: small jobs in forked children that kill themselves at the k-th of the calls that change the
disk, half of an answer written, and are started again. Prints what came out otherwise than unbroken, and the answers on
the disk that were asked for again.

    python killed_child.py FOLDER annotate|filter
"""

import functools
import itertools
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import fakes

from embedrl_verl.annotate import answers, relevance
from embedrl_verl.annotate.backends import Reply
from embedrl_verl.annotate.questions import seed_of

WRITES = ("write", "fsync", "replace", "unlink", "rmdir", "mkdir")


def arm(k):
    """Die at the k-th call that changes the disk."""
    calls = itertools.count(1)

    def call(name, original, *args, **kwargs):
        if next(calls) == k:
            if name == "write":
                original(args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    for name in WRITES:
        setattr(os, name, functools.partial(call, name, getattr(os, name)))


class Logging(fakes.FakeBackend):
    """Keeps a line of every request in a file, across kills."""

    def __init__(self, log, answer):
        super().__init__(answer)
        self.log = open(log, "a", buffering=1)  # noqa: SIM115

    async def complete(self, request):
        self.log.write(json.dumps(request[1]) + "\n")
        return await super().complete(request)


def job(command, file, out, log):
    if command == "annotate":
        return fakes.job([file], out, Logging(log, fakes.some_bad))
    questions = relevance.RelevanceQuestions(relevance.RelevanceSettings(style="compact"))
    words = Logging(log, lambda text, digest: Reply(("yes", "no", "hm")[digest % 3], False, 5, 1))
    return relevance.VerdictJob([file], out, questions, words, fakes.job([file], out, max_failed_share=1.0).runner)


def run(command, file, out, k):
    """A run in a child; True if it got through."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), status
        return status == 0
    try:
        answers.FLUSH_S = 0.002
        if k:
            arm(k)
        assert job(command, file, out, f"{out}.log").run(say=lambda line: None) == 0
        os._exit(0)
    finally:
        os._exit(1)


def stored(out):
    """Seeds of all requests whose answer is on the disk."""
    file, entries = out / "_work" / "answers.jsonl", []
    if file.exists():
        answers.Answers(file, entries.append)
    return [seed_of(0, entry["id"], entry["question"], entry["try"]) for entry in entries]


def main():
    folder, command = Path(sys.argv[1]), sys.argv[2]
    file = fakes.pair_file(folder / "a.parquet", 12)
    tcots = [replace(p, query=replace(p.query, tcot="q"), target=replace(p.target, tcot="t")) for p in fakes.pairs(12)]
    if command == "filter":
        fakes.write_pairs(tcots, file)
    assert run(command, file, folder / "unbroken", 0)
    expected = fakes.contents(folder / "unbroken")
    different, repeated, kept, kills = [], [], 0, 0
    for k in (*range(1, 14), *range(14, 60, 3)):
        out, log = folder / f"killed{k}", folder / f"killed{k}.log"
        kills += not run(command, file, out, k)
        seeds, before = stored(out), len(log.read_text()) if log.exists() else 0
        kept = max(kept, len(seeds))
        assert run(command, file, out, 0)
        different += [] if fakes.contents(out) == expected else [k]
        repeated += [seed for seed in seeds if f"seed={seed}," in log.read_text()[before:]]
    out, restarts = folder / "again", 0
    while not run(command, file, out, 9 + restarts):  # a little further each time, so that it ends
        restarts += 1
    different += [] if fakes.contents(out) == expected else [-1]
    print(json.dumps({"kills": kills, "kept": kept, "again": restarts, "different": different, "repeated": repeated}))


if __name__ == "__main__":
    main()
