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
from embedrl_verl.model import EmbedRLModel
from tests.embedder.inputs import picture
from tests.model.tiny_pair import LIMITS, make_pair

Pair = dict[str, Any]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `embedder` and `reasoner`."""
    return make_pair(tmp_path_factory.mktemp("pair"))


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
