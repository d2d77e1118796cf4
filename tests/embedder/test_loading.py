# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is loaded completely and read as its profile says, or not at all; one without `<emb>` can get it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedrl_verl.embedder import PROFILES, Embedder, EmbedInput, EmbedProcessor
from embedrl_verl.embedder.profiles import add_emb_token
from embedrl_verl.errors import ConfigError, EmbedderError
from recipes.tiny_digits.models import build_tiny_model
from tests.embedder.inputs import LIMITS, item, mixed_inputs, picture


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A tiny Qwen2-VL checkpoint without `<emb>`."""
    return build_tiny_model(tmp_path_factory.mktemp("bare") / "model", with_emb_token=False)


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """A copy of the tiny Qwen2-VL checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint("qwen2_vl"), tmp_path / "copy"))


def edit_weights(path: Path, edit) -> None:
    weights = load_file(path / "model.safetensors")
    edit(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def test_a_token_outside_the_embedding_matrix_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["vocab_size"] = 300
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(EmbedderError, match="has 300 rows"):
        EmbedProcessor.from_pretrained(copy)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "visual.merger.mlp.0.bias"])
def test_a_checkpoint_that_lacks_weights_is_refused(name, copy):
    edit_weights(copy, lambda weights: weights.pop(name))
    with pytest.raises(EmbedderError, match="1 weights are missing"):
        Embedder.from_pretrained(copy, limits=LIMITS["qwen2_vl"])


def test_weights_of_another_shape_are_refused(copy):
    edit_weights(copy, lambda weights: weights.update({"model.norm.weight": torch.ones(64)}))
    with pytest.raises(EmbedderError, match=r"norm\.weight|cannot be loaded"):
        Embedder.from_pretrained(copy, limits=LIMITS["qwen2_vl"])


def test_a_checkpoint_without_output_matrix_embeds_all_the_same(copy, embedder):
    edit_weights(copy, lambda weights: weights.pop("lm_head.weight"))
    inputs = mixed_inputs(4)
    vectors = Embedder.from_pretrained(copy, limits=LIMITS["qwen2_vl"]).embed(inputs)
    assert torch.equal(vectors, embedder("qwen2_vl").embed(inputs))


def test_the_weights_in_use_are_those_of_the_file(checkpoint, embedder):
    """AutoModel would leave the language part of this checkpoint newly initialised."""
    stored = load_file(checkpoint("qwen2_vl") / "model.safetensors")
    inner = embedder("qwen2_vl").model.model
    assert torch.equal(inner.language_model.embed_tokens.weight, stored["model.embed_tokens.weight"])
    assert torch.equal(inner.language_model.layers[1].mlp.up_proj.weight, stored["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(inner.visual.patch_embed.proj.weight, stored["visual.patch_embed.proj.weight"])


def test_last_token_profiles_embed_with_a_checkpoint_that_has_no_embedding_token(tmp_path):
    for family, names in {"qwen2_vl": ("gme", "vlm2vec_v2"), "qwen3_vl": ("qwen3_vl_embedding",)}.items():
        path = build_tiny_model(tmp_path / family, family=family, with_emb_token=False)
        for name in names:
            embedder = Embedder.from_pretrained(path, profile=name, limits=LIMITS[family])
            assert embedder.processor.profile is PROFILES[name]
            vectors = embedder.embed(mixed_inputs(8))
            assert (vectors - embedder.embed(mixed_inputs(8), batch_size=1)).abs().max() < 1e-5
            assert torch.pdist(vectors).min() > 1e-4


@pytest.mark.parametrize(
    ("place", "profile", "message"),
    [
        ("bare", "auto", "needs the token <emb> in the tokenizer"),
        ("bare", "embed_rl", "reads the embedding at the token <emb>.*embedrl add-emb"),
        ("qwen3", "gme", "profile gme is for qwen2_vl; this checkpoint is qwen3_vl"),
        ("qwen3", "bge", "must be auto or one of embed_rl"),
        ("nothing", "embed_rl", "cannot be loaded"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_as_the_profile_says_is_refused(
    place, profile, message, bare, checkpoint, tmp_path
):
    path = {"bare": bare, "qwen3": checkpoint("qwen3_vl"), "nothing": tmp_path}[place]
    with pytest.raises(ConfigError if profile == "bge" else EmbedderError, match=message):
        Embedder.from_pretrained(path, profile=profile)


def test_a_copy_with_the_token_embeds_and_keeps_every_other_weight(bare, tmp_path):
    number = add_emb_token(bare, tmp_path / "out")
    made = Embedder.from_pretrained(tmp_path / "out", limits=LIMITS["qwen2_vl"])
    row = made.processor.encode(EmbedInput(item("a digit", (picture(0),))))
    assert int(row.input_ids[-1]) == number and made.embed_encoded([row]).isfinite().all()
    before = Embedder.from_pretrained(bare, profile="vlm2vec_v2", limits=LIMITS["qwen2_vl"]).model.state_dict()
    for name, value in made.model.state_dict().items():
        if "embed_tokens" in name:
            torch.testing.assert_close(value[number], before[name][:number].mean(dim=0))
            assert torch.equal(value[:number], before[name][:number])
        elif value.shape == before[name].shape:
            assert torch.equal(value, before[name]), name


def test_a_checkpoint_that_has_the_token_and_a_folder_in_use_are_refused(bare, checkpoint, tmp_path):
    with pytest.raises(EmbedderError, match="has <emb> already"):
        add_emb_token(checkpoint(), tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(EmbedderError, match="must be empty or not exist"):
        add_emb_token(bare, tmp_path)
