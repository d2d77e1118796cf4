# SPDX-License-Identifier: Apache-2.0
"""The weights of an export are those of the training, bit for bit, or there is no export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedrl_verl.errors import ConfigError, EmbedderError, ResourceError
from embedrl_verl.export import weights
from embedrl_verl.export.folder import export_checkpoint
from embedrl_verl.export.lora import split_adapter

CONVOLUTION = "model.visual.patch_embed.proj.weight"


def expected_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "expected.pt", weights_only=True)


def assert_same_bits(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and same(name, found[name], tensor), name


def same(name: str, found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bits; peft merges a convolution's adapter by a convolution, which rounds otherwise."""
    return torch.equal(found, expected) or (name == CONVOLUTION and torch.allclose(found, expected, atol=1e-6))


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_shards_of_1_and_2_ranks_come_out_bit_for_bit_in_their_dtype(ranks, run_folder, tmp_path):
    run = run_folder(ranks)
    written = export_checkpoint(run / "actor", tmp_path / "deep" / "out")
    dtype = {"1": "bfloat16", "2": "float32"}[ranks]
    assert (written.kind, written.dtype) == ("reasoner", dtype)
    assert_same_bits(written.folder, expected_of(run))
    config = json.loads((written.folder / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == dtype
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"]
    assert "attn_implementation" not in config and "_name_or_path" not in config
    assert not [path for path in written.folder.parent.iterdir() if path != written.folder]


def test_a_tied_output_matrix_is_the_trained_embedding_after_loading(run_folder, tmp_path):
    from transformers import AutoModelForImageTextToText

    run = run_folder("tied")
    written = export_checkpoint(run / "actor", tmp_path / "out")
    loaded, loading = AutoModelForImageTextToText.from_pretrained(written.folder, output_loading_info=True)
    expected = expected_of(run)
    assert torch.equal(expected["lm_head.weight"], expected["model.language_model.embed_tokens.weight"])
    assert not any(loading.values()) and loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    found = loaded.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], one) for name, one in expected.items())


def test_a_checkpoint_whose_configuration_names_an_unknown_attention_is_exported(run_copy, tmp_path):
    """verl writes the run's attention into config.json; this process may not know it."""
    run = run_copy("1")
    file = run / "actor" / "huggingface" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attn_implementation": "of_the_run"}))
    written = export_checkpoint(run / "actor", tmp_path / "out")
    assert_same_bits(written.folder, expected_of(run))
    assert "of_the_run" not in (written.folder / "config.json").read_text()


def test_a_checkpoint_with_only_huggingface_weights_is_the_same(run_copy, tmp_path):
    run = run_copy("2")
    for shard in (run / "actor").glob("*.pt"):
        shard.unlink()
    written = export_checkpoint(run / "actor", tmp_path / "out")
    assert_same_bits(written.folder, expected_of(run))


def test_a_lora_checkpoint_is_merged_as_peft_merges_it(run_folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    run = run_folder("lora")
    written = export_checkpoint(run / "actor", tmp_path / "out", keep_adapter=True, base_model="Qwen/Tiny")
    assert_same_bits(written.folder, expected_of(run))
    base = AutoModelForImageTextToText.from_pretrained(run / "base")
    assert not torch.equal(
        base.model.language_model.layers[0].mlp.down_proj.weight,
        expected_of(run)["model.language_model.layers.0.mlp.down_proj.weight"],
    )
    adapted = PeftModel.from_pretrained(base, written.folder / "lora_adapter")
    assert adapted.peft_config["default"].base_model_name_or_path == "Qwen/Tiny"
    merged = adapted.merge_and_unload().state_dict()
    assert all(same(name, merged[name], tensor) for name, tensor in expected_of(run).items())
    assert "A LoRA adapter (rank 5, alpha 6) is merged" in (written.folder / "README.md").read_text()


def test_an_adapter_saved_alone_is_merged_into_the_named_base_model(run_folder, tmp_path):
    run = run_folder("lora")
    with pytest.raises(ConfigError, match="only the weights of a LoRA adapter .* --base-model"):
        export_checkpoint(run / "adapter_only", tmp_path / "out", kind="reasoner")
    written = export_checkpoint(run / "adapter_only", tmp_path / "out", kind="reasoner", base_model=str(run / "base"))
    assert_same_bits(written.folder, expected_of(run))


def test_an_adapter_without_its_scale_is_refused(run_copy, tmp_path):
    actor = run_copy("lora") / "actor"
    meta = actor / "lora_train_meta.json"
    meta.write_text('{"r": 8, "lora_alpha": 6}')
    with pytest.raises(ConfigError, match="r is 8, but .* has rank 5"):
        export_checkpoint(actor, tmp_path / "out")
    meta.unlink()
    with pytest.raises(ConfigError, match="lora_train_meta.json must say r and lora_alpha"):
        export_checkpoint(actor, tmp_path / "out")


def test_half_an_adapter_and_two_adapters_are_refused(tmp_path):
    low, high = torch.zeros(2, 4), torch.zeros(3, 2)
    with pytest.raises(ConfigError, match="lora_A and lora_B; x has only one"):
        split_adapter({"base_model.model.x.lora_A.default.weight": low}, tmp_path)
    names = [f"x.lora_{side}.{name}.weight" for name in ("one", "two") for side in "AB"]
    with pytest.raises(ConfigError, match="only one adapter can be merged; the checkpoint has one, two"):
        split_adapter({name: low if "_A" in name else high for name in names}, tmp_path)


def test_keep_adapter_needs_an_adapter(run_folder, tmp_path):
    with pytest.raises(ConfigError, match="has no LoRA adapter to keep"):
        export_checkpoint(run_folder("2") / "actor", tmp_path / "out", keep_adapter=True)
    assert not list(tmp_path.glob("*out*"))


def test_a_missing_rank_is_named(run_copy, tmp_path):
    actor = run_copy("2") / "actor"
    (actor / "model_world_size_2_rank_1.pt").unlink()
    with pytest.raises(ConfigError, match="2 ranks need 2 files; missing: model_world_size_2_rank_1.pt"):
        export_checkpoint(actor, tmp_path / "out")
    (actor / "fsdp_config.json").unlink()
    with pytest.raises(ConfigError, match="fsdp_config.json must hold the number of ranks"):
        export_checkpoint(actor, tmp_path / "out")


def test_a_shard_of_another_rank_or_run_is_refused(run_copy, tmp_path):
    actor = run_copy("2") / "actor"
    second = actor / "model_world_size_2_rank_1.pt"
    state = torch.load(second, weights_only=True)
    plain = {name: tensor.to_local() for name, tensor in state.items()}
    torch.save(plain, second)
    with pytest.raises(ConfigError, match="cut on rank 0, but whole on ranks \\[1\\]"):
        export_checkpoint(actor, tmp_path / "out")
    torch.save({name: value for name, value in state.items() if name != "lm_head.weight"}, second)
    with pytest.raises(ConfigError, match="ranks 0 and 1 differ in lm_head.weight"):
        export_checkpoint(actor, tmp_path / "out")
    second.write_bytes(second.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="rank_1.pt cannot be read as saved tensors"):
        export_checkpoint(actor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _change_weights(folder: Path, change) -> None:
    file = folder / "huggingface" / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


def test_missing_unknown_and_misshapen_weights_are_named_and_leave_nothing(model_copy, tmp_path):
    folder = model_copy()

    def change(state: dict[str, torch.Tensor]) -> None:
        del state["model.norm.weight"]
        state["model.extra"] = torch.zeros(1)
        state["lm_head.weight"] = state["lm_head.weight"][:10].clone()

    _change_weights(folder, change)
    with pytest.raises(ConfigError) as refused:
        export_checkpoint(folder, tmp_path / "out")
    for part in (
        "Qwen2VLForConditionalGeneration, all and no others",
        "missing: 1 (model.language_model.norm.weight)",
        "unknown: 1 (model.language_model.extra)",
        "of another shape: 1 (lm_head.weight)",
    ):
        assert part in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


@pytest.mark.parametrize("equal", [True, False])
def test_a_shared_weight_is_written_once_and_two_different_ones_are_refused(equal, model_copy, tmp_path):
    folder = model_copy()
    file = folder / "huggingface" / "config.json"
    config = json.loads(file.read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    file.write_text(json.dumps(config))
    if equal:
        _change_weights(
            folder, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()})
        )
        names = load_file(export_checkpoint(folder, tmp_path / "out").folder / "model.safetensors").keys()
        assert "lm_head.weight" not in names and "model.language_model.embed_tokens.weight" in names
    else:
        with pytest.raises(ConfigError, match="lm_head.weight and model.language_model.embed_tokens.weight are one"):
            export_checkpoint(folder, tmp_path / "out")


def test_large_models_are_written_in_parts_with_an_index(saved_model, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD_SIZE", "1MB")
    folder = export_checkpoint(saved_model(), tmp_path / "out").folder
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(folder.glob("*.safetensors"))) > 2
    before = load_file(saved_model() / "huggingface" / "model.safetensors")
    after = weights.read_files(folder)
    assert all(torch.equal(after[weights.module_name(name)], tensor) for name, tensor in before.items())


def test_a_megatron_checkpoint_needs_megatron_only_without_huggingface_weights(model_copy, tmp_path, monkeypatch):
    folder = model_copy()
    expected = load_file(folder / "huggingface" / "model.safetensors")
    (folder / "model" / "dist_ckpt").mkdir(parents=True)
    (folder / "huggingface").rename(folder / "model" / "huggingface")
    written = export_checkpoint(folder, tmp_path / "out")
    assert_same_bits(written.folder, {weights.module_name(name): tensor for name, tensor in expected.items()})
    (folder / "model" / "huggingface" / "model.safetensors").unlink()
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="megatron-core .* is not installed"):
        export_checkpoint(folder, tmp_path / "out2")


def test_an_embedder_without_emb_token_needs_another_profile(saved_model, tmp_path):
    folder = saved_model(with_emb_token=False)
    for profile in ("auto", "embed_rl"):
        with pytest.raises(EmbedderError, match="<emb>"):
            export_checkpoint(folder, tmp_path / "out", profile=profile)
    with pytest.raises(EmbedderError, match="for qwen3_vl; this checkpoint is qwen2_vl"):
        export_checkpoint(folder, tmp_path / "out", profile="qwen3_vl_embedding")
    assert not list(tmp_path.iterdir())
    assert export_checkpoint(folder, tmp_path / "out", profile="gme").kind == "embedder"
    assert 'profile="gme"' in (tmp_path / "out" / "README.md").read_text()
