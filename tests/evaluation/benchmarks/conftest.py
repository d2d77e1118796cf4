# SPDX-License-Identifier: Apache-2.0
"""What `datasets` prepares of the fixtures goes with them."""

from pathlib import Path

import datasets
import pytest


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
