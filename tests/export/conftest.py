# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that verl's own manager saved on gloo ranks, made once a session, and copies of them to break."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from embedrl_verl.platforms.forkserver import python
from recipes.tiny_digits.models import build_tiny_model

SCRIPT = Path(__file__).with_name("save_shards.py")
RUNS = {
    "1": ["--ranks", "1", "--dtype", "bfloat16"],
    "2": ["--ranks", "2"],
    "tied": ["--ranks", "2"],
    "lora": ["--ranks", "2", "--lora"],
}


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`run_folder("1" | "2" | "tied" | "lora")`: what `save_shards.py` wrote on 1 (bfloat16) or 2 ranks."""
    root = tmp_path_factory.mktemp("runs")

    def make(name: str) -> Path:
        out = root / name
        if not (out / "expected.pt").exists():
            model = build_tiny_model(root / f"model of {name}", tied=name == "tied")
            done = subprocess.run(
                [python(), str(SCRIPT), str(model), str(out), *RUNS[name]],
                env={**os.environ, "VERL_PLATFORM": "cpu"},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=300,
            )
            assert done.returncode == 0, done.stdout[-4000:]
        return out

    return make


@pytest.fixture
def run_copy(run_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """The same in a folder that the test may change."""
    return lambda name: Path(shutil.copytree(run_folder(name), tmp_path / "run"))


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`saved_model(family, **options)`: `embedder/huggingface` with whole weights, made without any rank."""
    root = tmp_path_factory.mktemp("saved")

    def make(family: str = "qwen2_vl", **options: bool) -> Path:
        folder = root / "_".join([family, *(f"{key}{value}" for key, value in options.items())]) / "embedder"
        if not folder.exists():
            build_tiny_model(folder / "huggingface", family=family, **options)
        return folder

    return make


@pytest.fixture
def model_copy(saved_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """The same in a folder that the test may change."""
    return lambda *args, **options: Path(shutil.copytree(saved_model(*args, **options), tmp_path / "step" / "embedder"))
