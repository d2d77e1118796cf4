# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is loaded completely and read as its profile says, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedrl_verl.embedder import PROFILES, Embedder, EmbedProcessor, resolve_profile
from embedrl_verl.errors import EmbedderError
from recipes.tiny_digits.models import build_tiny_model
from tests.embedder.inputs import LIMITS, mixed_inputs


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """A copy of the tiny Qwen2-VL checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint("qwen2_vl"), tmp_path / "copy"))


def edit_weights(path: Path, edit) -> None:
    weights = load_file(path / "model.safetensors")
    edit(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("profile", ["auto", "embed_rl"])
def test_a_checkpoint_without_the_embedding_token_is_refused(profile, tmp_path):
    path = build_tiny_model(tmp_path / "reasoner", with_emb_token=False)
    with pytest.raises(EmbedderError, match="<emb>"):
        Embedder.from_pretrained(path, profile=profile)
    with pytest.raises(EmbedderError, match="<emb>"):
        EmbedProcessor.from_pretrained(path, profile)


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


def test_a_profile_for_other_families_and_an_unknown_profile_are_refused(checkpoint):
    with pytest.raises(EmbedderError, match="profile gme is for qwen2_vl; this checkpoint is qwen3_vl"):
        EmbedProcessor.from_pretrained(checkpoint("qwen3_vl"), "gme")
    with pytest.raises(EmbedderError, match="must be auto or one of embed_rl"):
        resolve_profile(checkpoint("qwen2_vl"), "bge")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(EmbedderError, match="cannot be loaded"):
        Embedder.from_pretrained(tmp_path, profile="embed_rl")


def test_last_token_profiles_embed_with_a_checkpoint_that_has_no_embedding_token(tmp_path):
    for family, names in {"qwen2_vl": ("gme", "vlm2vec_v2"), "qwen3_vl": ("qwen3_vl_embedding",)}.items():
        path = build_tiny_model(tmp_path / family, family=family, with_emb_token=False)
        for name in names:
            embedder = Embedder.from_pretrained(path, profile=name, limits=LIMITS[family])
            assert embedder.processor.profile is PROFILES[name]
            vectors = embedder.embed(mixed_inputs(8))
            assert (vectors - embedder.embed(mixed_inputs(8), batch_size=1)).abs().max() < 1e-5
            assert torch.pdist(vectors).min() > 1e-4
