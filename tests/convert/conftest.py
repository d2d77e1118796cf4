# SPDX-License-Identifier: Apache-2.0
"""Small inputs and a shortcut to a conversion that the tests of `convert` share."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedrl_verl.convert.column_map import column_map
from embedrl_verl.convert.generic import GenericConverter
from embedrl_verl.convert.inputs import LocalRoot
from embedrl_verl.convert.job import JobOptions, run_conversion
from embedrl_verl.convert.sampling import Sampling

MAP = {
    "data_source": {"value": "own"},
    "query": {"text": "question", "images": "image"},
    "target": {"text": "answer"},
}
Convert = Callable[..., dict[str, Any]]
Draw = Callable[..., bytes]


@pytest.fixture
def draw() -> Draw:
    """`draw(seed, format="PNG", width=56, height=56, frames=1)`: bytes of an image of random pixels."""

    def make(seed: int = 0, format: str = "PNG", width: int = 56, height: int = 56, frames: int = 1) -> bytes:
        rng = np.random.default_rng(seed)
        images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(frames)]
        buffer = io.BytesIO()
        more = {"save_all": True, "append_images": images[1:]} if frames > 1 else {}
        images[0].save(buffer, format, **more)
        return buffer.getvalue()

    return make


def write_lines(path: Path, rows: list[Any]) -> Path:
    """A jsonl file; a row that is bytes is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def question(index: int, **more: Any) -> dict[str, Any]:
    return {"question": f"question {index}", "answer": f"answer {index}", "image": None, **more}


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """`convert(input, out="out", columns=MAP, caps={}, **JobOptions)`: data card of a conversion in this process."""

    def run(
        source: Path, out: str = "out", columns: dict[str, Any] | None = None, caps: Any = None, **options: Any
    ) -> dict[str, Any]:
        converter = GenericConverter(column_map(MAP if columns is None else columns, "test"))
        options = {"sampling": Sampling(caps or {}), "max_bad_share": 1.0, "shard_rows": 10, **options}
        return run_conversion(LocalRoot(source), converter, JobOptions(out=str(tmp_path / out), **options))

    return run


def rejected(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def files_below(folder: Path) -> dict[str, bytes]:
    """Content of every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
