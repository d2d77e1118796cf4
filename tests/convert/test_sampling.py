# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from embedrl_verl.convert.sampling import Sampling, preset, presets, sampling_from_options
from embedrl_verl.errors import ConfigError
from embedrl_verl.stage1.sampler import SubBatchPlan
from tests.convert.conftest import MMEB_SOURCES, OTHER_SOURCES, Convert, question, write_lines

LEFT_OUT = {"mmeb_hatefulmemes", "mmeb_n24news", "mmeb_voc2007"}
VIDEOS = ("llavahound_caption_retrieval", "llavahound_qa", "llavahound_video_retrieval")


@pytest.mark.parametrize(
    ("total", "count"), [(10, 3), (50, 50), (7, 9), (1_000_000, 999), (3, 1), (0, 5), (3_000_000_000, 5)]
)
def test_evenly_spaced_positions_differ_and_are_equally_far_apart(total: int, count: int) -> None:
    chosen = Sampling({"a": count}).choose("a", total)
    chosen = np.arange(total) if chosen is None else chosen
    assert len(chosen) == min(total, count)
    gaps = np.diff(chosen)
    if len(gaps):
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
        assert (chosen[0], chosen[-1]) == (0, total * (len(chosen) - 1) // len(chosen))


def test_random_draws_depend_on_seed_and_source_only_and_a_cap_above_the_rows_takes_all() -> None:
    def draw(seed: int, source: str) -> list[int]:
        return Sampling({"a": 20, "b": 20}, method="random", seed=seed).choose(source, 1000).tolist()

    assert draw(1, "a") == draw(1, "a") == sorted(set(draw(1, "a")))
    assert draw(1, "a") != draw(2, "a")
    assert draw(1, "a") != draw(1, "b")
    assert Sampling({"a": 10}).choose("a", 10) is Sampling({"a": 10}).choose("other", 10**6) is None


def test_the_papers_tables_are_as_printed() -> None:
    table = preset("paper_caps")
    published = {name: entry for name, entry in table.sources.items() if "initial" in entry}
    sums = [sum(entry[name] for entry in published.values()) for name in ("initial", "kept")]
    assert sums == [2_023_882, 1_683_111]  # of the lines; the totals that the paper prints are others
    assert all(f"{total:,}" in table.note for total in [*sums, 2_223_882, 1_828_341])
    assert set(MMEB_SOURCES) <= set(published)
    assert {name for name, entry in published.items() if entry.get("left_out")} == LEFT_OUT
    assert not LEFT_OUT & set(table.weights)
    caps = [50_000] * 20 + [300_000] * 3 + [100_000] * 2
    assert sorted(table.caps[name] for name in published) == sorted(caps)
    assert all(entry["initial"] <= entry["rows"] for entry in published.values())
    assert (len(preset("rl_13").caps), sum(preset("rl_13").caps.values())) == (13, 19_000)
    for table in presets().values():  # of sources that converters write
        assert set(table.sources) <= {*MMEB_SOURCES, *OTHER_SOURCES}, table.name


def test_the_recipe_of_vlm2vec_v2_is_as_published() -> None:
    table = preset("vlm2vec_v2")
    thousands = {1: (100, 50, 40, 70, 130, 100, 100, 100, 120, 100), 0.5: (10, 10, 20, 10, 20, 25, 28, 30, 20, 20)}
    for weight, rows in thousands.items():
        entries = [entry for entry in table.sources.values() if entry.get("weight") == weight]
        assert tuple(entry["rows"] // 1000 for entry in entries) == rows
    others = {name: entry for name, entry in table.sources.items() if not name.startswith("mmeb_")}
    # of ViDoRe page and question to answer; the reading question to page is not in the recipe
    weights = {"vidore_colpali": 10, "visrag": 12, **dict.fromkeys(VIDEOS, 5)}
    assert {name: entry["weight"] for name, entry in others.items()} == weights
    assert all("rows" not in entry for entry in others.values())


def test_the_weights_that_a_card_prints_train_the_mixture_of_the_preset(tmp_path: Path, convert: Convert) -> None:
    pairs = {"visrag": 300, "vidore_colpali": 650, "mmeb_imagenet_1k": 900, "mmeb_hatefulmemes": 20}
    rows = [question(i, source=source) for source, count in pairs.items() for i in range(count)]
    write_lines(tmp_path / "f.jsonl", [*rows, question(0, source="mmeb_cirr", answer=None)])
    card = convert(tmp_path / "f.jsonl", "out", "data_source=source", name="", preset="vlm2vec_v2", shard_rows=10**6)
    text = (tmp_path / "out" / "data_card.md").read_text()
    (printed,) = re.findall(r"`(contrastive\.source_weights=.*)`", text)
    weights = OverridesParser.create().parse_override(printed).value()
    assert weights == card["sampling"]["weights"]
    assert max(weights.values()) == weights["visrag"] == 1
    assert card["by_source"]["(rows say it)"]["rows"] == len(rows) + 1
    assert "the shares are mmeb_imagenet_1k 1, mmeb_hatefulmemes 0.5, vidore_colpali 10, visrag 12." in text
    sources = [*Counter(pairs).elements()]
    plan = SubBatchPlan(sources, batch_pairs=1, sub_batch_pairs=1, weights=weights)
    drawn = Counter(sources[int(batch.pairs[0])] for batch in plan.epoch(0))
    published = preset("vlm2vec_v2").weights
    for source in pairs:
        share = published[source] / sum(published[name] for name in pairs)
        assert drawn[source] == pytest.approx(share * drawn.total(), abs=1), source


def test_weights_that_are_times_size_are_left_as_published() -> None:
    pairs = {"visrag": 9, "mmeb_cirr": 7, "mmeb_n24news": 5, "own": 4, "mmeb_nights": 0}
    assert preset("paper_caps").source_weights(pairs) == {"visrag": 6.0, "mmeb_cirr": 0.43}
    assert preset("vlm2vec_v2").source_weights({"own": 3}) == {}


def test_caps_of_the_command_line_are_numbers_of_rows_and_win_over_the_preset() -> None:
    sampling = sampling_from_options(["7", "visrag=9"], "paper_caps")
    assert (sampling.cap("visrag"), sampling.cap("mmeb_cirr"), sampling.cap("mine")) == (9, 50_000, 7)
    assert sampling_from_options([], "").cap("visrag") is None
    for cap in ("many", "a=-1", "a=", "a=1.5"):
        with pytest.raises(ConfigError, match="--cap takes ROWS or SOURCE=ROWS"):
            sampling_from_options([cap], "")
    with pytest.raises(ConfigError, match="a cap must be at least 1 row; got 0 for a"):
        Sampling({"a": 0})
    with pytest.raises(ConfigError, match="unknown preset 'mine'; known are paper_caps, vlm2vec_v2, rl_13"):
        preset("mine")
