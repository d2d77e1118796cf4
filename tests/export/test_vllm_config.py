# SPDX-License-Identifier: Apache-2.0
"""Plain `vllm serve EXPORT --runner pooling` pools as the Embedder does, and cuts vectors where it was trained to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vllm import PoolingParams
from vllm.config import ModelConfig

from embedrl_verl.export.folder import export_checkpoint


def exported(folder: Path, out: Path, **settings: object) -> Path:
    (folder / "training.json").write_text(json.dumps({"stage": "contrastive", "settings": settings}))
    return export_checkpoint(folder, out).folder


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_vllm_pools_the_last_token_at_length_one_without_being_told(family, model_copy, tmp_path):
    config = ModelConfig(model=str(exported(model_copy(family), tmp_path / "out")), runner="pooling")
    assert config.pooler_config is not None and config.pooler_config.seq_pooling_type == "LAST"
    assert config.pooler_config.use_activation and config.convert_type == "embed" and not config.is_matryoshka


@pytest.mark.parametrize(
    ("family", "dims", "lengths"),
    [
        ("qwen2_vl", [64, 32], [32, 64, 128]),
        ("qwen2_5_vl", [128], [128]),
        ("qwen3_vl", [1, 128, 100, 100], [1, 100, 128]),
        ("qwen3_vl", [], None),
    ],
)
def test_vectors_can_be_cut_to_the_lengths_that_were_trained_and_to_no_other(
    family, dims, lengths, model_copy, tmp_path
):
    out = exported(model_copy(family), tmp_path / "out", matryoshka_dims=dims)
    config = ModelConfig(model=str(out), runner="pooling")
    assert json.loads((out / "config.json").read_text()).get("matryoshka_dimensions") == lengths
    card = (out / "README.md").read_text()
    assert ("the first " in card) == (lengths not in (None, [128]))
    for number in {1, 32, 64, 100, 127, 128, *dims}:
        asked = PoolingParams(task="embed", dimensions=number)
        if lengths and number in lengths:
            asked.verify(config)
        else:
            with pytest.raises(ValueError, match="matryoshka"):
                asked.verify(config)
