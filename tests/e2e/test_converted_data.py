# SPDX-License-Identifier: Apache-2.0
"""What the converters write trains: EG-RL on fixtures of an image, a video and two document sources, in one run."""

from __future__ import annotations

import runpy
from collections import Counter
from pathlib import Path

import pytest

from embedrl_verl.convert.command import convert_main
from embedrl_verl.data.files import pair_files
from tests.convert.make_fixtures import write_all
from tests.e2e import harness

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SCRIPTS = Path(__file__).parents[2] / "data_preprocess"
PAIRS, BATCH = 8, 4
# script, fixture, options; media paths of all are relative to the folder of the fixtures
CONVERSIONS = {
    "mmeb_okvqa": ("mmeb_train", "mmeb", ["--sets", "OK-VQA", "--images-dir", "mmeb"]),
    "llavahound_video_retrieval": (
        "llava_hound",
        "llava_hound",
        ["--modes", "video_retrieval", "--frames-dir", "llava_hound/train_300k"],
    ),
    "vidore_colpali": ("colpali_train", "colpali", []),
    "visrag": ("visrag_train", "visrag", []),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps on each of the four sources: an epoch of eight batches."""
    folder = tmp_path_factory.mktemp("converted")
    roots = write_all(folder / "fixtures", pairs=PAIRS)
    files = []
    for source, (script, fixture, options) in CONVERSIONS.items():
        names = runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name=script)
        out = folder / source
        argv = ["--input", str(roots[fixture]), "--out", str(out), "--media-root", str(folder / "fixtures"), *options]
        assert convert_main(names["make"], script, names["add_options"], argv) == 0
        files += map(str, pair_files([out]))
    harness.prepare(folder)
    extra = [
        f"data.train_files=[{','.join(files)}]",
        f"data.media_root={folder / 'fixtures'}",
        "trainer.val_before_train=False",
    ]
    finished = harness.run(folder, folder / "run", extra, steps=2 * len(CONVERSIONS))
    assert finished.code == 0, finished.output[-6000:]
    return finished


def rows_of(run):
    return {step: run.dump("rollouts", step) for step in range(1, 2 * len(CONVERSIONS) + 1)}


def test_every_source_is_trained_for_two_steps_on_pairs_of_its_own(run):
    steps = Counter()
    for rows in rows_of(run).values():
        (source,) = {row["data_source"] for row in rows}
        steps[source] += 1
        assert len({row["pair_id"] for row in rows}) == BATCH
    assert steps == dict.fromkeys(CONVERSIONS, 2)


def test_no_row_failed_and_no_prompt_was_too_long(run):
    for rows in rows_of(run).values():
        assert all(row["failure"] is None for row in rows)
    assert all(run.metrics[step]["embedrl/failed_rows"] == 0 for step in rows_of(run))
    assert "are left out" not in run.output


def test_rewards_differ_within_every_source(run):
    scores = {}
    for rows in rows_of(run).values():
        scores.setdefault(rows[0]["data_source"], set()).update(round(row["score"], 6) for row in rows)
    assert all(len(found) > 1 for found in scores.values())
