# SPDX-License-Identifier: Apache-2.0
"""Optimizers of the tiny models: Muon for the matrices between embedding and head, AdamW for everything else.

Muon (momentum, then the nearest orthogonal matrix) needs about half the steps of AdamW for these models. torch has it,
but orthogonalises in bfloat16, which a CPU without bfloat16 units emulates: 0.8 s a step for a model whose forward and
backward pass take 0.4 s. `Muon` here does the same in float32, and a test holds it against torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

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


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with adjust_lr_fn="match_rms_adamw", Nesterov momentum and float32 orthogonalisation.

    Args:
        params: matrices, float32.
        lr: step size in the units of AdamW.
        momentum: of the averaged gradient.
        weight_decay: decoupled, as AdamW's.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, *, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients; `closure` computes the loss anew, as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"], group["momentum"], group["weight_decay"])
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        average = state["momentum"].lerp_(grad, 1 - momentum)
        direction = orthogonalized(grad.lerp(average, momentum))
        parameter.mul_(1 - lr * weight_decay)
        parameter.add_(direction, alpha=-lr * 0.2 * max(parameter.shape) ** 0.5)


class MuonAdamW:
    """Both optimizers over one model, with warm-up and linear decay to a tenth of the learning rates.

    Args:
        model: parameters whose name holds `embed_tokens` or `lm_head`, and all that are not matrices, go to AdamW.
        lr, muon_lr: peak learning rates.
        warmup, total: steps of the rise, and of the whole schedule.
    """

    def __init__(self, model: torch.nn.Module, *, lr: float, muon_lr: float, warmup: int, total: int) -> None:
        self._model = model
        matrices: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for name, parameter in model.named_parameters():
            inner = parameter.dim() == 2 and "embed_tokens" not in name and "lm_head" not in name
            (matrices if inner else others).append(parameter)
        adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
        self._optimizers: list[torch.optim.Optimizer] = [Muon(matrices, lr=muon_lr), adamw]
        self._schedules = [
            torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: min((step + 1) / warmup, max(0.1, 1 - step / total))
            )
            for optimizer in self._optimizers
        ]

    def step(self, loss: Tensor) -> None:
        """Backward pass, gradients clipped to norm 1, one update, one step of the schedules."""
        self._model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        for optimizer, schedule in zip(self._optimizers, self._schedules, strict=True):
            optimizer.step()
            schedule.step()
