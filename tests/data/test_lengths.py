# SPDX-License-Identifier: Apache-2.0
"""A prompt's length is that of the rollout's own code, which runs once for prompts that differ in pixels only."""

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
    return PromptMeter.from_pretrained(str(model), "auto")


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


def count(meter, text="Read it.", size=(56, 56), colour="red"):
    content = [{"type": "image", "image": f"{colour}.png"}, {"type": "text", "text": text}]
    return meter.count([{"role": "user", "content": content}], [Image.new("RGB", size, colour)], None)


def test_prompts_are_measured_once_for_all_pixels(meter, measured):
    first = count(meter)
    assert count(meter, colour="blue") == first and measured == [first]


def test_other_words_sizes_and_numbers_of_media_are_measured(meter, measured):
    counts = [
        count(meter),
        count(meter, size=(84, 56)),
        count(meter, size=(56, 84)),
        count(meter, "Read it aloud, please."),
    ]
    counts += [
        meter.count([{"role": "user", "content": text}], None, None) for text in ("Read it.", "Read it aloud, please.")
    ]
    assert counts == measured, "each one is measured"
    assert counts[1] == counts[2] == counts[0] + 2 and len(set(counts)) == 5


def test_clips_of_other_lengths_and_times_are_measured(meter, measured):
    prompt = [{"role": "user", "content": [{"type": "video", "video": "a.mp4", "fps": 2.0}]}]

    def clip(frames, fps, colour=0):
        metadata = {"fps": fps, "frames_indices": list(range(frames)), "total_num_frames": frames}
        return [(torch.full((frames, 3, 56, 56), colour, dtype=torch.uint8), metadata)]

    for clips in (clip(2, 2.0), clip(4, 2.0), clip(2, 1.0)):
        assert meter.count(prompt, None, clips) == measured[-1]
    assert len(measured) == 3 and measured[0] < measured[1]
    assert meter.count(prompt, None, clip(4, 2.0, colour=9)) == measured[1] and len(measured) == 3
