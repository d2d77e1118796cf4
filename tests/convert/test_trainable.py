# SPDX-License-Identifier: Apache-2.0
"""The training data set takes the converted fixtures of all sources, with one media root, and leaves out no pair."""

from __future__ import annotations

from collections import Counter

from transformers import AutoProcessor

from embedrl_verl.data.dataset import TCoTDataset
from embedrl_verl.data.files import pair_files
from recipes.tiny_digits.models import build_tiny_model
from tests.convert.golden import ALL_SOURCES
from tests.convert.make_fixtures import write_all
from tests.convert.test_scripts import run

CALLS = {
    "mmeb": ("mmeb_train", ["--images-dir", "mmeb"]),
    "llava_hound": ("llava_hound", ["--question-lines", "3", "--frames-dir", "llava_hound/train_300k"]),
    "colpali": ("colpali_train", []),
    "colpali pages": ("colpali_train", ["--reading", "page"]),
    "visrag": ("visrag_train", []),
}


def test_all_26_data_sources_load_with_every_pair(tmp_path):
    roots = write_all(tmp_path / "fixtures", pairs=3)
    for name, (script, options) in CALLS.items():
        place = ["--media-root", str(tmp_path / "fixtures")]
        assert run(script, roots[name.split()[0]], tmp_path / name, *place, *options) == 0
    build_tiny_model(tmp_path / "model", seed=0)
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    limits = {"image_min_tokens": 1, "image_max_tokens": 16, "frame_min_tokens": 1, "frame_max_tokens": 16}
    config = {"media_root": str(tmp_path / "fixtures"), "max_prompt_length": 256}
    files = [str(file) for file in pair_files([tmp_path / name for name in CALLS])]
    embedrl = {"prompt_style": "compact", **limits}
    dataset = TCoTDataset(files, processor.tokenizer, {**config, "embedrl": embedrl}, processor)
    assert Counter(dataset.pair_sources) == dict.fromkeys(ALL_SOURCES, 3)
    assert not dataset.overlong
