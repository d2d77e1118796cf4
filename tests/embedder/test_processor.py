# SPDX-License-Identifier: Apache-2.0
"""Encoding: the same tokens and pixels as the checkpoint's own processor, sizes fixed once, cuts in item text only."""

from __future__ import annotations

import dataclasses
import re
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer

from embedrl_verl.data.media import MediaLimits, smart_resize
from embedrl_verl.data.video import FrameTimes, list_times
from embedrl_verl.embedder import EmbedInput, EmbedProcessor
from embedrl_verl.errors import EmbedderError
from embedrl_verl.tcot import parse_tcot
from tests.embedder.inputs import LIMITS, TCOT, item, mixed_inputs, picture


def reference(embedder, prepared):
    """What the checkpoint's own Hugging Face processor makes of the same prompt and media."""
    processor = AutoProcessor.from_pretrained(embedder.model.name_or_path)
    media = {}
    if prepared.images:
        media["images"] = list(prepared.images)
    if prepared.videos:
        media["videos"] = [frames for frames, _ in prepared.videos]
        media["video_metadata"] = [times.metadata() for _, times in prepared.videos]
    return processor(text=[prepared.prompt], do_resize=False, do_sample_frames=False, return_tensors="pt", **media)


def test_tokens_and_pixels_are_bit_for_bit_those_of_the_checkpoints_own_processor(each_embedder):
    for one in mixed_inputs(12):
        encoded = each_embedder.processor.encode(one)
        expected = reference(each_embedder, each_embedder.processor.prepare(one))
        assert encoded.input_ids.tolist() == expected["input_ids"][0].tolist()
        for key, value in encoded.multi_modal_inputs.items():
            assert torch.equal(value, expected[key].to(value.dtype)), key
        assert {"pixel_values", "pixel_values_videos"} & set(expected) == {
            key for key in encoded.multi_modal_inputs if key.startswith("pixel")
        }


def test_positions_are_those_of_transformers_where_it_follows_the_original_rule(each_embedder):
    """Images, and all media of Qwen3-VL; transformers 5.9 differs from the original rule for other videos."""
    model = each_embedder.model
    for one in mixed_inputs(12):
        encoded = each_embedder.processor.encode(one)
        if one.item.frames and model.config.model_type != "qwen3_vl":
            continue
        expected = reference(each_embedder, each_embedder.processor.prepare(one))
        grids = {key: expected[key] for key in ("image_grid_thw", "video_grid_thw") if key in expected}
        positions, _ = model.model.get_rope_index(expected["input_ids"], expected["mm_token_type_ids"], **grids)
        assert torch.equal(encoded.position_ids[1:], positions[:, 0])
        assert encoded.position_ids[0].tolist() == list(range(len(encoded)))


@pytest.mark.parametrize(
    ("family", "times"),
    [("qwen2_vl", [0, 1]), ("qwen2_5_vl", [0, 2])],
    ids=["counts patches", "counts 4 positions a second at 2 frames in half a second"],
)
def test_a_video_advances_time_by_patch_and_the_text_goes_on_behind_its_largest_position(family, times, embedder):
    processor = embedder(family).processor
    frames = tuple(picture(k, 28, 28) for k in range(4))
    encoded = processor.encode(EmbedInput(item("a", frames=frames, fps=4.0)))
    pads = (encoded.input_ids == processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")).nonzero().flatten()
    start = int(pads[0])
    assert encoded.position_ids[1, pads].tolist() == [start + time for time in times]
    assert encoded.position_ids[2:, pads].tolist() == [[start, start]] * 2
    behind = start + times[-1] + 1
    assert encoded.position_ids[1:, pads[-1] + 1].tolist() == [behind] * 3


@pytest.mark.parametrize(
    ("times", "written"),
    [
        (FrameTimes(30.0, (0, 43, 85, 128, 171, 214, 256, 299), 300), ["0.7", "3.5", "6.4", "9.2"]),
        (FrameTimes(1000.0, (0, 400, 9000), 9900), ["0.2", "9.0"]),  # the last frame is repeated
        (list_times(2.0, 4), ["0.2", "1.2"]),
        (list_times(1.0, 9, (0, 3, 5, 8)), ["1.5", "6.5"]),
    ],
    ids=["ten seconds, first to last", "uneven and odd", "a list", "drawn from a list"],
)
def test_qwen3_vl_is_told_the_true_times_of_frames(embedder, times, written):
    processor = embedder("qwen3_vl").processor
    clip = item("a", frames=tuple(picture(k, 64, 64) for k in range(len(times.indices))))
    ids = processor.encode(EmbedInput(replace(clip, times=times))).input_ids
    assert re.findall(r"<([\d.]+) seconds>", processor.tokenizer.decode(ids)) == written


@pytest.mark.parametrize(
    ("times", "steps"),
    [
        (list_times(0.5, 8), [0, 16, 32, 48]),
        (FrameTimes(30.0, (0, 43, 85, 128, 171, 214, 256, 299), 300), [0, 10, 20, 30]),
        (list_times(3.0, 8, range(8)), [0, 2, 5, 8]),
    ],
    ids=["16 s", "10 s of 30 a second", "three a second"],
)
def test_qwen2_5_vl_reads_a_clip_at_its_own_rate(embedder, times, steps):
    processor = embedder("qwen2_5_vl").processor
    clip = item("a", frames=tuple(picture(k, 56, 28) for k in range(8)))
    encoded = processor.encode(EmbedInput(replace(clip, times=times)))
    pads = (encoded.input_ids == processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")).nonzero().flatten()
    assert sorted(set((encoded.position_ids[1, pads] - int(pads[0])).tolist())) == steps


def test_media_are_fitted_once_and_never_resized_again(each_embedder):
    side = each_embedder.processor.limits.token_side
    for size in ((300, 500), (17, 90), (side, side), (1000, 1000)):
        encoded = each_embedder.processor.encode(EmbedInput(item("a", (picture(0, *size),))))
        height, width = smart_resize(*size, token_side=side, min_tokens=1, max_tokens=64)
        grid = encoded.multi_modal_inputs["image_grid_thw"].tolist()
        assert grid == [[1, 2 * height // side, 2 * width // side]]


def test_an_odd_clip_repeats_its_last_frame_and_frames_take_the_first_ones_size(embedder):
    processor = embedder("qwen2_vl").processor
    clip = (picture(0, 28, 56), picture(1, 60, 60), picture(2))
    [(frames, _)] = processor.prepare(EmbedInput(item(frames=clip))).videos
    assert frames.shape == (4, 28, 56, 3)
    assert (frames[2] == frames[3]).all()


def test_item_text_is_cut_at_its_limit_and_nothing_else_is(checkpoint):
    limits = LIMITS["qwen2_vl"]
    processor = EmbedProcessor.from_pretrained(checkpoint("qwen2_vl"), limits=limits, max_text_tokens=10)
    long_tcot = parse_tcot(TCOT.replace("4 2", "4 2 " * 50))
    one = EmbedInput(item("digits " * 100, (picture(0),), instruction="Find " * 30), long_tcot)
    prompt = processor.prompt_text(one)
    assert prompt.count("digits") < 12 and prompt.count("Find") == 30 and prompt.count("4 2") == 50
    assert prompt.endswith("<emb>") and "Summarize the above" in prompt


def test_how_a_saved_tokenizer_cuts_and_pads_does_not_enter(checkpoint, tmp_path):
    path = shutil.copytree(checkpoint("qwen2_vl"), tmp_path / "saved")
    one = EmbedInput(item("digits " * 20, (picture(0),)))
    expected = EmbedProcessor.from_pretrained(path, limits=LIMITS["qwen2_vl"]).encode(one).input_ids
    saved = AutoTokenizer.from_pretrained(path)
    saved.backend_tokenizer.enable_truncation(8)
    saved.backend_tokenizer.enable_padding(length=200)
    saved.backend_tokenizer.save(str(path / "tokenizer.json"))
    found = EmbedProcessor.from_pretrained(path, limits=LIMITS["qwen2_vl"]).encode(one).input_ids
    assert found.tolist() == expected.tolist()


def test_an_overlong_prompt_loses_item_text_first_and_is_refused_when_that_is_not_enough(checkpoint):
    processor = EmbedProcessor.from_pretrained(checkpoint("qwen2_vl"), limits=LIMITS["qwen2_vl"])
    one = EmbedInput(item("7 " * 200, (picture(0),)), parse_tcot(TCOT))
    full = processor.encode(one)
    processor.max_length = len(full) - 150
    cut = processor.encode(one)
    assert processor.max_length - 5 <= len(cut) <= processor.max_length
    tail = processor.tokenizer(TCOT, add_special_tokens=False)["input_ids"]
    assert " ".join(map(str, tail)) in " ".join(map(str, cut.input_ids.tolist()))
    assert torch.equal(cut.multi_modal_inputs["pixel_values"], full.multi_modal_inputs["pixel_values"])
    processor.max_length = 40
    with pytest.raises(EmbedderError, match=r"at most 40 tokens; it has \d+"):
        processor.encode(one)


def test_limits_of_another_family_are_refused(checkpoint):
    with pytest.raises(EmbedderError, match="token_side must be 28"):
        EmbedProcessor.from_pretrained(checkpoint("qwen2_vl"), limits=MediaLimits(32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(0, dtype=torch.int64)}, "L >= 1"),
        ({"position_ids": torch.zeros(3, 5, dtype=torch.int64)}, "position_ids must be int64"),
        ({"input_ids": torch.zeros(5, dtype=torch.int32)}, "got torch.int32"),
        ({"multi_modal_inputs": {"image_grid_thw": torch.tensor([[1, 2, 2]])}}, "stands for 4 patches, .* has 0"),
    ],
)
def test_a_row_of_the_wrong_form_cannot_be_made(change, message, embedder):
    encoded = embedder("qwen2_vl").processor.encode(mixed_inputs(1)[0])
    with pytest.raises(EmbedderError, match=message):
        dataclasses.replace(encoded, **change)
