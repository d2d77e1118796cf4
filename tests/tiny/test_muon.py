# SPDX-License-Identifier: Apache-2.0
"""Muon is torch's Muon, in float32."""

import pytest
import torch

from recipes.tiny_digits.muon import WEIGHT_DECAY, MuonAdamW, muon_update, orthogonalized

SHAPES = [(16, 16), (48, 16), (8, 24)]


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalized_keeps_the_directions_and_evens_out_their_lengths(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ orthogonalized(matrix) @ right.T
    assert ((inner.diagonal() > 0.4) & (inner.diagonal() < 1.6)).all()
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_updates_are_those_of_torch_up_to_bfloat16(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    ours, average, theirs = start.clone(), torch.zeros(shape), torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Muon([theirs], lr=0.01, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        theirs.grad = torch.randn(shape, generator=generator)
        muon_update(ours, theirs.grad, average, 0.01)
        optimizer.step()
    assert (ours - theirs).norm() < 0.03 * (ours - start).norm()


def test_every_parameter_is_trained_once_at_a_rate_that_rises_and_falls() -> None:
    model = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(4, 8), "inner": torch.nn.Linear(8, 8)})
    model["lm_head"] = torch.nn.Linear(8, 4, bias=False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = MuonAdamW(model, warmup=2, total=10)
    assert list(optimizer.matrices) == [model["inner"].weight]
    rates = []
    for _ in range(12):
        optimizer.step(model["lm_head"](model["inner"](model["embed_tokens"](torch.arange(4)))).square().sum())
        rates += [group["lr"] / 2e-3 for group in optimizer.adamw.param_groups]
    assert all((parameter != before[name]).any() for name, parameter in model.named_parameters())
    assert rates == pytest.approx([0.5, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1])
