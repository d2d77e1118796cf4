# SPDX-License-Identifier: Apache-2.0
"""Stage 1's configuration: the file's defaults are the method's, and every wrong key or value is named."""

from __future__ import annotations

from dataclasses import fields
from importlib.resources import files
from typing import Any

import pytest
from omegaconf import OmegaConf

from embedrl_verl.config.schema import EmbedderConfig, EmbedderTrainConfig
from embedrl_verl.data.files import write_json
from embedrl_verl.errors import ConfigError
from embedrl_verl.stage1.settings import ContrastiveConfig, load_stage1_config

REQUIRED = ("data.train_files=[x.parquet]", "embedrl.embedder.path=model", "contrastive.out=run")


def composed(*overrides: str) -> Any:
    base = OmegaConf.create(files("embedrl_verl.config").joinpath("embedder_trainer.yaml").read_text())
    return OmegaConf.merge(base, OmegaConf.from_dotlist([*REQUIRED, *overrides]))


def test_defaults_are_those_of_the_method():
    config = load_stage1_config(composed())
    train, run = config.embedder.train, config.contrastive
    assert (train.temperature, train.lr, train.lr_scheduler, train.warmup_steps) == (0.02, 1e-4, "cosine", 10)
    assert (train.lora_rank, train.lora_alpha, train.weight_decay) == (64, 128, 0.01)
    assert (run.batch_pairs, run.sub_batch_pairs, run.max_video_sub_batches, run.epochs) == (512, 256, 1, 2)
    assert config.data.tcot and train.symmetric and train.enable


def test_the_file_names_every_key_that_means_something_here():
    raw = OmegaConf.create(files("embedrl_verl.config").joinpath("embedder_trainer.yaml").read_text())
    train = {field.name for field in fields(EmbedderTrainConfig)}
    cotraining = {"every", "rollouts", "ema_decay", "anchor_files", "anchor_pairs", "max_anchor_drop", "seed"}
    assert set(raw.embedrl.embedder.train) == train - cotraining
    assert set(raw.contrastive) == {field.name for field in fields(ContrastiveConfig)}
    elsewhere = {"nnodes", "n_gpus_per_node", "tensor_model_parallel_size", "pipeline_model_parallel_size"}
    elsewhere |= {"backend", "server", "sentence"}  # who embeds for the reward
    assert set(raw.embedrl.embedder) == {field.name for field in fields(EmbedderConfig)} - elsewhere


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("contrastive.batch_pair=3", "contrastive has no key batch_pair"),
        ("contrastive.batch_pairs=1", "contrastive.batch_pairs must be greater than or equal to 2; got 1"),
        ("contrastive.batch_pairs=300", r"multiple of sub_batch_pairs \(256\); got 300"),
        ("contrastive.out=null", "contrastive.out must be a folder to write to"),
        ("contrastive.raw_share=1.5", "raw_share must be less than or equal to 1; got 1.5"),
        ("contrastive.source_weights.a=0", "source_weights.a must be greater than 0; got 0"),
        ("contrastive.source_weights.a=lots", "source_weights.a must be a valid number; got 'lots'"),
        ("data.train_files=[]", "data.train_files must be one or more parquet files"),
        ("data.embedrl.family=auto", "data.embedrl.family must name the family"),
        ("data.embedrl.famly=qwen2_vl", "data.embedrl has no key famly"),
        ("embedrl.embedder.train.matryoshka_dims=[0]", "matryoshka_dims.0 must be greater than or equal to 1; got 0"),
        ("embedrl.embedder.train.matryoshka_dims=8", "matryoshka_dims must be a list; got 8"),
        ("embedrl.embedder.strategy=megatron", "embedrl.embedder.strategy must be fsdp2"),
        ("embedrl.embedder.train.enable=False", "must be True in stage 1"),
        ("embedrl.embedder.train.ema_decay=0.9", "must be 0 in stage 1"),
        ("embedrl.embedder.train.lora_alpha=0", "lora_alpha must be positive with a lora_rank"),
        ("embedrl.reward.x=1", "embedrl has no key reward"),
        ("trainer.x=1", "unknown section trainer"),
    ],
)
def test_a_wrong_key_or_value_is_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_stage1_config(composed(override))


def test_without_a_media_root_it_is_that_of_the_data_cards(tmp_path):
    write_json(tmp_path / "data_card.json", {"media_root": "media"})
    files = f"data.train_files=[{tmp_path}]"
    assert load_stage1_config(composed(files)).data.media_root == str(tmp_path / "media")
    assert load_stage1_config(composed(files, "data.media_root=/other")).data.media_root == "/other"


def test_missing_files_are_told_with_their_keys(tmp_path):
    (tmp_path / "there.parquet").touch()
    config = load_stage1_config(
        composed(f"data.val_files={tmp_path / 'there.parquet'}", f"data.media_root={tmp_path / 'no'}")
    )
    assert config.missing_files() == [
        "data.train_files: no such file or data set folder: x.parquet",
        f"data.media_root: no such folder: {tmp_path / 'no'}",
    ]
