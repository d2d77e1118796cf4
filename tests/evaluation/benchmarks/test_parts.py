# SPDX-License-Identifier: Apache-2.0
"""Metrics by hand, frames, texts and stamps of the benchmarks."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch

from embedrl_verl.data.media import load_item
from embedrl_verl.data.schema import Item
from embedrl_verl.errors import ConfigError, DataError, MediaError
from embedrl_verl.evaluation.benchmarks import mmeb_v2
from embedrl_verl.evaluation.benchmarks.ranking import metrics_at, score_queries
from embedrl_verl.evaluation.benchmarks.readers import _QUESTIONS
from embedrl_verl.evaluation.benchmarks.stamp import Stamp
from embedrl_verl.evaluation.benchmarks.task import Query, Rules, Source, frame_indices
from embedrl_verl.evaluation.benchmarks.uvrb import _video
from embedrl_verl.evaluation.stamp import ModelFacts, refuse_other_stamp
from tests.data.clips import numbers, write_clip
from tests.evaluation.benchmarks.world import lines

B = [0.5, 0.9, 0.4, 0.8, 0.1, 0.2]


@pytest.mark.parametrize(
    ("scores", "grades", "known"),
    [
        (
            B,
            [1, 0, 0, 1, 0, 1],
            {"hit@1": 0, "recall@5": 1, "precision@5": 0.6, "f1@5": 0.75, "mrr@5": 0.5, "map@5": 0.588889}
            | {"ndcg_linear@5": 0.712263, "ndcg_exponential@5": 0.712263},
        ),
        (B, [3, 2, 0, 1, 0, 0], {"ndcg_linear@1": 2 / 3, "ndcg_linear@5": 0.867503, "ndcg_exponential@5": 0.759192}),
        (
            [10.0 - place for place in range(10)],
            [0, 1, 0, 1, 1, 0, 1, 1, 1, 1],
            {"recall@5": 0.428571, "precision@5": 0.6, "f1@5": 0.5, "map@5": 0.32, "ndcg_linear@5": 0.491260}
            | {"map@10": 0.594728, "ndcg_linear@10": 0.738690, "precision@10": 0.7},
        ),
        (B, [0, 0, 0, 0, 0, 0], {"hit@10": 0, "f1@10": 0, "map@10": 0, "ndcg_linear@10": 0}),
    ],
    ids=["three positives", "graded", "more positives than k", "none"],
)
def test_the_numbers_of_a_score_file_are_those_computed_by_hand(
    scores: list[float], grades: list[int], known: dict[str, float]
) -> None:
    found = {name: float(one) for name, one in metrics_at(torch.tensor([scores]), torch.tensor([grades])).items()}
    assert len(found) == 24 and {name: found[name] for name in known} == pytest.approx(known, abs=1e-6)


@pytest.mark.parametrize("count", [3, 5, 17, 33])
def test_equal_vectors_tie_wherever_they_stand_and_ties_count_against_the_model(count: int) -> None:
    """The last bit of a product depends on the row's place, so equal vectors have unequal products."""
    generator = torch.Generator().manual_seed(0)
    query, row = (torch.nn.functional.normalize(torch.randn(1, 2048, generator=generator)) for _ in range(2))
    names = [str(number) for number in range(count)]
    for name in names:
        asked = [Query("q", lambda: None, {name: 1.0})]  # type: ignore[arg-type, return-value]
        found = score_queries(query, row.repeat(count, 1), asked, names, "hit@1", is_local=False)
        assert (found["rank"].item(), found["optimistic"].item()) == (count, 1.0)


def test_a_local_query_is_ranked_against_its_own_candidates_alone() -> None:
    candidates = torch.tensor([[0.5, 0.0], [0.4, 0.0], [0.9, 0.0]])
    query, names = torch.tensor([[1.0, 0.0]]), ["a", "b", "c"]
    asked = [Query("q", lambda: None, {"a": 1.0}, ["a", "b"])]  # type: ignore[arg-type, return-value]
    ranks = [score_queries(query, candidates, asked, names, "hit@1", is_local=one)["rank"].item() for one in (1, 0)]
    assert ranks == [1, 2]


@pytest.mark.parametrize(
    ("total", "known"),
    [
        (16, [0, 2, 4, 6, 8, 10, 12, 15]),
        (30, [0, 4, 8, 12, 16, 20, 24, 29]),
        (64, [0, 9, 18, 27, 36, 45, 54, 63]),
        (10, [0, 1, 2, 3, 5, 6, 7, 9]),
        (3, [0, 1, 2]),
    ],
)
def test_frames_are_those_of_the_reference(total: int, known: list[int], tmp_path: Path) -> None:
    assert frame_indices(total, 8) == known
    for number in range(total):
        (tmp_path / f"f{number}.jpg").touch()
    (tmp_path / "notes.txt").touch()
    assert list(Rules().clip(tmp_path.parent, tmp_path.name).frames) == [f"{tmp_path.name}/f{at}.jpg" for at in known]
    repeated = Rules(short_clips="last_repeated").clip(tmp_path.parent, tmp_path.name).frames
    assert len(repeated) == 8 and repeated[-1] == f"{tmp_path.name}/f{total - 1}.jpg"
    with pytest.raises(MediaError, match=r"'nowhere' cannot be read"):
        Rules().clip(tmp_path, "nowhere")


@pytest.mark.parametrize(("count", "known"), [(12, [0, 2, 3, 5, 6, 8, 9, 11]), (48, [0, 7, 13, 20, 27, 34, 40, 47])])
def test_a_video_file_of_any_length_gives_as_many_frames(count: int, known: list[int], tmp_path: Path) -> None:
    write_clip(tmp_path / "c.mp4", pts=range(count))
    item = Item(video=_video(Source(tmp_path), Rules(), "c.mp4"))
    assert numbers(load_item(item, tmp_path, max_frames=8).frames) == known


def test_rows_are_found_by_a_copys_own_card_by_folder_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    lines(tmp_path / "a" / "b" / "one" / "val.jsonl", [{"x": 1}])
    source = Source(tmp_path)
    assert list(source.rows("a/b", "one", "val")) == [{"x": 1}]
    lines(tmp_path / "a" / "c" / "deep" / "rows.jsonl", [{"x": 2}])
    card = "configs:\n- config_name: one\n  data_files:\n  - split: val\n    path: deep/rows.jsonl\n"
    (tmp_path / "a" / "c" / "README.md").write_text(f"---\n{card}---\n")
    first = source.digest
    assert list(source.rows("a/c", "one", "val")) == [{"x": 2}] and source.digest != first
    with pytest.raises(DataError, match=r"a/d \(default, test\) cannot be read in .* nor on the hub"):
        source.rows("a/d")


def test_options_stand_in_the_question_as_in_the_reference() -> None:
    made = {
        "MVBench": {"subset": "s", "video": "v", "candidates": ["x", "y"], "answer": "y"},
        "Video-MME": {"videoID": "v", "options": ["A. x.", "B. y 1.5 m."], "answer": "B"},
        "NExTQA": {"video": 7, **{f"a{number}": "xyzuv"[number] for number in range(5)}, "answer": 1},
        "EgoSchema": {"video_idx": "v", "option": ["A. x.", "B. y"], "answer": "1"},
        "ActivityNetQA": {"video_name": "v", "answer": "no"},
    }
    found = {name: _QUESTIONS[name]({"question": "q", **row}) for name, row in made.items()}
    assert {name: one.text for name, one in found.items()} == {
        "MVBench": "q\nOptions:\n(A) x\n(B) y",
        "Video-MME": "q\nA. x.\nB. y 1.5 m.",
        "NExTQA": "q\nOptions:\n(A) x\n(B) y\n(C) z\n(D) u\n(E) v",
        "EgoSchema": "qA. x. B. y",
        "ActivityNetQA": "q? (A) yes; (B) no.",
    }
    assert {name: one.options[one.answer] for name, one in found.items()} == {
        "MVBench": ("(B) y", "(B) y"),
        "Video-MME": ("B. y 1.5 m.", "y 1.5 m"),
        "NExTQA": ("y", "y"),
        "EgoSchema": ("B. y", "y"),
        "ActivityNetQA": ("no", "no"),
    }
    assert [one.folder for one in found.values()] == ["s/v", "v", "7", "v", "v_v"]


def test_a_text_loses_the_placeholder_and_keeps_its_white_space_unless_it_is_collapsed() -> None:
    assert Rules().text("<|image_1|>\nA \nB ") == "\nA \nB "
    assert Rules(white_space="collapsed").text("A \nB") == "A\nB"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *({"frame_rule": "one", "white_space": "collapsed", "pages": "old", "data": "f00", "revision": "v1"}.items()),
        *({"candidates": "local", "instruction_place": "system turn", "hidden_state": "x"}.items()),
        *({"pixel_budget": "x", "benchmark": "uvrb", "candidate_instruction": "none", "queries": "1 of 2"}.items()),
    ],
)
def test_scores_of_other_stamps_are_not_compared_and_the_stamp_is_named(name: str, value: str) -> None:
    made = Stamp.of("mmeb_v2", mmeb_v2.TASKS["ViDoSeek-page"], Rules(), ModelFacts(), data="abc", revision=None)
    stamp = vars(made)
    assert stamp["pages"] == "fixed" and name in stamp
    refuse_other_stamp(stamp, dict(stamp), "both")
    with pytest.raises(ConfigError, match=rf"both must have equal stamps to be compared; {name} is .* and '{value}'"):
        refuse_other_stamp(stamp, {**stamp, name: value}, "both")
    with pytest.raises(ConfigError, match=f"{name} is .* and None"):
        refuse_other_stamp(stamp, {key: one for key, one in stamp.items() if key != name}, "both")
