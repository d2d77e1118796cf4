# SPDX-License-Identifier: Apache-2.0
"""In-process and verl worker give the same vectors, on 1 and 2 data-parallel ranks; vLLM: served/test_server.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from embedrl_verl.embedder.batching import NOT_FINITE
from tests import processes
from tests.embedder.inputs import ROWS, mixed_inputs

SCRIPT = Path(__file__).with_name("engines.py")
pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def result(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `engines.py` computed."""
    folder = tmp_path_factory.mktemp("engines")
    code, text = processes.run([str(SCRIPT), str(checkpoint("qwen2_vl")), str(folder / "out.pt")], folder / "log.txt")
    assert code == 0, text[-6000:]
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.fixture(scope="module")
def in_process(embedder) -> torch.Tensor:
    return embedder("qwen2_vl").embed(mixed_inputs(ROWS))


def test_worker_vectors_are_the_in_process_ones_for_1_and_2_ranks_from_driver_and_queue(result, in_process):
    for name in ("driver_1", "driver_2", "queue_1", "queue_2"):
        assert result[name].shape == in_process.shape and result[name].dtype == torch.float32
        assert (result[name] - in_process).abs().max() < 1e-5, name
        assert torch.nn.functional.cosine_similarity(result[name], in_process).min() > 0.999, name
    assert result["failures_1"] == result["failures_2"] == {}


def test_fewer_rows_than_ranks_and_rows_of_one_length_keep_their_vectors(result, in_process):
    for ranks in (1, 2):
        assert (result[f"one_{ranks}"] - in_process[5:6]).abs().max() < 1e-5
        assert (result[f"equal_{ranks}"] - in_process[3]).abs().max() < 1e-5


def test_a_row_without_a_finite_vector_is_reported_and_leaves_the_others_alone(result, in_process):
    for ranks in (1, 2):
        vectors, failures = result[f"poisoned_{ranks}"], result[f"poisoned_failures_{ranks}"]
        assert failures == {1: NOT_FINITE}
        assert vectors[1].isnan().all()
        assert (vectors[[0, 2]] - in_process[[0, 2]]).abs().max() < 1e-5


def test_a_key_that_the_queue_does_not_have_is_an_error(result):
    for ranks in (1, 2):
        assert "asked for 4 vectors of partition 'embed', got 3" in result[f"missing_{ranks}"]


def test_a_training_step_moves_the_vectors_the_same_way_on_1_and_2_ranks(result, in_process):
    assert result["metrics_1"]["grad_norm"] == pytest.approx(result["metrics_2"]["grad_norm"], rel=1e-4)
    moved = (result["trained_1"] - in_process).norm(dim=1)
    assert moved.min() > 0.01
    assert ((result["trained_1"] - result["trained_2"]).norm(dim=1) / moved).max() < 0.02
