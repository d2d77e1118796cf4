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
from collections.abc import Mapping, Sequence
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
    """The result of step 2.

    Attributes:
        loss: of the whole batch.
        query, target: float32 (Q, D) and (T, D), d loss / d vector; zero for rows without a vector.
        metrics: loss, hit@1, negatives a query, masked false negatives, rows without a vector, and the mean cosine of
            partners.
    """

    loss: float
    query: torch.Tensor
    target: torch.Tensor
    metrics: dict[str, float]


def contrastive_gradients(
    query: torch.Tensor,
    target: torch.Tensor,
    layout: ContrastiveLayout,
    *,
    temperature: float = 0.02,
    symmetric: bool = True,
    matryoshka_dims: Sequence[int] = (),
) -> ContrastiveGradients:
    """Loss of a batch and its gradient in every vector.

    Args:
        query, target: (Q, D), (T, D) vectors of all ranks, detached; a row that is not finite has no part in the loss.
        layout, temperature, symmetric, matryoshka_dims: as `contrastive_loss`.

    Raises:
        NoNegativesError: no row has a negative.
        NoPairsError: no pair has vectors on both sides.
        EmbedderError: the loss is not finite.
    """
    have_query, have_target = query.isfinite().all(dim=1), target.isfinite().all(dim=1)
    kept = layout.select(have_query.cpu(), have_target.cpu())
    if not len(kept.query_pair) or not kept.positives().any():
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
        contrast = contrastive_loss(
            leaf_query,
            leaf_target,
            kept,
            temperature=temperature,
            symmetric=symmetric,
            matryoshka_dims=matryoshka_dims,
        )
        loss = float(contrast.loss.detach())
        if not math.isfinite(loss):
            raise EmbedderError(f"the contrastive loss must be finite; got {loss} at temperature {temperature}")
        gradients = torch.autograd.grad(contrast.loss, [leaf_query, leaf_target])
    full = []
    for vectors, have, gradient in zip((query, target), (have_query, have_target), gradients, strict=True):
        placed = torch.zeros(vectors.shape, dtype=torch.float32, device=vectors.device)
        placed[have] = gradient
        full.append(placed)
    cosine = (leaf_query @ leaf_target.T).detach()[kept.positives().to(leaf_query.device)]
    metrics = {
        "loss": loss,
        "hit@1": contrast.hit1,
        "negatives": contrast.negatives,
        "false_negatives_masked": float(contrast.masked),
        "failed_rows": float((~have_query).sum() + (~have_target).sum()),
        "partner_cosine": float(cosine.mean()),
    }
    return ContrastiveGradients(loss, full[0], full[1], metrics)


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
    """Refuse a model configuration with dropout: the second pass would draw another mask than the first.

    Args:
        config: a transformers configuration; sub-configurations are looked into.
        where: named in the message.

    Raises:
        ConfigError: a probability of dropout or stochastic depth above 0, with its name.
    """
    found = sorted(_dropouts(config.to_dict(), ""))
    if found:
        name, value = found[0]
        raise ConfigError(
            f"{where}: training in two passes needs the same vectors in both, so dropout must be 0; got "
            f"{name}={value}. Set it to 0 in the checkpoint's config.json"
        )


def _dropouts(values: Mapping[str, Any], prefix: str) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _dropouts(value, f"{prefix}{name}.")
        elif ("dropout" in str(name) or "drop_path" in str(name)) and isinstance(value, (int, float)) and value > 0:
            found.append((f"{prefix}{name}", float(value)))
    return found
