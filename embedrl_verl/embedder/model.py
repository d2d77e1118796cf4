# SPDX-License-Identifier: Apache-2.0
"""The Embedder in this process: load a checkpoint, embed a list of inputs.

    embedder = Embedder.from_pretrained("path/to/checkpoint")
    vectors = embedder.embed([EmbedInput(item), EmbedInput(item, tcot, evidence)])     # (2, D), length 1

The same vectors as the verl worker and as a stock vLLM pooling server fed with `EmbedProcessor.prepare` (cosine at
least 0.999); the vector of a row does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from embedrl_verl.data.media import MediaLimits
from embedrl_verl.embedder.batching import RowBatch, budget_batches, failed_rows, pack_rows, unit
from embedrl_verl.embedder.loading import load_generation_model
from embedrl_verl.embedder.messages import EmbedInput
from embedrl_verl.embedder.processor import EmbedProcessor, Encoded
from embedrl_verl.embedder.profiles import EmbedderProfile
from embedrl_verl.errors import EmbedderError
from embedrl_verl.platforms import varlen
from embedrl_verl.platforms.vision import embed_with_media

MAX_BATCH_TOKENS = 16384
WINDOW_BATCHES = 4
"""Rows are encoded and sorted in windows of so many batches: enough to sort well, few enough to hold their pixels."""


def embed_packed(inner: Any, rows: RowBatch, *, always_run_vision: bool = False) -> torch.Tensor:
    """The state after the final norm at the last token of each row: float32 (B, D), length 1 or NaN; differentiable.

    One code path for the three Qwen-VL families, here and in verl's engines. The inner model's `last_hidden_state` is
    read: `hidden_states[-1]` of the generation classes is the state before the norm since transformers 4.56.

    Args:
        inner: `.model` of a generation class.
        rows: packed, on the model's device; positions that start again at 0 tell the attention where a row begins.
        always_run_vision: also on a batch without media (FSDP with several ranks); the result does not enter.
    """
    embeds, deepstack = embed_with_media(inner, rows.input_ids, rows.media, always_run_vision=always_run_vision)
    hidden = inner.language_model(
        input_ids=None,
        inputs_embeds=embeds,
        position_ids=rows.position_ids,
        attention_mask=None,
        use_cache=False,
        **deepstack,
    ).last_hidden_state
    return unit(hidden[0, rows.last])


class Embedder:
    """A checkpoint and its processor on one device. Use `from_pretrained`."""

    def __init__(self, model: PreTrainedModel, processor: EmbedProcessor) -> None:
        self.model = model
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        profile: str | EmbedderProfile = "auto",
        limits: MediaLimits | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        attn_implementation: str = varlen.NAME,
    ) -> Embedder:
        """Load a checkpoint.

        Args:
            path: folder or hub id of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL generation checkpoint.
            profile: how it is prompted; "auto" takes `embed_rl` if the tokenizer has `<emb>`.
            limits: sizes of media; None = those of the profile.
            dtype: of the model; vectors are float32 anyway.
        """
        processor = EmbedProcessor.from_pretrained(path, profile, limits, pixel_dtype=dtype)
        model = load_generation_model(path, dtype=dtype, attn_implementation=attn_implementation)
        return cls(model.to(device).eval(), processor)

    @property
    def dim(self) -> int:
        """D, the length of a vector in numbers."""
        return int(self.model.config.get_text_config().hidden_size)

    def embed(
        self, items: Sequence[EmbedInput], *, batch_size: int | None = None, max_batch_tokens: int = MAX_BATCH_TOKENS
    ) -> torch.Tensor:
        """Embed inputs: float32 (n, D) on the CPU, in the order of `items`, each of length 1.

        MediaError or EmbedderError for an input that cannot be encoded; EmbedderError for vectors that are not finite.

        Args:
            batch_size: most rows of one batch; None = only the token budget counts.
            max_batch_tokens: tokens of one batch.
        """
        parts = [torch.empty(0, self.dim)]
        with ThreadPoolExecutor(max_workers=1) as pool:  # encodes the next window while the model embeds this one
            windows = self._windows(items, max_batch_tokens)
            coming = pool.submit(next, windows, None)
            while (rows := coming.result()) is not None:
                coming = pool.submit(next, windows, None)
                parts.append(self.embed_encoded(rows, batch_size=batch_size, max_batch_tokens=max_batch_tokens))
        vectors = torch.cat(parts)
        if failed := failed_rows(vectors):
            raise EmbedderError(
                f"{len(failed)} of {len(items)} vectors are not finite (inputs {failed[:5]}); the checkpoint is broken "
                "or overflows in this dtype, try float32"
            )
        return vectors

    @torch.no_grad()
    def embed_encoded(
        self, rows: Sequence[Encoded], *, batch_size: int | None = None, max_batch_tokens: int = MAX_BATCH_TOKENS
    ) -> torch.Tensor:
        """Embed encoded rows: float32 (n, D) on the CPU in their order; a failed row is NaN."""
        vectors = torch.empty(len(rows), self.dim)
        for batch in budget_batches([len(row) for row in rows], max_batch_tokens, batch_size):
            packed = pack_rows([rows[i] for i in batch], self.model.device)
            vectors[batch] = embed_packed(self.model.model, packed).cpu()
        return vectors

    def _windows(self, items: Sequence[EmbedInput], max_batch_tokens: int) -> Iterator[list[Encoded]]:
        """Consecutive stretches of `items`, encoded."""
        rows: list[Encoded] = []
        tokens = 0
        for item in items:
            rows.append(self.processor.encode(item))
            tokens += len(rows[-1])
            if tokens >= WINDOW_BATCHES * max_batch_tokens:
                yield rows
                tokens, rows = 0, []
        if rows:
            yield rows
