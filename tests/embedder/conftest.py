# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints and mixed inputs that the Embedder's tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from embedrl_verl.embedder import Embedder
from recipes.tiny_digits.models import build_tiny_model
from tests.embedder.inputs import LIMITS

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint(family)`: folder of a tiny checkpoint with `<emb>`, built once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def build(family: str = "qwen2_vl") -> Path:
        path = root / family
        return path if path.exists() else build_tiny_model(path, family=family)

    return build


@pytest.fixture(scope="session")
def embedder(checkpoint: Callable[[str], Path]) -> Callable[[str], Embedder]:
    """`embedder(family)`: the tiny checkpoint loaded once."""
    loaded: dict[str, Embedder] = {}

    def load(family: str = "qwen2_vl") -> Embedder:
        if family not in loaded:
            loaded[family] = Embedder.from_pretrained(checkpoint(family), limits=LIMITS[family])
        return loaded[family]

    return load


@pytest.fixture(params=FAMILIES)
def each_embedder(request: pytest.FixtureRequest, embedder: Callable[[str], Embedder]) -> Embedder:
    """The tiny checkpoint of every family in turn."""
    return embedder(request.param)
