# SPDX-License-Identifier: Apache-2.0
"""A request holds the row's prompt and pixels and nothing else; an answer without a usable vector is an error."""

from __future__ import annotations

import base64
import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from embedrl_verl.embedder import EmbedInput
from embedrl_verl.embedder.batching import NOT_FINITE
from embedrl_verl.embedder.served.command import prompt_template
from embedrl_verl.embedder.served.requests import (
    NO_VECTOR,
    NOT_NORMAL,
    OTHER_PROMPT,
    EmbedRequest,
    embed_request,
    read_vector,
)
from embedrl_verl.errors import EmbedderError
from tests.embedder.inputs import item, mixed_inputs, picture

KINDS = 12  # every combination of medium, T-CoT and evidence


def pixels(url: str) -> list[np.ndarray]:
    """The pictures of a data URL, one or a comma-separated list."""
    _, data = url.split(";base64,", 1)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in data.split(",")]


def parts(request: EmbedRequest, kind: str) -> list[dict]:
    return [part for message in request.payload["messages"] for part in message["content"] if part["type"] == kind]


def test_the_servers_template_renders_the_rows_prompt_and_the_tokens_are_the_workers(each_embedder):
    processor = each_embedder.processor
    template = prompt_template(processor)
    kinds = {"image_url": "image", "video_url": "video"}
    for one in mixed_inputs(KINDS):
        request = embed_request(processor, one)
        # vLLM hands media to the template as parts of the bare kind.
        messages = [
            {
                **message,
                "content": [{**part, "type": kinds.get(part["type"], part["type"])} for part in message["content"]],
            }
            for message in request.payload["messages"]
        ]
        (rendered,), _ = render_jinja_template([messages], chat_template=template)
        assert rendered == processor.prompt_text(one)
        assert torch.equal(request.input_ids, processor.encode(one).input_ids)


def test_pixels_arrive_as_the_model_reads_them(each_embedder):
    processor = each_embedder.processor
    seen = {"image": 0, "video": 0}
    for one in mixed_inputs(KINDS):
        request, prepared = embed_request(processor, one), processor.prepare(one)
        images = [pixels(part["image_url"]["url"])[0] for part in parts(request, "image_url")]
        assert len(images) == len(prepared.images)
        assert all(np.array_equal(sent, np.asarray(kept)) for sent, kept in zip(images, prepared.images, strict=True))
        for part, (frames, times) in zip(parts(request, "video_url"), prepared.videos, strict=True):
            assert np.array_equal(np.stack(pixels(part["video_url"]["url"])), frames)
            assert request.payload["media_io_kwargs"] == {"video": {**times.metadata(), "num_frames": -1}}
        seen["image"] += len(images)
        seen["video"] += len(prepared.videos)
        json.dumps(request.payload)
    assert min(seen.values()) > 0


def test_item_text_is_cut_and_what_is_still_too_long_is_refused(embedder, monkeypatch):
    processor = embedder().processor
    long = EmbedInput(item("word " * 3000, instruction="Find it."))
    monkeypatch.setattr(processor, "max_text_tokens", 50)
    assert len(embed_request(processor, long).input_ids) < 120
    monkeypatch.setattr(processor, "max_length", 60)
    assert len(embed_request(processor, long).input_ids) <= 60
    with pytest.raises(EmbedderError, match="at most 60 tokens"):
        embed_request(processor, EmbedInput(item("", (picture(0, 448, 448),))))


def answer(values: object, tokens: int = 3) -> dict:
    return {"data": [{"embedding": values}], "usage": {"prompt_tokens": tokens}}


def coded(values: list[float]) -> str:
    return base64.b64encode(np.array(values, "<f4").tobytes()).decode()


REQUEST = EmbedRequest({}, torch.arange(3))


def test_a_vector_is_read_from_either_form_and_has_length_one():
    for values in (coded([0.6, 0.8]), [0.6, 0.8], [0.6 * 1.005, 0.8 * 1.005]):
        vector = read_vector(answer(values), REQUEST)
        assert torch.allclose(vector, torch.tensor([0.6, 0.8]), atol=1e-6)
        assert math.isclose(vector.norm().item(), 1.0, abs_tol=1e-6)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (answer(coded([0.0, 0.0])), NOT_FINITE),
        (answer([0.0, 0.0]), NOT_FINITE),
        (answer(coded([math.nan, 1.0])), NOT_FINITE),
        (answer(coded([math.inf, 1.0])), NOT_FINITE),
        (answer([3.0, 4.0]), NOT_NORMAL),
        (answer([0.6, 0.8], tokens=4), OTHER_PROMPT),
        (answer([]), NO_VECTOR),
        (answer(""), NO_VECTOR),
        (answer(["a", "b"]), NO_VECTOR),
        (answer("AAA="), NO_VECTOR),
        (answer("!"), NO_VECTOR),
        ({"data": []}, NO_VECTOR),
        ({"error": "busy"}, NO_VECTOR),
        (None, NO_VECTOR),
    ],
)
def test_an_answer_without_a_usable_vector_is_an_error(given, reason):
    with pytest.raises(EmbedderError, match=f"^{reason}$"):
        read_vector(given, REQUEST)
