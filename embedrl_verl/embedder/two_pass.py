# SPDX-License-Identifier: Apache-2.0
"""The contrastive step in two passes (GradCache): memory of one micro-batch, the gradient of the whole batch.

1. All rows are embedded without gradients, in micro-batches, on all ranks.
2. The loss of the whole batch is taken over those vectors, and its gradient with respect to each vector is kept.
3. Each micro-batch is embedded again with gradients, and backpropagates <vector, kept gradient>: by the chain rule
   their sum over micro-batches and ranks is the gradient of the loss in the weights.

Pass 1 can be somebody else's: co-training takes the vectors that gave the reward, as long as the weights are the same.
Both passes must give the same vectors, so a model with dropout is refused (`refuse_dropout`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from embedrl_verl.embedder.info_nce import ContrastiveLayout, contrastive_loss
from embedrl_verl.errors import ConfigError, EmbedderError

GRADIENT = "embedding_gradient"
"""Column of a training batch: float32 (rows, D), the gradient of the loss in each row's vector."""


class NoNegativesError(EmbedderError):
    """Nothing can be learnt from the batch: all its targets are the same content, or there is one pair only."""


class NoPairsError(EmbedderError):
    """No pair of the batch has vectors on both sides."""


@dataclass(frozen=True, eq=False)
class ContrastiveGradients:
    """The result of step 2."""

    loss: float  # of the whole batch
    query: torch.Tensor  # float32 (Q, D), d loss / d vector; zero for rows without a vector
    target: torch.Tensor  # float32 (T, D), the same
    metrics: dict[str, float]  # of the loss; rows without a vector; mean cosine of partners


def contrastive_gradients(
    query: torch.Tensor,
    target: torch.Tensor,
    layout: ContrastiveLayout,
    **options: Any,
) -> ContrastiveGradients:
    """Loss of a batch and its gradient in every vector.

    Args:
        query, target: (Q, D), (T, D) vectors of all ranks, detached; a row that is not finite has no part in the loss.
        options: of `contrastive_loss` (`EmbedderTrainConfig.loss_options`).
    """
    have_query, have_target = query.isfinite().all(dim=1), target.isfinite().all(dim=1)
    kept = layout.select(have_query.cpu(), have_target.cpu())
    positives = kept.positives()
    if not positives.any():
        raise NoPairsError(
            f"no pair has vectors on both sides: {int((~have_query).sum())} of {len(query)} queries and "
            f"{int((~have_target).sum())} of {len(target)} targets are not finite"
        )
    if not kept.negatives().any():
        pairs, contents = len(kept.query_pair.unique()), len(kept.target_content.unique(dim=0))
        raise NoNegativesError(
            "a contrastive batch needs at least two pairs with different queries and different targets; got "
            f"{pairs} pair(s) with {contents} different content(s). Use larger batches, or leave out data whose "
            "queries or targets are all the same"
        )
    with torch.enable_grad():
        leaf_query = query[have_query].detach().float().requires_grad_()
        leaf_target = target[have_target].detach().float().requires_grad_()
        contrast = contrastive_loss(leaf_query, leaf_target, kept, **options)
        loss = float(contrast.loss.detach())
        if not math.isfinite(loss):
            raise EmbedderError(f"the contrastive loss must be finite; got {loss} with {options}")
        of_query, of_target = torch.autograd.grad(contrast.loss, [leaf_query, leaf_target])
    query_gradient = torch.zeros_like(query, dtype=torch.float32)
    target_gradient = torch.zeros_like(target, dtype=torch.float32)
    query_gradient[have_query], target_gradient[have_target] = of_query, of_target
    cosine = (leaf_query @ leaf_target.T).detach()[positives.to(query.device)]
    metrics = {
        "loss": loss,
        "hit@1": contrast.hit1,
        "negatives": contrast.negatives,
        "false_negatives_masked": float(contrast.masked),
        "failed_rows": float((~have_query).sum() + (~have_target).sum()),
        "partner_cosine": float(cosine.mean()),
    }
    return ContrastiveGradients(loss, query_gradient, target_gradient, metrics)


def after_update(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Of what verl's worker says of pass 2: `grad_norm` before clipping and `lr` of the next update."""
    norm = float(metrics["grad_norm"])
    if not math.isfinite(norm):
        raise EmbedderError(
            f"the norm of the Embedder's gradient must be finite; got {norm}, and verl has left the weights alone. "
            "Lower embedrl.embedder.train.lr, raise its temperature, or compute in float32 (embedrl.embedder.dtype)"
        )
    return {"grad_norm": norm, "lr": float(metrics["lr"])}


def surrogate_loss(
    model_output: Mapping[str, torch.Tensor], data: Any, dp_group: Any
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The loss of pass 2, as verl's engines call it: ranks * sum of <vector, kept gradient>.

    Engines average gradients over data-parallel ranks, hence the factor: the step is that of the whole batch.
    """
    ranks = torch.distributed.get_world_size(dp_group)
    gradient = data[GRADIENT]
    if gradient.is_nested:  # as TransferQueue gives it back
        gradient = torch.stack(list(gradient.unbind()))
    return ranks * (model_output["embeddings"] * gradient).sum(), {}


def refuse_dropout(config: Any, where: str) -> None:
    """Refuse a transformers configuration with dropout or stochastic depth, also in its parts: the second pass would
    draw another mask than the first. `where` is named in the message."""
    for name, value in sorted(_dropouts(config.to_dict(), "")):
        raise ConfigError(
            f"{where}: training in two passes needs the same vectors in both, so dropout must be 0; got "
            f"{name}={value}. Set it to 0 in the checkpoint's config.json"
        )


def _dropouts(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _dropouts(value, f"{prefix}{name}.")
        elif ("dropout" in str(name) or "drop_path" in str(name)) and isinstance(value, (int, float)) and value > 0:
            yield f"{prefix}{name}", float(value)
