# SPDX-License-Identifier: Apache-2.0
"""Out-of-memory errors that say which keys to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from embedrl_verl.errors import EmbedderError

_CPU_ALLOCATOR = ("can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """True for a device's out-of-memory error, and for that of torch's CPU allocator (a plain RuntimeError)."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_ALLOCATOR)


@contextmanager
def explained_out_of_memory(*, rows: int, tokens: int, training: bool) -> Iterator[None]:
    """Turns running out of memory on one micro-batch into an EmbedderError that names its size and the keys to lower.

    Args:
        rows, tokens: of the micro-batch; with padding, if it is padded.
        training: whether it keeps activations for gradients.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        key = "embedrl.embedder.train.max_tokens_per_gpu" if training else "embedrl.embedder.max_tokens_per_gpu"
        more = ", train an adapter (train.lora_rank), keep train.gradient_checkpointing on" if training else ""
        raise EmbedderError(
            f"out of memory on a micro-batch of {rows} row(s) with {tokens} tokens ({first}). Lower {key}, or "
            f"image_max_tokens and frame_max_tokens of embedrl.embedder{more}. The number of pairs does not matter: "
            "memory is that of one micro-batch"
        ) from error
