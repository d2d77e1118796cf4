# SPDX-License-Identifier: Apache-2.0
"""A tiny model folder is complete, reproducible and reads text, images and video."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from embedrl_verl.errors import ConfigError
from embedrl_verl.families import FAMILIES, token_side
from recipes.tiny_digits.models import TCOT_TOKENS, build_tiny_model, build_tokenizer

TOKENIZER = build_tokenizer()


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",))))
def test_any_text_survives_encoding_and_decoding(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


def test_digits_are_one_token_each_and_tags_one_token() -> None:
    assert TOKENIZER.tokenize("30715") == list("30715")
    assert all(TOKENIZER.tokenize(tag) == [tag] for tag in TCOT_TOKENS)
    ids = TOKENIZER("<thinking>x</thinking><|im_end|>").input_ids
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "<thinking>x</thinking>"


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_loads_by_the_auto_classes_with_one_token_per_cell(family: str, tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model", family=family, seed=3)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == processor.tokenizer.get_vocab()
    assert 5e5 < sum(weight.numel() for weight in model.parameters()) < 1.2e6
    side = token_side(family)
    image = Image.effect_noise((4 * side, 2 * side), 60).convert("RGB")
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "Read."}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    batch = processor(text=[prompt], images=[image], videos=[[image] * 4], return_tensors="pt")
    ids = batch["input_ids"]
    assert (ids == model.config.image_token_id).sum() == 8 and (ids == model.config.video_token_id).sum() == 16
    with torch.no_grad():
        logits = model(**batch).logits
        image_moved = batch | {"pixel_values": batch["pixel_values"] + 0.1}
        assert not torch.equal(model(**image_moved).logits[0, -1], logits[0, -1]), "the image does not reach the output"
    assert torch.isfinite(logits).all()
    again = build_tiny_model(tmp_path / "again", family=family, seed=3)
    other = build_tiny_model(tmp_path / "other", family=family, seed=4)
    weights = (folder / "model.safetensors").read_bytes()
    assert (again / "model.safetensors").read_bytes() == weights != (other / "model.safetensors").read_bytes()


def test_wrong_sizes_are_refused_with_the_rule(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hidden_size must be a positive multiple of 64.*got 100"):
        build_tiny_model(tmp_path, hidden_size=100)
    with pytest.raises(ConfigError, match="family must be one of"):
        build_tiny_model(tmp_path, family="llava")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
