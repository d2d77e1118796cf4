# SPDX-License-Identifier: Apache-2.0
"""The weights of an export are those of the training, bit for bit, or there is no export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from embedrl_verl.errors import ConfigError, EmbedderError, ResourceError
from embedrl_verl.export import folder as folder_module
from embedrl_verl.export import weights
from embedrl_verl.export.folder import export_checkpoint


def expected_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "expected.pt", weights_only=True)


def assert_same_bits(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("ranks", "dtype"), [("1", "bfloat16"), ("2", "float32")])
def test_shards_of_1_and_2_ranks_come_out_bit_for_bit_in_their_dtype(ranks, dtype, run_copy, tmp_path):
    run = run_copy(ranks)
    file = run / "actor" / "huggingface" / "config.json"
    # verl writes the run's attention into config.json; this process may not know it.
    file.write_text(json.dumps({**json.loads(file.read_text()), "attn_implementation": "of_the_run"}))
    shards = {path: path.read_bytes() for path in run.rglob("*.pt")}
    written = export_checkpoint(run / "actor", tmp_path / "deep" / "out")
    assert (written.kind, written.dtype) == ("reasoner", dtype)
    assert_same_bits(written.folder, expected_of(run))
    config = json.loads((written.folder / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == dtype
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"]
    assert "attn_implementation" not in config and "_name_or_path" not in config
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert all(path.read_bytes() == content for path, content in shards.items())
    # With only huggingface weights, the same.
    for shard in (run / "actor").glob("*.pt"):
        shard.unlink()
    if ranks == "2":
        assert_same_bits(export_checkpoint(run / "actor", tmp_path / "out").folder, expected_of(run))


def test_a_tied_output_matrix_is_the_trained_embedding_after_loading(runs, tmp_path):
    written = export_checkpoint(runs / "tied" / "actor", tmp_path / "out")
    loaded, loading = AutoModelForImageTextToText.from_pretrained(written.folder, output_loading_info=True)
    expected = expected_of(runs / "tied")
    assert torch.equal(expected["lm_head.weight"], expected["model.language_model.embed_tokens.weight"])
    assert not any(loading.values()) and loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    found = loaded.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], one) for name, one in expected.items())


def test_a_lora_checkpoint_is_merged_as_peft_merges_it(runs, tmp_path):
    run, expected = runs / "lora", expected_of(runs / "lora")
    written = export_checkpoint(run / "actor", tmp_path / "out", keep_adapter=True, base_model="Qwen/Tiny")
    assert_same_bits(written.folder, expected)
    base = AutoModelForImageTextToText.from_pretrained(run / "base")
    changed = "model.language_model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(base.state_dict()[changed], expected[changed])
    adapted = PeftModel.from_pretrained(base, written.folder / "lora_adapter")
    assert adapted.peft_config["default"].base_model_name_or_path == "Qwen/Tiny"
    merged = adapted.merge_and_unload().state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    assert "A LoRA adapter (rank 5, alpha 6) is merged" in (written.folder / "README.md").read_text()


def test_an_adapter_saved_alone_is_merged_into_the_named_base_model(runs, tmp_path):
    run = runs / "lora"
    with pytest.raises(ConfigError, match="only the weights of a LoRA adapter .* --base-model"):
        export_checkpoint(run / "adapter_only", tmp_path / "out", kind="reasoner")
    written = export_checkpoint(run / "adapter_only", tmp_path / "out", kind="reasoner", base_model=str(run / "base"))
    assert_same_bits(written.folder, expected_of(run))


def _rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = torch.load(file, weights_only=True) if file.suffix == ".pt" else load_file(file)
    change(state)
    torch.save(state, file) if file.suffix == ".pt" else save_file(state, file)


def _half_of(state: dict[str, torch.Tensor]) -> None:
    del state[next(name for name in state if "q_proj.lora_B" in name)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda actor, shards: (actor / "lora_train_meta.json").unlink(), "must say r and lora_alpha"),
        (
            lambda actor, shards: (actor / "lora_train_meta.json").write_text('{"r": 8, "lora_alpha": 6}'),
            r"an adapter of rank 8 \(lora_train_meta.json\).*of another shape: \d+ \(.*lora_A",
        ),
        (lambda actor, shards: [_rewrite(one, _half_of) for one in shards], r"missing: 1 \(.*q_proj.lora_B"),
        (
            lambda actor, shards: [
                _rewrite(one, lambda state: state.update({"x.lora_A.two.weight": torch.zeros(1)})) for one in shards
            ],
            r"unknown: 1 \(x.lora_A.two.weight\)",
        ),
    ],
)
def test_an_adapter_that_cannot_be_scaled_or_is_not_whole_is_refused(change, message, run_copy, tmp_path):
    actor = run_copy("lora") / "actor"
    change(actor, list(actor.glob("*.pt")))
    with pytest.raises(ConfigError, match=message):
        export_checkpoint(actor, tmp_path / "out")


def test_keep_adapter_needs_an_adapter(saved_model, tmp_path):
    with pytest.raises(ConfigError, match="has no LoRA adapter to keep"):
        export_checkpoint(saved_model(), tmp_path / "out", keep_adapter=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, "2 ranks need 2 files; missing: model_world_size_2_rank_1.pt"),
        (
            lambda file: _rewrite(file, lambda state: state.update({n: t.to_local() for n, t in state.items()})),
            "must agree how it was cut; 1 hold it whole",
        ),
        (lambda file: _rewrite(file, lambda state: state.pop("lm_head.weight")), "0 and 1 differ in lm_head.weight"),
        (lambda file: file.write_bytes(file.read_bytes()[:1000]), "rank_1.pt cannot be read as saved tensors"),
        (lambda file: torch.save({"x": Path("x")}, file), "rank_1.pt cannot be read as saved tensors"),
        (lambda file: file.with_name("model_world_size_4_rank_0.pt").touch(), r"runs with \[2, 4\] ranks"),
    ],
)
def test_a_shard_that_is_missing_broken_or_of_another_run_is_refused(change, message, run_copy, tmp_path):
    actor = run_copy("2") / "actor"
    change(actor / "model_world_size_2_rank_1.pt")
    with pytest.raises(ConfigError, match=message):
        export_checkpoint(actor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_unknown_and_misshapen_weights_are_named_and_leave_nothing(model_copy, tmp_path):
    folder = model_copy()

    def change(state: dict[str, torch.Tensor]) -> None:
        del state["model.norm.weight"]
        state["model.extra"] = torch.zeros(1)
        state["lm_head.weight"] = state["lm_head.weight"][:10].clone()

    _rewrite(folder / "huggingface" / "model.safetensors", change)
    with pytest.raises(ConfigError) as refused:
        export_checkpoint(folder, tmp_path / "out")
    for part in (
        "those of Qwen2VLForConditionalGeneration",
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
    if not equal:
        with pytest.raises(ConfigError, match="lm_head.weight and model.language_model.embed_tokens.weight are one"):
            export_checkpoint(folder, tmp_path / "out")
        return
    file = folder / "huggingface" / "model.safetensors"
    _rewrite(file, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    names = load_file(export_checkpoint(folder, tmp_path / "out").folder / "model.safetensors").keys()
    assert "lm_head.weight" not in names and "model.language_model.embed_tokens.weight" in names


def test_large_models_are_written_in_parts_with_an_index(saved_model, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "MAX_SHARD_SIZE", "1MB")
    folder = export_checkpoint(saved_model(), tmp_path / "out").folder
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(folder.glob("*.safetensors"))) > 2
    before = load_file(saved_model() / "huggingface" / "model.safetensors")
    after = weights.read_files(folder)
    assert all(torch.equal(after[weights.module_name(name)], tensor) for name, tensor in before.items())
    save_file({"lm_head.weight": torch.zeros(1)}, folder / "more.safetensors")
    with pytest.raises(ConfigError, match="hold lm_head.weight twice"):
        weights.read_files(folder)


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
