# SPDX-License-Identifier: Apache-2.0
"""What is said of the run's servers never ends the run."""

import re
from types import SimpleNamespace

import pytest
import ray

from embedrl_verl.embedder.served import fleet
from embedrl_verl.embedder.served.fleet import ServerFleet


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ray.exceptions.ActorDiedError(), "is lost \\(ActorDiedError\\)"),
        (ray.exceptions.GetTimeoutError(), "says nothing within"),
    ],
)
def test_the_loss_of_one_servers_process_is_told_and_is_no_error(monkeypatch, error, said):
    def get(answer, timeout):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(fleet.ray, "get", get)
    answers = [(2, None), error]
    servers = ServerFleet.__new__(ServerFleet)
    servers._restarts = [0, 0]
    servers._actors = [SimpleNamespace(state=SimpleNamespace(remote=lambda i=i: answers[i])) for i in (0, 1)]
    first, (restarts, failure) = servers.states()
    assert first == (2, None) and restarts == 0
    assert re.search(said, failure)
