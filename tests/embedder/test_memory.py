# SPDX-License-Identifier: Apache-2.0
"""Out of memory: the message has the micro-batch's size and the keys to lower; other errors pass as they are."""

from __future__ import annotations

import pytest
import torch

from embedrl_verl.embedder.memory import explained_out_of_memory
from embedrl_verl.errors import EmbedderError


@pytest.mark.parametrize("training", [True, False])
def test_a_real_allocation_that_fails_names_the_keys(training):
    key = "embedrl.embedder.train.max_tokens_per_gpu" if training else "embedrl.embedder.max_tokens_per_gpu"
    with (
        pytest.raises(EmbedderError, match=f"micro-batch of 3 row.s. with 96 tokens .*Lower {key}"),
        explained_out_of_memory(rows=3, tokens=96, training=training),
    ):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_a_devices_error_is_explained_too():
    with (
        pytest.raises(EmbedderError, match="CUDA out of memory"),
        explained_out_of_memory(rows=1, tokens=2, training=True),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_another_error_passes():
    with pytest.raises(RuntimeError, match="shapes"), explained_out_of_memory(rows=1, tokens=2, training=True):
        raise RuntimeError("shapes do not fit")
