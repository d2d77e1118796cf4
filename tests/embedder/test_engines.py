# SPDX-License-Identifier: Apache-2.0
"""In-process, verl worker and stock vLLM pooling give the same vectors; so do 1 and 2 data-parallel ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from embedrl_verl.tiny.environment import CPU_ENV
from tests.embedder.inputs import ROWS, mixed_inputs

SCRIPT = Path(__file__).with_name("engines.py")
pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def vectors_of(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict]:
    """`vectors_of("ray" | "vllm")`: what `engines.py` computed, run once."""
    folder = tmp_path_factory.mktemp("engines")

    def run(engine: str) -> dict[str, Any]:
        out = folder / f"{engine}.pt"
        if not out.exists():
            command = [sys.executable, str(SCRIPT), engine, str(checkpoint("qwen2_vl")), str(out)]
            done = subprocess.run(
                command,
                env={**os.environ, **CPU_ENV},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=900,
            )
            assert done.returncode == 0, done.stdout[-6000:]
        return torch.load(out, weights_only=True)

    return run


@pytest.fixture(scope="module")
def in_process(embedder) -> torch.Tensor:
    return embedder("qwen2_vl").embed(mixed_inputs(ROWS))


def test_worker_vectors_are_the_in_process_ones_for_1_and_2_ranks_from_driver_and_queue(vectors_of, in_process):
    result = vectors_of("ray")
    for name in ("driver_1", "driver_2", "queue_1", "queue_2"):
        assert result[name].shape == in_process.shape and result[name].dtype == torch.float32
        assert (result[name] - in_process).abs().max() < 1e-5, name
        assert torch.nn.functional.cosine_similarity(result[name], in_process).min() > 0.999, name
    assert result["failures_1"] == result["failures_2"] == {}


def test_fewer_rows_than_ranks_and_rows_of_one_length_keep_their_vectors(vectors_of, in_process):
    result = vectors_of("ray")
    for ranks in (1, 2):
        assert (result[f"one_{ranks}"] - in_process[5:6]).abs().max() < 1e-5
        assert (result[f"equal_{ranks}"] - in_process[3]).abs().max() < 1e-5


def test_a_row_without_a_finite_vector_is_reported_and_leaves_the_others_alone(vectors_of, in_process):
    result = vectors_of("ray")
    for ranks in (1, 2):
        vectors, failures = result[f"poisoned_{ranks}"], result[f"poisoned_failures_{ranks}"]
        assert failures == {1: "the Embedder gave a vector that is not finite"}
        assert vectors[1].isnan().all()
        assert (vectors[[0, 2]] - in_process[[0, 2]]).abs().max() < 1e-5


def test_a_key_that_the_queue_does_not_have_is_an_error(vectors_of):
    for ranks in (1, 2):
        assert "asked for 4 rows of partition 'embed', got 3" in vectors_of("ray")[f"missing_{ranks}"]


def test_a_training_step_moves_the_vectors_the_same_way_on_1_and_2_ranks(vectors_of, in_process):
    result = vectors_of("ray")
    assert result["metrics_1"]["grad_norm"] == pytest.approx(result["metrics_2"]["grad_norm"], rel=1e-4)
    moved = (result["trained_1"] - in_process).norm(dim=1)
    assert moved.min() > 0.01
    assert ((result["trained_1"] - result["trained_2"]).norm(dim=1) / moved).max() < 0.02


def test_stock_vllm_pooling_gives_the_same_vectors(vectors_of, in_process):
    cosine = torch.nn.functional.cosine_similarity(vectors_of("vllm")["vllm"], in_process)
    assert cosine.min() >= 0.999, cosine.min()
