# SPDX-License-Identifier: Apache-2.0
"""Fitted media pass the server's image limits unchanged, and `embedrl serve-embedder` prints what runs."""

from __future__ import annotations

import json
import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as image_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as clip_resize

from embedrl_verl.cli import main
from embedrl_verl.data.media import MediaLimits, smart_resize
from embedrl_verl.embedder.served.command import PLAIN_INPUT

SIDE = 28
sides = st.integers(1, 6000)


@st.composite
def limits(draw: st.DrawFn) -> tuple[int, int]:
    low = draw(st.integers(1, 400))
    return low, draw(st.integers(low, 800))


@settings(max_examples=200)
@given(limits(), sides, sides)
def test_a_fitted_image_passes_the_servers_limits_unchanged(tokens, height, width):
    if max(height, width) > 200 * min(height, width):
        return
    low, high = tokens
    fitted = smart_resize(height, width, token_side=SIDE, min_tokens=low, max_tokens=high)
    if max(fitted) > 200 * min(fitted):  # the server refuses it: a row that fails, not another vector
        return
    most = MediaLimits(SIDE, low, high, low, high).most_tokens(is_frame=False) * SIDE**2
    assert image_resize(*fitted, factor=SIDE, min_pixels=SIDE**2, max_pixels=most) == fitted
    frames = 8
    assert clip_resize(frames, *fitted, factor=SIDE, min_pixels=SIDE**2, max_pixels=frames * most) == fitted


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_the_printed_command_holds_template_pooling_and_limits(family, checkpoint, tmp_path, capsys):
    template = tmp_path / "template.jinja"
    options = ["--dtype", "float32", "--device", "cpu", "--image-tokens", "4", "64", "--frame-tokens", "4", "16"]
    options += ["--max-model-len", "2048", "--port", "8123", "--vllm-arg=--max-num-seqs=8", "--template", str(template)]
    assert main(["serve-embedder", str(checkpoint(family)), *options, "--print"]) == 0
    words = shlex.split(capsys.readouterr().out.replace("\\\n", " "))
    assert words[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    value = {name: words[words.index(name) + 1] for name in words if name.startswith("--") and name != words[-1]}
    assert value["--model"] == str(checkpoint(family))
    assert json.loads(value["--pooler-config"])["pooling_type"] == "LAST"
    assert (value["--runner"], value["--convert"], value["--port"]) == ("pooling", "embed", "8123")
    assert (value["--max-model-len"], value["--chat-template"]) == ("2048", str(template))
    assert value["--middleware"] == PLAIN_INPUT
    size = json.loads(value["--mm-processor-kwargs"])["size"]
    assert size["longest_edge"] >= (8 * 16 if family == "qwen3_vl" else 64) * size["shortest_edge"]
    assert words[-1] == "--max-num-seqs=8"
    assert "<emb>" in template.read_text()


def test_a_wrong_value_is_refused_before_anything_is_written(checkpoint, tmp_path, capsys):
    template = tmp_path / "template.jinja"
    command = ["serve-embedder", str(checkpoint()), "--image-tokens", "64", "4", "--template", str(template), "--print"]
    assert main(command) == 2
    assert "image_max_tokens" in capsys.readouterr().err and not template.exists()
