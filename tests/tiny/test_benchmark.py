# SPDX-License-Identifier: Apache-2.0
"""The held-out digits in MMEB-V2's layout: through the benchmark every query has the rank of `embedrl eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from embedrl_verl.config.schema import EvidenceConfig
from embedrl_verl.errors import DataError
from embedrl_verl.evaluation.benchmarks.runner import BenchmarkRun
from embedrl_verl.evaluation.benchmarks.tables import read_tables
from embedrl_verl.evaluation.benchmarks.task import Source
from embedrl_verl.evaluation.retrieval import Pairs, score_view, write_tcots
from embedrl_verl.model import EmbedRLModel, Written
from embedrl_verl.model.embedders import LocalEmbedder
from recipes.tiny_digits.benchmark import cells_table, check_equal, write_layout
from recipes.tiny_digits.contrastive import load_embedder
from recipes.tiny_digits.models import build_tiny_model
from recipes.tiny_digits.world import SOURCES, write_world


class Describes:
    """Stands in for a Reasoner: its T-CoT is what it was asked about, so that another question is another vector."""

    family = "qwen2_vl"

    def write(self, asks: Any) -> list[Written]:
        told = [
            f"{kind} {item.text} {item.instruction} {[one.size for one in (*item.images, *item.frames)]} {item.times}"
            for kind, item in asks
        ]
        return [Written(f"<thinking>{{}}</thinking><rethink>ok</rethink><answer>{one}</answer>") for one in told]


def test_every_query_has_the_rank_of_embedrl_eval_plain_and_with_tcots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    heldout = write_world(tmp_path / "world", sft=4, train=4, heldout=4)["heldout"]
    embedder = LocalEmbedder(load_embedder(build_tiny_model(tmp_path / "embedder", seed=1)))
    pairs, family = Pairs.read([str(heldout)]), Describes.family
    written = write_tcots(Describes(), pairs)  # type: ignore[arg-type]
    views = {
        name: score_view(embedder, pairs, tcots, family, EvidenceConfig())  # type: ignore[arg-type]
        for name, tcots in {"raw": None, "after": written}.items()
    }
    tasks = read_tables(write_layout(heldout, tmp_path / "data")).tasks
    model = EmbedRLModel(embedder, Describes())  # type: ignore[arg-type]
    BenchmarkRun("own", lambda: model, Source(tmp_path / "data"), tmp_path / "out", tcots="write", tasks=tasks).run()
    assert list(tasks) == list(pairs.by_source) == list(SOURCES)
    for source in tasks:
        rows = pq.read_table(tmp_path / "out" / f"{source}.parquet").to_pylist()
        for cell, view in {"plain-plain": "raw", "tcot-tcot": "after"}.items():
            ranks = [row["rank"] for row in rows if row["cell"] == cell]
            assert ranks == views[view]["ranks"][source], (source, cell)
    assert views["raw"]["ranks"] != views["after"]["ranks"], "T-CoTs must change something"
    check_equal(tmp_path / "out", {"views": views})
    assert cells_table(tmp_path / "out")[-1].startswith(f"| mean of {len(SOURCES)} | {4 * len(SOURCES)} |")
    hits = views["after"]["hits"]["digits_page"]
    hits[2] = 1 - hits[2]
    with pytest.raises(DataError, match="digits_page, tcot-tcot: .* 1 of 4 queries differ, the first is 2"):
        check_equal(tmp_path / "out", {"views": views})
