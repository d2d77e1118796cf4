# SPDX-License-Identifier: Apache-2.0
"""EG-RL with the Embedder behind a vLLM server, and in a sentence-transformers process; both are killed in a step.

Rows are embedded while rollouts still run. In step 2 the process that embeds is killed (kill -9) when it has answered
some of its rows, and the reward stage then waits until it is back, so that step 3 has one again. The server's owner is
held from then until the reward stage (kill -STOP), so that no other row of the step has a vector, however slow or fast
a machine starts a server.
"""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from embedrl_verl.embedder.served import guard
from embedrl_verl.export.folder import export_checkpoint
from embedrl_verl.progress import read_metrics
from tests.e2e import harness
from tests.e2e.rescore import rescore

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
ROWS = 8 * 4
EMBEDDED = 20  # rows of step 2 that the server has answered when it is killed
LOST = 3  # answers of those that may not have been taken yet; with the other rows, less than one of two mini-batches
WHILE_IT_IS_DOWN = ("connection lost", "connection refused", "no server is up", "deadline")
# Rollouts end one after another; of the killed process some rows are embedded, some not.
EXTRA = ["actor_rollout_ref.rollout.max_num_seqs=1", "trainer.val_before_train=False"]
REWARD = """
import pathlib, time
from embedrl_verl.rewards.functions import no_judge

def compute_score(batch):
    until = time.monotonic() + 400
    while pathlib.Path({hold!r}).exists() and time.monotonic() < until:
        pathlib.Path({reached!r}).touch()
        time.sleep(0.1)
    return no_judge.compute_score(batch)
"""


def ours() -> list[psutil.Process]:
    """Every process that the run has started."""
    return psutil.Process().children(recursive=True)


def words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


def ends(process: psutil.Process, *, within_s: float) -> bool:
    """Whether it ends: Ray tells its processes to and waits for none, and a big one gives its pages back slowly."""
    until = time.monotonic() + within_s
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
    return True


def server() -> psutil.Process | None:
    """vLLM's API server: the child of its inner guard."""
    inner = [one for one in ours() if guard.__file__ in words(one) and guard.INNER in words(one)]
    return next((child for one in inner for child in one.children()), None)


def actor(name: str) -> psutil.Process | None:
    return next((one for one in ours() if "".join(words(one)[:1]).startswith(f"ray::{name}")), None)


def sentence_actor() -> psutil.Process | None:
    return actor("_SentenceActor")


@contextlib.contextmanager
def owner_held() -> Iterator[None]:
    """Nobody starts the server again meanwhile."""
    owner = actor("_ServerActor")
    assert owner is not None
    owner.suspend()
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            owner.resume()


def answer(process: psutil.Process, path: str) -> str:
    """What the server says; "" if it does not."""
    command = words(process)
    where = {name: command[command.index(name) + 1] for name in ("--host", "--port") if name in command}
    try:
        with urllib.request.urlopen(f"http://{where['--host']}:{where['--port']}{path}", timeout=5) as response:
            return response.read().decode() or "yes"
    except (OSError, http.client.HTTPException, KeyError):
        return ""


def answered(process: psutil.Process) -> float:
    """Rows that the server has embedded."""
    lines = [line for line in answer(process, "/metrics").splitlines() if line.startswith("http_requests_total{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if '"/v1/embeddings"' in line and '"2xx"' in line)


def worked(process: psutil.Process) -> float:
    """Tenths of seconds that a process has computed: a few rows."""
    return process.cpu_times().user // 0.1


class Killer(threading.Thread):
    """Kills what `find` finds in step 2, when `done` of it has grown by `after`; `happened` says what was done. What
    `meanwhile` holds, it holds from the kill to the reward stage."""

    def __init__(
        self,
        folder: Path,
        find: Callable[[], psutil.Process | None],
        done: Callable[[psutil.Process], float],
        is_up: Callable[[psutil.Process], Any],
        *,
        after: int,
        meanwhile: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        super().__init__(daemon=True)
        self._after, self._meanwhile = after, meanwhile
        self._folder, self._find, self._done, self._is_up = folder, find, done, is_up
        self._hold, self._reached = folder / "hold", folder / "reached"
        self.happened: list[str] = []
        self.started: psutil.Process | None = None
        self.over = threading.Event()
        folder.mkdir(exist_ok=True)
        (folder / "reward.py").write_text(REWARD.format(hold=str(self._hold), reached=str(self._reached)))
        self.overrides = [f"reward.custom_reward_function.path={folder / 'reward.py'}"]

    def _wait(self, condition: Callable[[], Any], pause_s: float) -> bool:
        while not self.over.is_set():
            if condition():
                return True
            time.sleep(pause_s)
        return False

    def _is_back(self, killed: int) -> bool:
        self.started = self._find()
        return self.started is not None and self.started.pid != killed and bool(self._is_up(self.started))

    def run(self) -> None:
        metrics = self._folder / "metrics.jsonl"
        if not self._wait(lambda: metrics.exists() and 1 in read_metrics(metrics), 0.1):
            return
        process = self._find()
        assert process is not None
        if not self._wait(lambda: self._is_up(process), 0.05):  # one that does not answer has no count
            return
        before = self._done(process)
        if not self._wait(lambda: self._done(process) >= before + self._after, 0.05):
            return
        with self._meanwhile():
            self._hold.touch()
            os.kill(process.pid, signal.SIGKILL)
            self.happened.append("killed")
            self._wait(self._reached.exists, 0.1)
        if self._wait(lambda: self._is_back(process.pid), 0.5):
            self.happened.append("back")
        self._hold.unlink()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 0)
            self.happened.append("what it had started is left")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    harness.prepare(folder)
    return folder


def finished(inputs: Path, killer: Killer, folder: Path, settings: dict[str, Any], *, steps: int) -> harness.Run:
    extra = [*EXTRA, *killer.overrides, *(f"embedrl.{name}={value}" for name, value in settings.items())]
    killer.start()
    try:
        run = harness.run(inputs, folder, extra, steps=steps)
    finally:
        killer.over.set()
        killer.join()
    assert run.code == 0, run.output[-6000:]
    assert killer.happened == ["killed", "back"]
    assert killer.started is not None
    assert ends(killer.started, within_s=guard.GRACE_S + 5), "what embeds has outlived its run"
    return run


@pytest.fixture(scope="module")
def served(inputs, tmp_path_factory):
    """3 steps with a server that the run starts, for which a row waits 20 s."""
    folder = tmp_path_factory.mktemp("served")
    settings = {"embedder.backend": "server", "embedder.server.servers": 1, "embedder.server.max_model_len": 1024}
    settings |= {"embedder.server.deadline_s": 20, "reward.max_failed_share": 0.99}
    killer = Killer(folder, server, answered, lambda one: answer(one, "/health"), after=EMBEDDED, meanwhile=owner_held)
    return finished(inputs, killer, folder, settings, steps=3)


@pytest.fixture(scope="module")
def sentence(inputs, tmp_path_factory):
    """2 steps with the Embedder as a sentence-transformers model."""
    folder = tmp_path_factory.mktemp("sentence")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "huggingface").symlink_to(inputs / "embedder")
    export_checkpoint(folder / "checkpoint", folder / "model", kind="embedder")
    killer = Killer(folder, sentence_actor, worked, lambda one: True, after=1)
    settings = {"embedder.backend": "sentence_transformers", "embedder.path": folder / "model"}
    return finished(inputs, killer, folder, settings, steps=2)


def check_rewards(run: harness.Run, step: int, inputs: Path) -> list[dict]:
    """The rewards of the rows that have a vector are those of the Embedder in one process; returns the other rows."""
    rows = run.dump("rollouts", step)
    assert len(rows) == ROWS
    present, failed = ([row for row in rows if (row["failure"] is None) == kept] for kept in (True, False))
    expected = torch.tensor([row["score"] for row in present])
    assert expected.std() > 1e-3, "rewards that are all equal would prove nothing"
    found = rescore(present, inputs / "data" / "train.parquet", inputs / "embedder", batch_size=32)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    return failed


def test_a_server_of_the_run_gives_the_embedders_rewards_also_after_it_was_killed(served, inputs):
    for step in (1, 3):
        assert check_rewards(served, step, inputs) == []
        assert served.metrics[step]["embedrl/failed_rows"] == 0
        metrics = served.metrics[step]
        assert metrics["timing_s/reward_embed"] < metrics["timing_s/gen"] / 4  # vectors are there already


def test_rows_that_a_killed_server_leaves_without_a_vector_are_counted_and_unknown(served, inputs):
    failed = check_rewards(served, 2, inputs)
    assert 0 < len(failed) <= ROWS - EMBEDDED + LOST
    assert served.metrics[2]["embedrl/failed_rows"] == len(failed)
    causes = {f"embedding server: {why}" for why in WHILE_IT_IS_DOWN}
    assert {row["failure"] for row in failed} <= causes
    assert [row["score"] for row in failed] == [None] * len(failed)
    assert "NaN" not in (served.folder / "rollouts" / "2.jsonl").read_text()


def test_a_killed_sentence_transformers_process_is_started_again_and_no_row_is_lost(sentence, inputs):
    for step in (1, 2):
        assert check_rewards(sentence, step, inputs) == []
        assert sentence.metrics[step]["embedrl/failed_rows"] == 0


@pytest.mark.parametrize("name", ["served", "sentence"])
def test_training_goes_on(name, request):
    for metrics in request.getfixturevalue(name).metrics.values():
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["actor/grad_norm"] > 0
