# SPDX-License-Identifier: Apache-2.0
"""A fixed set of pairs that tells whether co-training spoils the Embedder.

Rewards come from the Embedder that is being trained, so they can rise while it gets worse: both sides may agree on
something that only they understand. The anchors are pairs nobody trains on, read as they are in the file (with their
T-CoT if they are annotated, else the input alone), so that their Hit@1 compares Embedders and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from embedrl_verl.data.video import even_indices
from embedrl_verl.embedder.processor import Encoded
from embedrl_verl.errors import EmbedderError
from embedrl_verl.evaluation.validation import RetrievalValidation, ValidationRow
from embedrl_verl.stage1.rows import PairRows

Embed = Callable[[Sequence[Encoded]], torch.Tensor]


class AnchorSet:
    """Encoded pairs, drawn evenly from a file.

    Args:
        rows: all pairs of the anchor files.
        count: how many are used, at most.

    Raises:
        MediaError, EmbedderError: a pair that cannot be encoded; the message names it.
    """

    def __init__(self, rows: PairRows, count: int) -> None:
        indices = even_indices(len(rows), min(count, len(rows)))
        self._pairs = [rows[index, False] for index in indices]
        self._sources = [rows.source(index) for index in indices]

    def __len__(self) -> int:
        return len(self._pairs)

    def hit1(self, embed: Embed) -> float:
        """Hit@1 over the pairs of each source, mean over sources.

        Args:
            embed: rows -> float32 (n, D); a failed row is NaN and not retrieved.

        Raises:
            EmbedderError: no row has a vector.
        """
        vectors = embed([pair.query for pair in self._pairs] + [pair.target for pair in self._pairs])
        known = vectors.isfinite().all(dim=1)
        if not known.any():
            raise EmbedderError(f"none of the {len(vectors)} rows of the {len(self)} anchors has a finite vector")
        validation = RetrievalValidation(ndcg_k=1)
        for side, start in enumerate((0, len(self._pairs))):
            validation.add(
                [
                    ValidationRow(source, side, 0, pair.contents[0], vectors[start + i] if known[start + i] else None)
                    for i, (source, pair) in enumerate(zip(self._sources, self._pairs, strict=True))
                ]
            )
        return validation.metrics()["val-core/all/hit@1"]
