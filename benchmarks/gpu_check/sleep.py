# SPDX-License-Identifier: Apache-2.0
"""A rollout engine says the same before and after it slept without its weights: log-probs of a tiny Qwen3-VL in vLLM.

Level-2 sleep drops everything; Qwen3-VL keeps tensors that are neither weights nor buffers. Needs vLLM.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
from PIL import Image

from gpu_check.stage import Figures, need, need_cuda


def run(device: str, figures: Figures) -> None:
    """The stage."""
    need_cuda(device)
    need("transformers", "vllm")
    from vllm import LLM, SamplingParams

    from embedrl_verl.tiny.models import build_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        build_tiny_model(folder, family="qwen3_vl")
        llm = LLM(folder, enable_sleep_mode=True, gpu_memory_utilization=0.3, max_model_len=2048, enforce_eager=True)
        pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
        prompt: Any = {
            "prompt": "<|vision_start|><|image_pad|><|vision_end|> what is it?",
            "multi_modal_data": {"image": Image.fromarray(pixels)},
        }
        settings = SamplingParams(temperature=0, max_tokens=16, logprobs=1, ignore_eos=True)

        def answer() -> tuple[list[int], list[float]]:
            out = llm.generate([prompt], settings)[0].outputs[0]
            chosen = zip(out.logprobs, out.token_ids, strict=True)
            return list(out.token_ids), [step[token].logprob for step, token in chosen]

        tokens, before = answer()
        for turn in range(2):
            llm.sleep(level=2)
            llm.wake_up(tags=["weights"])
            llm.collective_rpc("reload_weights")
            llm.wake_up(tags=["kv_cache"])
            again, after = answer()
            if again != tokens:
                figures.failed.append(f"after sleep {turn + 1} other tokens: {again} for {tokens}")
            largest = max(abs(one - other) for one, other in zip(before, after, strict=True))
            figures.keep(f"sleep {turn + 1}: log-prob difference", largest, at_most=1e-3)
