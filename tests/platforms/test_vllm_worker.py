# SPDX-License-Identifier: Apache-2.0
"""A Qwen3-VL engine that has slept adds nothing to prompts without pictures."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from embedrl_verl.platforms.vllm_worker import GpuColocateWorkerExtension, clear_deepstack

vllm_utils = pytest.importorskip("verl.workers.rollout.vllm_rollout.utils")


def test_what_the_deepstack_held_is_cleared_in_place_and_said():
    tensors = [torch.full((4, 3), -2.0), torch.tensor([[float("nan"), 1.0]]), torch.zeros(2, 2)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    assert clear_deepstack(SimpleNamespace(deepstack_input_embeds=tensors[:1])) == 2.0
    assert clear_deepstack(SimpleNamespace(deepstack_input_embeds=tensors)) == float("inf")
    assert not any(tensor.any() for tensor in tensors)
    assert [tensor.data_ptr() for tensor in tensors] == addresses  # a captured graph reads there


@pytest.mark.parametrize("model", [SimpleNamespace(), SimpleNamespace(deepstack_input_embeds=None)])
def test_a_model_without_deepstack_is_left_alone(model):
    assert clear_deepstack(model) == 0.0


def test_every_weight_sync_clears_it_after_the_weights_are_there(monkeypatch):
    model = SimpleNamespace(deepstack_input_embeds=[torch.zeros(2, 2)])
    calls = []

    def sync(self, peft_config=None, base_sync_done=False, use_shm=False):
        calls.append((peft_config, base_sync_done, use_shm))
        model.deepstack_input_embeds[0].fill_(3.0)

    monkeypatch.setattr(vllm_utils.vLLMColocateWorkerExtension, "update_weights_from_ipc", sync)
    worker = object.__new__(GpuColocateWorkerExtension)
    worker.model_runner = SimpleNamespace(model=model, vllm_config=SimpleNamespace(speculative_config=None))
    worker.update_weights_from_ipc(peft_config={"r": 1}, base_sync_done=True, use_shm=True)
    assert calls == [({"r": 1}, True, True)]
    assert not model.deepstack_input_embeds[0].any()


def test_vllm_still_keeps_plain_tensors_that_sleep_discards():
    """The extension can go when they are buffers (the worker saves those) or are written for every prompt."""
    from vllm.model_executor.models import qwen3_vl

    source = inspect.getsource(qwen3_vl.Qwen3VLForConditionalGeneration)
    assert "self.deepstack_input_embeds = [" in source and 'register_buffer("deepstack' not in source
