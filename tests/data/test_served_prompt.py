# SPDX-License-Identifier: Apache-2.0
"""vLLM expands a prompt to exactly the tokens that are counted here and that the actor is trained on.

Qwen3-VL is the family whose video prompts verl merges wrongly; `test_dataset.py` shows for the others, without vLLM,
that both ways agree. `python tests/data/test_served_prompt.py FOLDER` is the part that runs in a process of its own.
"""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.platforms.forkserver import python
from recipes.tiny_digits.environment import CPU_ENV
from recipes.tiny_digits.models import build_tiny_model

ENV = {**CPU_ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@pytest.mark.e2e
@pytest.mark.slow
def test_vllm_runs_the_prompt_that_is_counted(tmp_path):
    build_tiny_model(tmp_path / "model", family="qwen3_vl")
    for index in range(5):
        Image.new("RGB", (130, 90), (50 * index, 9, 99)).save(tmp_path / f"{index}.png")
    clip, odd = (Video(frames=tuple(f"{index}.png" for index in range(n)), fps=1.0) for n in (4, 5))
    records = [
        PairRecord("p", "s", "Find.", Item("a", images=("0.png", "1.png")), Item("b", images=("2.png",)), ""),
        PairRecord("v", "s", "Find.", Item("a", video=clip), Item(video=odd), ""),
    ]
    write_pairs(records, tmp_path / "pairs.parquet")
    command = [python(), __file__, str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | ENV, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    prompts = json.loads((tmp_path / "prompts.json").read_text())
    assert len(prompts) == 4
    for prompt in prompts:
        assert prompt["vllm"] == prompt["counted"]


def run_vllm(folder):
    """For every prompt the tokens that the length filter counts and those that vLLM ran. Runs in its own process."""
    from verl.utils.tokenizer import hf_processor, hf_tokenizer
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder
    from vllm import LLM, SamplingParams, TokensPrompt

    from embedrl_verl.data.dataset import TCoTDataset
    from embedrl_verl.data.lengths import served_prompt_ids

    model = str(folder / "model")
    tokenizer, processor = hf_tokenizer(model), hf_processor(model)
    limits = {"image_min_tokens": 1, "frame_min_tokens": 1, "frame_max_tokens": 20}
    config = {"media_root": str(folder), "max_prompt_length": 1024, "embedrl": {"prompt_style": "compact", **limits}}
    data = TCoTDataset(str(folder / "pairs.parquet"), tokenizer, config, processor)
    builder = create_continuous_token_builder(tokenizer, hf_model_type=data.family, processor=processor)
    llm = LLM(
        model, dtype="float32", enforce_eager=True, max_model_len=1024, limit_mm_per_prompt={"image": 4, "video": 1}
    )
    found = []
    for index in range(len(data)):
        messages = data[index]["raw_prompt"]
        images, videos, _ = asyncio.run(
            data.process_multi_modal_info(messages, processor.image_processor.patch_size, config)
        )
        media = {name: value for name, value in (("image", images), ("video", videos)) if value}
        prompt = TokensPrompt(prompt_token_ids=served_prompt_ids(messages, processor), multi_modal_data=media)
        (output,) = llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0.0), use_tqdm=False)
        counted = builder.build_initial_tokens(messages, images=images, videos=videos)
        found.append({"counted": list(counted), "vllm": list(output.prompt_token_ids or [])})
    return found


if __name__ == "__main__":
    target = Path(sys.argv[1])
    (target / "prompts.json").write_text(json.dumps(run_vllm(target)))
