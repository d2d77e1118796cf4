# SPDX-License-Identifier: Apache-2.0
"""InfoNCE over a batch of matching pairs: the contrastive loss that Embedders are trained with (method section 5).

Row i of both sides belongs to pair i; every other row of the other side is its negative, except rows whose target is
the same content: pushing those away would teach that an answer is wrong because it was drawn twice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from embedrl_verl.errors import EmbedderError


def info_nce(
    query: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float = 0.02,
    target_content: torch.Tensor | None = None,
    symmetric: bool = True,
) -> torch.Tensor:
    """Mean cross-entropy of finding the own partner among the batch.

    Args:
        query, target: (N, D) vectors of length 1, float; row i matches row i.
        temperature: of the softmax over cosines; positive.
        target_content: (N,) int64; equal numbers mark equal content, which is never a negative.
        symmetric: average over both directions; else only query to target.

    Returns:
        Scalar tensor, 0 at best.

    Raises:
        EmbedderError: shapes that do not fit together, no rows, or a temperature that is not positive.
    """
    if query.shape != target.shape or query.dim() != 2 or not len(query):
        raise EmbedderError(
            "query and target must be (N, D) of the same shape, N >= 1; "
            f"got {tuple(query.shape)} and {tuple(target.shape)}"
        )
    if not temperature > 0:
        raise EmbedderError(f"temperature must be positive; got {temperature}")
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = query.to(dtype) @ target.to(dtype).T / temperature
    if target_content is not None:
        if target_content.shape != query.shape[:1]:
            raise EmbedderError(f"target_content must be ({len(query)},); got {tuple(target_content.shape)}")
        same = target_content[:, None] == target_content[None, :]
        same.fill_diagonal_(False)
        logits = logits.masked_fill(same.to(logits.device), float("-inf"))
    own = torch.arange(len(query), device=logits.device)
    loss = F.cross_entropy(logits, own)
    if symmetric:
        loss = (loss + F.cross_entropy(logits.T, own)) / 2
    return loss
