# SPDX-License-Identifier: Apache-2.0
"""A tiny pair that is loaded once, and the command line over it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from embedrl_verl import cli
from embedrl_verl.export.record import TrainingRecord, write_record
from embedrl_verl.model import EmbedRLModel
from recipes.tiny_digits.models import build_tiny_model
from tests.embedder.inputs import picture

LIMITS = [f"embedrl.embedder.{kind}_{end}" for kind in ("image", "frame") for end in ("min_tokens=4", "max_tokens=64")]
Pair = dict[str, Any]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `embedder` and `reasoner`."""
    folder = tmp_path_factory.mktemp("pair")
    build_tiny_model(folder / "embedder", seed=1)
    build_tiny_model(folder / "reasoner")
    settings = {"prompt_style": "compact", "image_min_tokens": 4, "image_max_tokens": 64, "max_response_length": 12}
    write_record(folder / "reasoner", TrainingRecord(stage="egrl", settings=settings))
    return folder


@pytest.fixture(scope="session")
def model(pair: Path) -> EmbedRLModel:
    return EmbedRLModel.from_pretrained(str(pair / "embedder"), str(pair / "reasoner"), settings=LIMITS, device="cpu")


def words(pair: Path, *, reasoner: bool = False) -> list[str]:
    """Options of a command with this pair."""
    found = ["--embedder", str(pair / "embedder"), "--device", "cpu"]
    return found + (["--reasoner", str(pair / "reasoner")] if reasoner else []) + ["--set", *LIMITS]


@pytest.fixture
def embed(pair: Path) -> Callable[..., int]:
    """`embed(input, out, *options)`: exit code of the command."""

    def run(given: Path, out: Path, *options: str, reasoner: bool = False) -> int:
        return cli.main(["embed", str(given), "--out", str(out), *options, *words(pair, reasoner=reasoner)])

    return run


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [row for part in sorted(out.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]


def write_corpus(folder: Path, count: int) -> Path:
    """Texts, every fourth with a picture."""
    folder.mkdir(exist_ok=True)
    lines = []
    for i in range(count):
        line = {"id": f"d{i}", "text": f"document {i} " + "word " * (i % 7)}
        if i % 4 == 0:
            picture(i).save(folder / f"{i}.png")
            line["image"] = f"{i}.png"
        lines.append(json.dumps(line) + "\n")
    (folder / "corpus.jsonl").write_text("".join(lines))
    return folder / "corpus.jsonl"
