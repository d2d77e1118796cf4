# SPDX-License-Identifier: Apache-2.0
"""The held-out evaluation: who is ranked against whom, what counts as found, and that nothing fails in silence."""

import io
from dataclasses import replace
from typing import Any

import pytest
import torch

from embedrl_verl.config.schema import EvidenceConfig
from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.embedder import EmbedInput
from embedrl_verl.errors import DataError, EmbedderError
from embedrl_verl.evaluation.retrieval import Pairs, score_view, tcot_lines, write_tcots
from embedrl_verl.model import Written
from embedrl_verl.model.embedders import Embedded
from embedrl_verl.ranks import first_rank
from tests.embedder.inputs import picture


def picture_bytes(seed: int) -> bytes:
    stream = io.BytesIO()
    picture(seed).save(stream, "PNG")
    return stream.getvalue()


TCOT = '<thinking>{"text_keywords": ["x"]}</thinking><rethink>ok</rethink><answer>x</answer>'


class Vectors:
    """Stands in for an Embedder: the vector of a text."""

    def __init__(self, query: torch.Tensor, target: torch.Tensor) -> None:
        self.known = {f"q{i}": one for i, one in enumerate(query)} | {f"t{i}": one for i, one in enumerate(target)}

    def vectors(self, inputs: list[EmbedInput], side: str) -> list[Any]:
        found = [self.known.get(one.item.text) for one in inputs]
        bad = EmbedderError("the vector is not finite")
        return [
            EmbedderError("too long") if one is None else bad if one.isinf().any() else Embedded(one) for one in found
        ]


def records(*sources: str) -> list[PairRecord]:
    return [
        PairRecord(f"p{i}", source, "Find it.", Item(f"q{i}"), Item(f"t{i}"), f"target {i}")
        for i, source in enumerate(source for source in sources for _ in range(4))
    ]


def view(query: torch.Tensor, target: torch.Tensor, pairs: list[PairRecord], tcots: Any = None) -> dict[str, Any]:
    return score_view(Vectors(query, target), Pairs(pairs, [None] * len(pairs)), tcots, "qwen2_vl", EvidenceConfig())


def test_a_query_meets_the_targets_of_its_own_source_only():
    own, other = torch.eye(4), torch.eye(4)[[1, 2, 3, 0]]
    # Every query of the second source points at a target of the first one, too, and as much as at its own.
    found = view(torch.cat([own, 2 * other + 0.1]), torch.cat([own, other]), records("a", "b"))
    assert found["hit1"] == {"a": 1.0, "b": 1.0, "all": 1.0}


def test_all_is_the_plain_mean_over_sources_and_ties_are_misses():
    vectors = torch.cat([torch.eye(8)[:4], torch.ones(8, 8)])
    found = view(vectors, vectors, records("a", "b", "b"))
    assert found["hit1"] == {"a": 1.0, "b": 0.0, "all": 0.5}
    assert found["hits"] == {"a": [1] * 4, "b": [0] * 8} and found["ranks"] == {"a": [1] * 4, "b": [8] * 8}
    assert 0 < found["ndcg5"]["all"] < 1


@pytest.mark.parametrize("name", ["target_id", "query_id"])
def test_targets_of_an_equal_target_or_query_are_all_relevant(name):
    pairs = [replace(one, **{name: "same"}) if i < 2 else one for i, one in enumerate(records("a"))]
    assert view(torch.eye(4), torch.eye(4)[[1, 0, 3, 2]], pairs)["hits"] == {"a": [1, 1, 0, 0]}


def test_an_input_without_tcot_or_vector_is_a_counted_miss():
    pairs = records("a")
    pairs[0] = replace(pairs[0], query=Item("unknown"))
    query = torch.eye(4)
    query[1, 0] = torch.inf
    found = view(query, torch.eye(4), pairs)
    assert found["problems"] == ["query of p0: too long", "query of p1: the vector is not finite"]
    assert found["failed_rows"] == 2 and found["ranks"] == {"a": [0, 0, 1, 1]}
    texts = [Written(TCOT), Written(None, problem="no picture"), Written("nonsense"), Written(TCOT)]
    found = view(torch.eye(4), torch.eye(4), records("a"), {"query": texts, "target": [Written(TCOT)] * 4})
    assert found["problems"] == ["query of p1: no picture"] and found["hits"] == {"a": [1, 0, 1, 1]}
    assert found["quality"] == {"well_formed": 6 / 7, "format": 6 / 7, "evidence": 0}
    lines = tcot_lines(Pairs(records("a"), [None] * 4), "before", {"query": texts, "target": texts}, found["ranks"])
    assert lines[2] == {
        **{"view": "before", "data_source": "a", "pair_id": "p1", "side": "query", "tcot": None},
        **{"well_formed": False, "failure": "no picture", "rank": 0},
    }
    assert lines[1]["side"] == "target" and "rank" not in lines[1] and len(lines) == 8


def test_pairs_that_cannot_all_be_ranked_are_refused(tmp_path):
    with pytest.raises(DataError, match="at least one pair"):
        Pairs([], [])
    with pytest.raises(DataError, match="data_source of pair p0 must not be 'all'"):
        Pairs(records("all"), [None] * 4)
    write_pairs([*records("a", "b"), records("a")[0]], tmp_path / "twice.parquet")
    with pytest.raises(DataError, match=r"1 rows cannot be used; the first: .*row 8.*pair_id must be unique"):
        Pairs.read([str(tmp_path / "twice.parquet")])
    write_pairs(records("a", "b"), tmp_path / "pairs.parquet")
    assert [one.pair_id for one in Pairs.read([str(tmp_path / "pairs.parquet")], limit=1).records] == ["p0", "p4"]


def test_a_pair_whose_media_are_missing_equals_no_other(tmp_path):
    lost = [PairRecord(f"p{i}", "a", "", Item("", ("lost.png",)), Item("t"), "") for i in range(2)]
    (tmp_path / "here.png").write_bytes(b"only hashed")
    here = PairRecord("p2", "a", "", Item("", ("here.png",)), Item("u"), "")
    pairs = Pairs([*lost, here], [str(tmp_path)] * 3)
    assert len({tuple(one) for one in pairs.contents.tolist()}) == 3


def test_the_first_rank_is_that_of_the_best_relevant_candidate_behind_its_ties():
    nan = torch.nan
    scores = torch.tensor([[3, 2, 2, 1], [1, 1, 1, 1], [nan, 2, 1, 0], [nan, nan, 1, nan], [-torch.inf] * 4])
    relevant = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0], [1, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    assert first_rank(scores, relevant).tolist() == [3, 3, 3, 0, 0]


def test_a_side_without_any_vector_is_missed_and_not_a_crash():
    pairs = [replace(one, target=Item("unknown")) for one in records("a")]
    found = view(torch.eye(4), torch.eye(4), pairs)
    assert (found["failed_rows"], found["hits"], found["hit1"]["all"]) == (4, {"a": [0] * 4}, 0.0)


def test_of_a_clip_as_many_frames_are_drawn_as_the_pairs_say():
    clip = Item(video=Video(frames=tuple(picture_bytes(i) for i in range(12))))
    pairs = Pairs([PairRecord("p", "a", "", clip, Item("t"), "")], [None], max_frames=12)
    seen: list[int] = []

    class Reader:
        def vectors(self, inputs: list[EmbedInput], side: str) -> list[Any]:
            seen.extend(len(one.item.frames) for one in inputs)
            return [Embedded(torch.ones(1))] * len(inputs)

    class Writer:
        family = "qwen2_vl"

        def write(self, asks: list[Any]) -> list[Written]:
            seen.extend(len(one.item.frames) for one in asks)
            return [Written(TCOT)] * len(asks)

    score_view(Reader(), pairs, write_tcots(Writer(), pairs), "qwen2_vl", EvidenceConfig())
    assert seen == [12, 0, 12, 0]


def test_pairs_with_equal_ids_of_contents_are_others_if_they_say_or_ask_something_else() -> None:
    ids = {"query_id": "q1", "target_id": "t1"}
    one = PairRecord("p", "s", "Find it.", Item(text="a"), Item(text="t"), **ids)
    others = [
        replace(one, instruction="Find another."),
        replace(one, query=Item(text="b")),
        replace(one, target=Item(text="t", instruction="A text.")),
    ]
    digests = {Pairs([record], [None]).digest() for record in (one, *others)}
    assert len(digests) == 4
