# SPDX-License-Identifier: Apache-2.0
"""Small inputs and shortcuts to a conversion that the tests of `convert` share."""

from __future__ import annotations

import io
import json
import runpy
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_preprocess import colpali_train, llava_hound, mmeb_train, visrag_train
from data_preprocess.generic import Generic
from embedrl_verl.convert.converter import RawRow, Shard
from embedrl_verl.convert.job import JobOptions, run_conversion
from embedrl_verl.data.files import pair_files
from embedrl_verl.data.parquet import read_pairs
from embedrl_verl.data.schema import PairRecord
from tests.convert.make_fixtures import write_all

ROOT = Path(__file__).parents[2]
MAP = ("query.text=question", "query.images=image", "target.text=answer")
MMEB_SOURCES = tuple(mmeb_train.SOURCES.values())
OTHER_SOURCES = (*llava_hound.SOURCES.values(), *colpali_train.SOURCES.values(), visrag_train.SOURCE)
PAIRS = 6
Convert = Callable[..., dict[str, Any]]


@pytest.fixture(scope="package")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The fixtures of all public sources; name -> folder."""
    return write_all(tmp_path_factory.mktemp("fixtures"), pairs=PAIRS)


def run_script(script: str, root: Path, out: Path, *options: str) -> int:
    """Run a script of `data_preprocess` in this process; the exit code."""
    argv = [f"{script}.py", "--input", str(root), "--out", str(out), "--workers", "1", *options]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", argv)
        runpy.run_path(str(ROOT / "data_preprocess" / argv[0]), run_name="__main__")
    return int(ended.value.code or 0)


def one_row(values: dict[str, Any], source: str = "s", note: str = "", media_root: Path | None = None) -> RawRow:
    """A row as if it came from a file of its own."""
    return RawRow(Shard("rows.jsonl", source, note=note), 0, values, media_root)


def draw(seed: int = 0, format: str = "PNG", width: int = 56, height: int = 56, frames: int = 1) -> bytes:
    """Bytes of an image of random pixels."""
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(frames)]
    buffer = io.BytesIO()
    images[0].save(buffer, format, **({"save_all": True, "append_images": images[1:]} if frames > 1 else {}))
    return buffer.getvalue()


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """A jsonl file; a row that is bytes is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def question(index: int, **more: Any) -> dict[str, Any]:
    return {"question": f"question {index}", "answer": f"answer {index}", "image": None, **more}


def questions(numbers: Iterable[int], **more: Any) -> list[dict[str, Any]]:
    return [question(number, **more) for number in numbers]


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """`convert(input, out="out", *map, name="own", **JobOptions)`: card of a conversion in this process."""

    def run(source: Path, out: str = "out", *columns: str, name: str = "own", **options: Any) -> dict[str, Any]:
        given = {"max_bad_share": 1.0, "shard_rows": 10, "workers": 1, **options}
        converter = Generic(column=(*MAP, *columns), source=name)
        return run_conversion(converter, JobOptions(str(source), str(tmp_path / out), **given))

    return run


def records(folder: Path) -> list[PairRecord]:
    return [record for file in pair_files([folder]) for record in read_pairs(file)]


def rejected(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
