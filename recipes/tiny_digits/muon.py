# SPDX-License-Identifier: Apache-2.0
"""The optimizer of all tiny models: Muon for the matrices between embedding and head, AdamW for everything else.

Muon (momentum, then the nearest orthogonal matrix) needs about half the steps of AdamW for these models. torch has it,
but orthogonalises in bfloat16, which a CPU without bfloat16 units emulates: 0.8 s a step for a model whose forward and
backward pass take 0.4 s. `muon_update` does the same in float32, and a test holds it against torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

LR, MUON_LR = 2e-3, 3e-3
WARMUP = 30
"""Steps of the rise; after it both rates fall linearly to a tenth."""
WEIGHT_DECAY = 0.01
MOMENTUM = 0.95
NS_COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Of the quintic Newton-Schulz iteration, as in torch.optim.Muon."""
NS_STEPS = 5


def orthogonalized(matrix: Tensor) -> Tensor:
    """Roughly U V^T of the singular value decomposition of (m, n), float32: singular values end between 0.5 and 1.5."""
    a, b, c = NS_COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(NS_STEPS):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def muon_update(matrix: Tensor, grad: Tensor, average: Tensor, lr: float) -> None:
    """One step in place, as torch.optim.Muon's with Nesterov momentum and adjust_lr_fn="match_rms_adamw".

    `average`: running mean of the gradients, zeros before the first step.
    """
    average.lerp_(grad, 1 - MOMENTUM)
    direction = orthogonalized(grad.lerp(average, MOMENTUM))
    matrix.mul_(1 - lr * WEIGHT_DECAY)
    matrix.add_(direction, alpha=-lr * 0.2 * max(matrix.shape) ** 0.5)


class MuonAdamW:
    """Both over one model: what is no matrix, `embed_tokens` and `lm_head` go to AdamW.

    `total`: steps of the whole schedule.
    """

    def __init__(self, model: torch.nn.Module, *, total: int, warmup: int = WARMUP) -> None:
        self._model, self._total, self._warmup = model, total, warmup
        self.matrices: dict[torch.nn.Parameter, Tensor] = {}  # with their running means
        others = []
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed_tokens" not in name and "lm_head" not in name:
                self.matrices[parameter] = torch.zeros_like(parameter)
            else:
                others.append(parameter)
        self.adamw = torch.optim.AdamW(others, lr=LR, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
        self._steps = 0

    def step(self, loss: Tensor) -> None:
        """Backward pass, gradients clipped to norm 1, one update."""
        self._model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        rate = min((self._steps + 1) / self._warmup, max(0.1, 1 - self._steps / self._total))
        with torch.no_grad():
            for matrix, average in self.matrices.items():
                if matrix.grad is not None:  # none of the vision part in a batch without pictures
                    muon_update(matrix, matrix.grad, average, MUON_LR * rate)
        for group in self.adamw.param_groups:
            group["lr"] = LR * rate
        self.adamw.step()
        self._steps += 1
