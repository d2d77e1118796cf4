# SPDX-License-Identifier: Apache-2.0
"""A resumed run keeps the Embedder that rewarded it so far."""

import dataclasses

import pytest

from embedrl_verl.config.schema import EmbedderConfig
from embedrl_verl.errors import ConfigError
from embedrl_verl.trainer.checkpoint import RECORD, check_embedder_record, write_embedder_record


@pytest.fixture
def embedder(tmp_path):
    folder = tmp_path / "embedder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    return EmbedderConfig(path=str(folder))


def test_the_same_embedder_passes_also_from_another_place(tmp_path, embedder):
    step = tmp_path / "global_step_3"
    write_embedder_record(str(step), embedder)
    moved = tmp_path / "moved"
    (tmp_path / "embedder").rename(moved)
    check_embedder_record(str(step), dataclasses.replace(embedder, path=str(moved), max_tokens_per_gpu=7))
    assert [file.name for file in step.iterdir()] == [RECORD]


def test_other_weights_or_settings_are_refused(tmp_path, embedder):
    step = tmp_path / "global_step_3"
    write_embedder_record(str(step), embedder)
    with pytest.raises(ConfigError, match="same Embedder"):
        check_embedder_record(str(step), dataclasses.replace(embedder, image_max_tokens=256))
    (tmp_path / "embedder" / "model.safetensors").write_bytes(b"changed")
    with pytest.raises(ConfigError, match="same Embedder"):
        check_embedder_record(str(step), embedder)


def test_a_checkpoint_without_record_is_refused(tmp_path, embedder):
    with pytest.raises(ConfigError, match="not written by an EG-RL trainer"):
        check_embedder_record(str(tmp_path), embedder)
