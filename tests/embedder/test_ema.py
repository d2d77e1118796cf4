# SPDX-License-Identifier: Apache-2.0
"""The moving average: follows the trained weights, stands in their place only for a while, survives a checkpoint."""

from __future__ import annotations

import io

import pytest
import torch

from embedrl_verl.embedder.ema import ShadowWeights
from embedrl_verl.errors import EmbedderError


@pytest.fixture
def module() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    return model


def move(module: torch.nn.Module, by: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by)


def test_weights_on_their_way_to_the_cpu_have_arrived_before_they_are_read(module, monkeypatch):
    """An offload that has not ended is played by the wait for the device, which writes the weights."""
    shadow = ShadowWeights(module, 0.9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    arrived = torch.full_like(module[1].weight, 3.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: module[1].weight.data.copy_(arrived))
    expected = shadow._shadow[-2].lerp(arrived, 0.1)
    shadow.update()
    torch.testing.assert_close(shadow._shadow[-2], expected)
    module[1].weight.data.zero_()
    with shadow.in_place():
        assert not torch.equal(module[1].weight.detach(), arrived)
    assert torch.equal(module[1].weight.detach(), arrived)


def test_a_saved_average_goes_on_and_another_models_is_refused(module):
    shadow = ShadowWeights(module, 0.9)
    move(module, 1.0)
    shadow.update()
    file = io.BytesIO()
    torch.save(shadow.state_dict(), file)
    file.seek(0)
    again = ShadowWeights(module, 0.9)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(shadow._shadow, again._shadow, strict=True))
    with pytest.raises(EmbedderError, match="3 tensors and the model 2 trained ones"):
        ShadowWeights(torch.nn.Linear(3, 4), 0.9).load_state_dict(shadow.state_dict())


def test_it_is_the_average_written_out_and_own_weights_come_back_also_after_an_error(module):
    shadow = ShadowWeights(module, 0.9)
    expected = module[1].weight.detach().clone()
    for by in (1.0, -0.5, 2.0):
        move(module, by)
        shadow.update()
        expected = 0.9 * expected + 0.1 * module[1].weight.detach()
    own, frozen = module[1].weight.detach().clone(), module[0].bias.detach().clone()
    with pytest.raises(KeyError), shadow.in_place():
        torch.testing.assert_close(module[1].weight.detach(), expected)
        assert not torch.equal(module[1].weight, own)
        assert torch.equal(module[0].bias, frozen), "weights that are not trained have no average"
        raise KeyError
    assert torch.equal(module[1].weight, own) and len(shadow.state_dict()["shadow"]) == 3
