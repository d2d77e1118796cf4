# SPDX-License-Identifier: Apache-2.0
"""The training data set takes the converted fixtures of all sources, with one media root, and leaves out no pair."""

from __future__ import annotations

from collections import Counter

from transformers import AutoProcessor

from data_preprocess.colpali_train import ColPaliTrain
from data_preprocess.llava_hound import LlavaHound
from data_preprocess.mmeb_train import MmebTrain
from data_preprocess.visrag_train import VisRagTrain
from embedrl_verl.convert.command import convert_main
from embedrl_verl.data.dataset import TCoTDataset
from embedrl_verl.data.files import pair_files
from recipes.tiny_digits.models import build_tiny_model
from tests.convert.golden import ALL_SOURCES
from tests.convert.make_fixtures import write_all

PAIRS = 3
CALLS = {
    "mmeb": (MmebTrain, "mmeb", ["--images-dir", "mmeb"]),
    "hound": (
        LlavaHound,
        "llava_hound",
        ["--question-lines", str(PAIRS), "--frames-dir", "llava_hound/train_300k"],
    ),
    "answers": (ColPaliTrain, "colpali", []),
    "pages": (ColPaliTrain, "colpali", ["--reading", "page"]),
    "visrag": (VisRagTrain, "visrag", []),
}


def test_all_26_data_sources_load_with_every_pair(tmp_path):
    roots = write_all(tmp_path / "fixtures", pairs=PAIRS)
    for name, (converter, fixture, options) in CALLS.items():
        places = {"--input": roots[fixture], "--out": tmp_path / name, "--media-root": tmp_path / "fixtures"}
        argv = [str(word) for place in places.items() for word in place] + ["--workers", "1", *options]
        assert convert_main(converter, name, argv) == 0
    model = tmp_path / "model"
    build_tiny_model(model, seed=0)
    processor = AutoProcessor.from_pretrained(model)
    limits = {"image_min_tokens": 1, "image_max_tokens": 16, "frame_min_tokens": 1, "frame_max_tokens": 16}
    config = {
        "media_root": str(tmp_path / "fixtures"),
        "max_prompt_length": 256,
        "embedrl": {"prompt_style": "compact", **limits},
    }
    files = [str(file) for file in pair_files([tmp_path / name for name in CALLS])]
    dataset = TCoTDataset(files, processor.tokenizer, config, processor)
    assert Counter(dataset.pair_sources) == dict.fromkeys(ALL_SOURCES, PAIRS)
    assert not dataset.overlong
