# SPDX-License-Identifier: Apache-2.0
"""Muon is torch's Muon, in float32."""

import pytest
import torch

from recipes.tiny_digits.muon import Muon, MuonAdamW, orthogonalized


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (8, 24)])
def test_orthogonalized_keeps_the_directions_and_evens_out_their_lengths(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ orthogonalized(matrix) @ right.T
    assert ((inner.diagonal() > 0.4) & (inner.diagonal() < 1.6)).all()
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-3


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (8, 24)])
def test_updates_are_those_of_torch_up_to_bfloat16(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    pair = [
        Muon([ours], lr=0.01, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(5):
        grad = torch.randn(shape, generator=generator)
        for parameter, optimizer in zip((ours, theirs), pair, strict=True):
            parameter.grad = grad.clone()
            optimizer.step()
    moved = (ours - start).norm()
    assert (ours - theirs).norm() < 0.03 * moved


def test_every_parameter_is_trained_once() -> None:
    model = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(4, 8), "inner": torch.nn.Linear(8, 8)})
    model["lm_head"] = torch.nn.Linear(8, 4, bias=False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = MuonAdamW(model, lr=0.01, muon_lr=0.01, warmup=1, total=10)
    groups = [group["params"] for one in optimizer._optimizers for group in one.param_groups]
    assert [len(group) for group in groups] == [1, 3] and groups[0][0] is model["inner"].weight
    optimizer.step(model["lm_head"](model["inner"](model["embed_tokens"](torch.arange(4)))).square().sum())
    assert all((parameter != before[name]).any() for name, parameter in model.named_parameters())
