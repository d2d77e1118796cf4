# SPDX-License-Identifier: Apache-2.0
"""A prompt's length is that of the rollout's own code, which runs once for prompts that differ in pixels only."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from embedrl_verl.data.lengths import PromptMeter
from recipes.tiny_digits.models import build_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def meter(model):
    from verl.utils.tokenizer import hf_processor, hf_tokenizer

    return PromptMeter(hf_tokenizer(str(model)), hf_processor(str(model)), "qwen2_vl", {})


@pytest.fixture
def measured(meter, monkeypatch):
    """The lengths that the rollout's code has given."""
    lengths = []
    build = meter._builder.build_initial_tokens

    def remember(*args, **kwargs):
        ids = build(*args, **kwargs)
        lengths.append(len(ids))
        return ids

    monkeypatch.setattr(meter._builder, "build_initial_tokens", remember)
    return lengths


def image_prompt(name: str, text: str = "Read it."):
    return [{"role": "user", "content": [{"type": "image", "image": name}, {"type": "text", "text": text}]}]


def picture(width: int, height: int, colour: str = "red") -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def test_other_pixels_are_not_measured_again(meter, measured):
    first = meter.count(image_prompt("a.png"), [picture(56, 56)], None)
    assert meter.count(image_prompt("b.png"), [picture(56, 56, "blue")], None) == first
    assert measured == [first]


def test_other_words_sizes_and_numbers_of_media_are(meter, measured):
    counts = [
        meter.count(image_prompt("a.png"), [picture(56, 56)], None),
        meter.count(image_prompt("a.png"), [picture(84, 56)], None),
        meter.count(image_prompt("a.png"), [picture(56, 84)], None),
        meter.count(image_prompt("a.png", "Read it aloud, please."), [picture(56, 56)], None),
        meter.count([{"role": "user", "content": "Read it."}], None, None),
        meter.count([{"role": "user", "content": "Read it aloud, please."}], None, None),
    ]
    assert counts == measured, "each one is measured"
    assert counts[1] == counts[2] == counts[0] + 2 and len(set(counts)) == 5


def test_clips_of_other_lengths_and_times_are(meter, measured):
    prompt = [{"role": "user", "content": [{"type": "video", "video": "a.mp4", "fps": 2.0}]}]

    def clip(frames: int, fps: float, colour: int = 0):
        metadata = {"fps": fps, "frames_indices": list(range(frames)), "total_num_frames": frames}
        return [(torch.full((frames, 3, 56, 56), colour, dtype=torch.uint8), metadata)]

    for clips in (clip(2, 2.0), clip(4, 2.0), clip(2, 1.0)):
        assert meter.count(prompt, None, clips) == measured[-1]
    assert len(measured) == 3 and measured[0] < measured[1]
    assert meter.count(prompt, None, clip(4, 2.0, colour=9)) == measured[1] and len(measured) == 3
