# SPDX-License-Identifier: Apache-2.0
"""The plot of co-trained against frozen runs: drawn from what runs leave, refused without it."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from embedrl_verl.errors import DataError
from embedrl_verl.tiny.cotraining_plot import WINDOW, main, smoothed


def test_two_kinds_of_runs_become_one_picture(tmp_path):
    for name in ("frozen", "trained"):
        (tmp_path / name).mkdir()
        lines = []
        for step in range(8):
            data = {"embedrl/reward/mean": 0.1 * step, "embedrl/hit@1/mean": 0.5}
            if name == "trained":
                data["embedder/anchor_hit@1"] = 0.9
            lines.append(json.dumps({"step": step, "data": data}))
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ["--frozen", str(tmp_path / "frozen"), "--trained", str(tmp_path / "trained")]
    main([*arguments, "--out", str(tmp_path / "plot.png")])
    assert Image.open(tmp_path / "plot.png").width > 1000
    with pytest.raises(DataError, match="is missing or empty"):
        main(
            [
                "--frozen",
                str(tmp_path / "none"),
                "--trained",
                str(tmp_path / "trained"),
                "--out",
                str(tmp_path / "p.png"),
            ]
        )


def test_smoothing_is_a_trailing_mean():
    assert smoothed([1.0, 2.0, 3.0]) == [1.0, 1.5, 2.0]
    assert smoothed([float(i) for i in range(10)])[-1] == sum(range(10 - WINDOW, 10)) / WINDOW
