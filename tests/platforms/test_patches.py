# SPDX-License-Identifier: Apache-2.0
"""Each change of upstream does its work, refuses another release, and is still needed."""

import asyncio
import inspect
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zmq
from verl.plugin.platform import platform_manager

vllm = pytest.importorskip("vllm")

from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import (  # noqa: E402
    BucketedWeightReceiver,
    BucketedWeightSender,
)
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension  # noqa: E402
from vllm.model_executor.layers import utils  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # noqa: E402

from embedrl_verl.errors import PluginError  # noqa: E402
from embedrl_verl.platforms.cpu import CpuPlatform  # noqa: E402
from embedrl_verl.platforms.patches import keep_cpu_linear_weights, rewind_cpu_generators  # noqa: E402
from embedrl_verl.platforms.vllm_worker import CpuColocateWorkerExtension  # noqa: E402

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Undoes a patch after the test."""
    current_platform.import_kernels()
    monkeypatch.setattr(GPUModelRunner, "_bookkeeping_sync", GPUModelRunner._bookkeeping_sync)
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", utils.dispatch_cpu_unquantized_gemm)


def linear() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(64, 64, bias=False).requires_grad_(False)


def test_upstream_still_empties_packed_weights():
    """The day vLLM keeps them (or offers a switch), this fails and the patch can go."""
    layer = linear()
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert layer.weight.numel() == 0


def test_weights_can_be_loaded_again_after_packing():
    keep_cpu_linear_weights()
    keep_cpu_linear_weights()
    layer, x = linear(), torch.randn(3, 64)
    for _step in range(2):
        utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
        torch.testing.assert_close(layer.cpu_linear(x, layer.weight, None), x @ layer.weight.T)
        layer.weight.data.copy_(torch.randn(64, 64))


def test_another_vllm_is_refused(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.25.0")
    with pytest.raises(PluginError, match="keep_cpu_linear_weights is written for vllm"):
        keep_cpu_linear_weights()


def test_upstream_still_moves_an_offset_that_cpu_generators_do_not_have():
    """The day vLLM sets generators back in another way, this fails and the patch can go."""
    assert "gen.set_offset(gen.get_offset() - 4)" in inspect.getsource(GPUModelRunner._bookkeeping_sync)
    with pytest.raises(RuntimeError, match="does not use offset"):
        torch.Generator().get_offset()


class _Runner:
    """Two requests with seeds in vLLM's model runner; each step draws a number for each, and some are thrown away."""

    def __init__(self):
        self.requests = {name: SimpleNamespace() for name in "ab"}
        generators = {index: torch.Generator().manual_seed(index) for index in range(2)}
        self.input_batch = SimpleNamespace(num_reqs=2, req_ids=["a", "b"], generators=generators)
        self.discard_request_mask = SimpleNamespace(np=np.zeros(4, dtype=bool))

    def step(self, *discarded):
        self.discard_request_mask.np[:2] = [index in discarded for index in range(2)]
        drawn = [torch.rand(3, generator=self.input_batch.generators[index]).tolist() for index in range(2)]
        GPUModelRunner._bookkeeping_sync(self)
        return drawn


def test_a_draw_that_is_thrown_away_changes_nothing(monkeypatch):
    """Before the first token, and after some (a request that was pushed out and comes back)."""

    def as_upstream(self):
        for index in np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0]:
            generator = self.input_batch.generators.get(int(index))
            if generator is not None:
                generator.set_offset(generator.get_offset() - 4)

    monkeypatch.setattr(GPUModelRunner, "_bookkeeping_sync", as_upstream)
    rewind_cpu_generators()
    rewind_cpu_generators()
    plain, rewound = _Runner(), _Runner()
    expected = [plain.step() for _ in range(3)]
    rewound.step(0, 1)
    assert rewound.step(1)[0] == expected[0][0]
    assert rewound.step(0)[1] == expected[0][1]
    assert rewound.step() == expected[1]
    rewound.step(0, 1)
    assert rewound.step() == expected[2]
    assert set(rewound.input_batch.generators) == {0, 1}


def test_upstream_still_hands_out_views_of_the_bucket(tmp_path, monkeypatch):
    """The day verl's receiver copies on a CPU, this fails and the clone in `_update_weights` can go."""
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
    monkeypatch.setattr(
        vLLMColocateWorkerExtension,
        "_update_weights",
        lambda self, weights, peft_config, base_sync_done: given.extend(weights),
    )
    bucket = torch.arange(4.0)
    extension = object.__new__(CpuColocateWorkerExtension)
    extension._update_weights([("w", bucket[:2])], peft_config=None, base_sync_done=True)
    bucket.zero_()
    assert [(name, tensor.tolist()) for name, tensor in given] == [("w", [0.0, 1.0])]
