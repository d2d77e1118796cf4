# SPDX-License-Identifier: Apache-2.0
"""`<emb>` for a checkpoint that has none: it embeds, its other weights are untouched, and nothing is overwritten."""

from __future__ import annotations

import pytest
import torch

from embedrl_verl.embedder import Embedder, EmbedInput
from embedrl_verl.embedder.add_token import add_emb_token
from embedrl_verl.errors import EmbedderError
from recipes.tiny_digits.models import build_tiny_model
from tests.embedder.inputs import LIMITS, item, picture


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("bare") / "model", with_emb_token=False)


def test_the_copy_embeds_and_keeps_every_other_weight(bare, tmp_path):
    with pytest.raises(EmbedderError, match="needs the token <emb> in the tokenizer"):
        Embedder.from_pretrained(bare, limits=LIMITS["qwen2_vl"])
    number = add_emb_token(bare, tmp_path / "out")
    made = Embedder.from_pretrained(tmp_path / "out", limits=LIMITS["qwen2_vl"])
    row = made.processor.encode(EmbedInput(item("a digit", (picture(0),))))
    assert int(row.input_ids[-1]) == number
    assert made.embed_encoded([row]).isfinite().all()
    before = Embedder.from_pretrained(bare, profile="vlm2vec_v2", limits=LIMITS["qwen2_vl"]).model.state_dict()
    for name, value in made.model.state_dict().items():
        if "embed_tokens" in name:
            kept = torch.arange(len(value)) != number
            assert torch.equal(
                value[: len(before[name])][kept[: len(before[name])]], before[name][kept[: len(before[name])]]
            )
            torch.testing.assert_close(value[number], before[name][:number].mean(dim=0))
        elif value.shape == before[name].shape:
            assert torch.equal(value, before[name]), name


def test_a_checkpoint_that_has_it_and_a_folder_in_use_are_refused(bare, checkpoint, tmp_path):
    with pytest.raises(EmbedderError, match="has <emb> already"):
        add_emb_token(checkpoint(), tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(EmbedderError, match="must be empty or not exist"):
        add_emb_token(bare, tmp_path)
