# SPDX-License-Identifier: Apache-2.0
"""A Qwen3-VL engine that has slept adds nothing to prompts without pictures; a CPU engine owns its weights."""

from __future__ import annotations

import asyncio
import inspect
import threading
from types import SimpleNamespace

import pytest
import torch
import zmq
from verl.plugin.platform import platform_manager

from embedrl_verl.platforms.cpu import CpuPlatform
from embedrl_verl.platforms.vllm_worker import CpuColocateWorkerExtension, GpuColocateWorkerExtension, clear_deepstack

vllm_utils = pytest.importorskip("verl.workers.rollout.vllm_rollout.utils")


def test_what_the_deepstack_held_is_cleared_in_place_and_said():
    tensors = [torch.full((4, 3), -2.0), torch.tensor([[float("nan"), 1.0]]), torch.zeros(2, 2)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    assert clear_deepstack(SimpleNamespace(deepstack_input_embeds=tensors[:1])) == 2.0
    assert clear_deepstack(SimpleNamespace(deepstack_input_embeds=tensors)) == float("inf")
    assert not any(tensor.any() for tensor in tensors)
    assert [tensor.data_ptr() for tensor in tensors] == addresses  # a captured graph reads there
    assert clear_deepstack(SimpleNamespace()) == clear_deepstack(SimpleNamespace(deepstack_input_embeds=None)) == 0.0


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


def test_upstream_still_hands_out_views_of_the_bucket(tmp_path, monkeypatch):
    """The day verl's receiver copies on a CPU, this fails and the clone in `_update_weights` can go."""
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver, BucketedWeightSender

    monkeypatch.setattr(platform_manager, "_current_platform", CpuPlatform())
    zmq.Context.instance().setsockopt(zmq.RCVTIMEO, 20_000)  # an error on one side must not leave the other waiting
    handle, seen = f"ipc://{tmp_path}/socket", []
    sender = BucketedWeightSender(handle, bucket_size_mb=1, use_shm=True)
    weights = iter([("a", torch.ones(8)), ("b", torch.full((4,), 2.0))])
    thread = threading.Thread(target=lambda: asyncio.run(sender.async_send_weights(weights)))
    thread.start()
    receiver = BucketedWeightReceiver(handle, device=torch.device("cpu"), use_shm=True)

    def on_bucket(received, is_last):
        start = receiver.buffer.data_ptr()
        seen.extend(start <= tensor.data_ptr() < start + receiver.buffer.numel() for _name, tensor in received)
        received.clear()

    receiver.receive_weights(on_bucket)
    thread.join(timeout=30)
    assert seen == [True, True]


def test_the_extension_gives_vllm_tensors_of_its_own(monkeypatch):
    given = []
    take = lambda self, weights, peft_config, base_sync_done: given.extend(weights)  # noqa: E731
    monkeypatch.setattr(vllm_utils.vLLMColocateWorkerExtension, "_update_weights", take)
    bucket = torch.arange(4.0)
    extension = object.__new__(CpuColocateWorkerExtension)
    extension._update_weights([("w", bucket[:2])], peft_config=None, base_sync_done=True)
    bucket.zero_()
    assert [(name, tensor.tolist()) for name, tensor in given] == [("w", [0.0, 1.0])]
