# SPDX-License-Identifier: Apache-2.0
"""A rollout engine says the same before and after it slept without its weights: log-probs of a tiny Qwen3-VL in vLLM.

Level-2 sleep drops everything; Qwen3-VL keeps tensors that are neither weights nor buffers, which a prompt without
pictures adds to its own (platforms.vllm_worker clears them in a run; here they are cleared in the same way, and what
they held is kept as a figure). Weights come back by vLLM's own reload, not in verl's buckets. Needs vLLM.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

from gpu_check.stage import Figures, need, need_cuda


def run(device: str, figures: Figures) -> None:
    """The stage."""
    need_cuda(device)
    need("numpy", "PIL", "transformers", "vllm", "verl")
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # clear_deepstack goes to the engine's process
    import numpy as np
    from PIL import Image
    from vllm import LLM, SamplingParams

    from embedrl_verl.platforms.vllm_worker import clear_deepstack
    from recipes.tiny_digits.models import build_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        build_tiny_model(folder, family="qwen3_vl")
        llm = LLM(folder, enable_sleep_mode=True, gpu_memory_utilization=0.3, max_model_len=2048, enforce_eager=True)
        pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
        picture: Any = {
            "prompt": "<|vision_start|><|image_pad|><|vision_end|> what is it?",
            "multi_modal_data": {"image": Image.fromarray(pixels)},
        }
        prompts = {
            "picture": picture,
            "text": {"prompt": "here is a word and one more " * 30},
        }  # longer than the picture's
        settings = SamplingParams(temperature=0, max_tokens=16, logprobs=1, ignore_eos=True)

        def answers() -> dict[str, tuple[list[int], list[float]]]:
            found = {}
            for name, prompt in prompts.items():
                out = llm.generate([prompt], settings)[0].outputs[0]
                chosen = zip(out.logprobs, out.token_ids, strict=True)
                found[name] = (list(out.token_ids), [step[token].logprob for step, token in chosen])
            return found

        first = answers()
        for turn in range(2):
            llm.sleep(level=2)
            llm.wake_up(tags=["weights"])
            llm.collective_rpc("reload_weights")
            figures.values[f"sleep {turn + 1}: largest leftover"] = max(llm.apply_model(clear_deepstack))
            llm.wake_up(tags=["kv_cache"])
            for name, (tokens, log_probs) in answers().items():
                if tokens != first[name][0]:
                    figures.failed.append(f"after sleep {turn + 1}, {name}: {tokens} for {first[name][0]}")
                largest = max(abs(one - other) for one, other in zip(log_probs, first[name][1], strict=True))
                figures.keep(f"sleep {turn + 1}, {name}: log-prob difference", largest, at_most=1e-3)
