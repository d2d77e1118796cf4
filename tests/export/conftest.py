# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that verl's own manager saved on gloo ranks, made once a session, and copies of them to break."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from embedrl_verl.export.folder import export_checkpoint
from embedrl_verl.platforms.forkserver import python
from recipes.tiny_digits.models import build_tiny_model

SCRIPT = Path(__file__).with_name("save_shards.py")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what `save_shards.py` writes: 1, 2, tied, lora."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("whole", "tied"):
        build_tiny_model(root / f"{name} model", tied=name == "tied")
    done = subprocess.run(
        [python(), str(SCRIPT), str(root)],
        env={**os.environ, "VERL_PLATFORM": "cpu"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return root


@pytest.fixture
def run_copy(runs: Path, tmp_path: Path) -> Callable[[str], Path]:
    """`run_copy(name)`: one of them in a folder that the test may change."""
    return lambda name: Path(shutil.copytree(runs / name, tmp_path / "run"))


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


@pytest.fixture(scope="session")
def exported(saved_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`exported(family)`: the folder of an exported tiny Embedder."""
    root = tmp_path_factory.mktemp("exported")
    return lambda family: (
        root / family if (root / family).exists() else export_checkpoint(saved_model(family), root / family).folder
    )
