# SPDX-License-Identifier: Apache-2.0
"""The policy that rolls out a clip and the policy that is trained on it stand at the same places in time.

vLLM's side is its own processor and its models' own positions, of the request that the agent loop sends; the actor's is
what verl's agent loop worker makes of the rollout. The Embedder's is in tests/embedder/test_processor.py.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from embedrl_verl.data.lengths import PromptMeter, served_prompt_ids
from embedrl_verl.data.media import MediaLimits
from embedrl_verl.data.prompts import load_prompt_media
from embedrl_verl.data.video import FrameTimes, list_times
from embedrl_verl.embedder.positions import bind_positions
from embedrl_verl.families import token_side
from embedrl_verl.trainer.agent_loop import _ClipClient
from recipes.tiny_digits.models import build_tiny_model

pytest.importorskip("vllm")
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SLOW = list_times(0.5, 8)  # 16 s
CLIPS = {
    "slow": (SLOW, (112, 56)),
    "ten seconds, first to last": (FrameTimes(30.0, (0, 43, 85, 128, 171, 214, 256, 299), 300), (112, 56)),
    "odd, and longer than it is wide": (list_times(2.0, 9), (28, 28)),
    "uneven": (FrameTimes(1000.0, (0, 33, 2900, 3011, 9000, 9400), 9900), (56, 84)),
    "one frame": (FrameTimes(24.0, (0,), 48), (56, 56)),
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    from verl.utils.tokenizer import hf_processor, hf_tokenizer
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY

    family = request.param
    path = str(build_tiny_model(tmp_path_factory.mktemp(family), family=family))
    processor = hf_processor(path)
    bind_positions(processor, family)
    config = ModelConfig(model=path, dtype="float32", limit_mm_per_prompt={"image": 4, "video": 4})
    served = MULTIMODAL_REGISTRY.create_processor(config)
    return SimpleNamespace(family=family, tokenizer=hf_tokenizer(path), processor=processor, served=served)


def picture(number, width, height):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prompt_of(model, clip, picture_too=False, extra=()):
    """(messages, images, videos, ids) as the agent loop has them; `clip`: (times, (width, height))."""
    times, size = clip
    frames = [picture(number, *size) for number in range(len(times.indices))]
    parts = [{"type": "text", "text": "Look."}]
    parts += [{"type": "image", "image": picture(99, 84, 56)}] * picture_too
    parts += [{"type": "video", "video": frames, "times": times}, {"type": "text", "text": "What happens here?"}]
    messages = [{"role": "user", "content": parts}]
    limits = MediaLimits(token_side(model.family), 1, 64, 1, 64, 64)
    images, videos = load_prompt_media(messages, limits, None)
    meter = PromptMeter(model.tokenizer, model.processor, model.family, {})
    ids = meter._builder.build_initial_tokens(messages, images=images, videos=videos, mm_inputs_out={})
    return messages, images, videos, [*ids, *extra]


def actor_positions(model, images, videos, ids):
    """(3, L), as verl's worker computes them for the actor."""
    from verl.experimental.agent_loop.agent_loop import AgentLoopWorker

    worker = SimpleNamespace(
        processor=model.processor, tokenizer=model.tokenizer, _get_mm_processor_kwargs=lambda audio=None: {}
    )
    media = {name: value for name, value in (("images", images), ("videos", videos)) if value}
    output, tokens = SimpleNamespace(multi_modal_data=media, mm_processor_kwargs=None), torch.tensor(ids)[None]
    inputs = AgentLoopWorker._compute_multi_modal_inputs(worker, output, tokens)
    found = AgentLoopWorker._compute_position_ids(worker, tokens, torch.ones_like(tokens), dict(inputs))
    assert found[0, 0].tolist() == list(range(len(ids)))
    return found[0, 1:]


def rollout_positions(model, messages, images, videos):
    """Tokens and (3, L), as vLLM makes them of the request."""
    from verl.workers.rollout.utils import qwen2_5_vl_dedup_image_tokens
    from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
    from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
    from vllm.multimodal.inputs import MultiModalFeatureSpec

    class Sent:
        async def generate(self, **kwargs):
            return kwargs

    ids = served_prompt_ids(messages, model.processor)
    given = {"prompt_ids": ids, "video_data": videos, "mm_processor_kwargs": {}}
    sent = asyncio.run(_ClipClient(Sent(), model.family, ids).generate(**given))
    media = {name: value for name, value in (("image", images), ("video", videos)) if value}
    found = model.served(
        prompt=qwen2_5_vl_dedup_image_tokens(sent["prompt_ids"], model.processor),
        mm_items=model.served.info.parse_mm_data(media),
        hf_processor_mm_kwargs=sent["mm_processor_kwargs"],
    )
    features = [
        MultiModalFeatureSpec(data, modality, "", place)
        for modality, places in found["mm_placeholders"].items()
        for data, place in zip(found["mm_kwargs"][modality], places, strict=True)
    ]
    own = Qwen3VLForConditionalGeneration if model.family == "qwen3_vl" else Qwen2VLForConditionalGeneration
    bound = SimpleNamespace(config=model.processor.config)
    for name in ("iter_mm_grid_thw", "_get_mrope_input_positions"):
        if hasattr(own, name):
            function = getattr(own, name)
            setattr(bound, name, function if name.startswith("_") else function.__get__(bound))
    tokens = list(found["prompt_token_ids"])
    return tokens, own.get_mrope_input_positions(bound, tokens, features)[0]


@pytest.mark.parametrize("picture_too", [False, True], ids=["alone", "behind a picture"])
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_rollout_and_actor_read_a_clip_at_the_same_positions(model, clip, picture_too):
    messages, images, videos, ids = prompt_of(model, clip, picture_too)
    tokens, rollout = rollout_positions(model, messages, images, videos)
    assert tokens == ids
    assert torch.equal(actor_positions(model, images, videos, ids), rollout)


def test_a_clips_time_is_that_of_its_real_rate(model):
    """16 s in 8 frames: Qwen2.5-VL (tiny) has 4 time steps a second, Qwen2-VL counts patches, Qwen3-VL writes times."""
    _, images, videos, ids = prompt_of(model, (SLOW, (112, 56)))
    positions = actor_positions(model, images, videos, ids)
    pads = torch.tensor(ids) == model.processor.video_token_id
    start = int(pads.nonzero()[0])
    times = sorted(set((positions[0, pads] - start).tolist()))
    if model.family == "qwen2_5_vl":
        assert times == [0, 16, 32, 48]
    elif model.family == "qwen2_vl":
        assert times == [0, 1, 2, 3]
    else:
        assert [f"<{t} seconds>" in model.tokenizer.decode(ids) for t in (1.0, 5.0, 9.0, 13.0)] == [True] * 4


def test_a_placeholder_that_the_policy_wrote_is_text(model):
    forged = [model.processor.video_token_id, model.processor.image_token_id, 5]
    _, images, videos, ids = prompt_of(model, CLIPS["slow"])
    before, after = (actor_positions(model, images, videos, one) for one in (ids, [*ids, *forged]))
    assert torch.equal(after[:, : len(ids)], before)
    assert torch.equal(after[:, len(ids) :], before[:, -1:] + torch.arange(1, 4))


def test_padding_moves_no_position(model):
    *_, ids = prompt_of(model, CLIPS["slow"])
    grid = torch.tensor([[4, 4, 8]])
    seconds = {"second_per_grid_ts": torch.tensor([4.0])} if model.family == "qwen2_5_vl" else {}
    tokens = torch.tensor([[0, 0, *ids]])
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    padded, _ = model.processor.get_rope_index(tokens, mask, video_grid_thw=grid, **seconds)
    plain, _ = model.processor.get_rope_index(tokens[:, 2:], mask[:, 2:], video_grid_thw=grid, **seconds)
    assert padded.shape == (3, 1, len(ids) + 2) and torch.equal(padded[:, :, 2:], plain)


def test_missing_placeholders_are_refused(model):
    *_, ids = prompt_of(model, CLIPS["slow"])
    short = [token for token in ids if token != model.processor.video_token_id]
    tokens = torch.tensor([short])
    with pytest.raises(ValueError, match="placeholders of its media"):
        model.processor.get_rope_index(
            tokens, torch.ones_like(tokens), video_grid_thw=torch.tensor([[4, 4, 8]]), second_per_grid_ts=[4.0]
        )
