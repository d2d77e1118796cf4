# SPDX-License-Identifier: Apache-2.0
"""The tiny relevance judge's lessons are right, and its prompts are the filter's."""

import random

import pytest

from embedrl_verl.curate.relevance import load_relevance_style
from embedrl_verl.errors import ConfigError
from recipes.tiny_digits.judge_model import IGNORED, JudgeSize, TinyJudge
from recipes.tiny_digits.muon import MuonAdamW
from recipes.tiny_digits.relevance import RelevanceTraining, agree, draw_answers, lesson, question


@pytest.fixture(scope="module")
def judge():
    return TinyJudge(JudgeSize(layers=2))


@pytest.mark.parametrize(
    ("query", "target", "expected"),
    [("308", "308", True), ("3", "308", True), ("308", "3", True), ("308", "318", False), ("a 3", "b 3", False)],
)
def test_answers_agree_if_one_begins_the_other(query, target, expected):
    assert agree(query, target) is expected


def test_half_of_the_answers_agree_also_of_short_ones_and_faults_are_one_digit():
    rng = random.Random(0)
    drawn = [draw_answers(rng) for _ in range(2000)]
    same_length = [pair for pair in drawn if len(pair[0]) == len(pair[1])]
    cut = [pair for pair in drawn if len(pair[0]) != len(pair[1])]
    for pairs in (same_length, cut):
        assert len(pairs) > 500 and abs(sum(agree(*pair) for pair in pairs) / len(pairs) - 0.5) < 0.05
    assert max(sum(a != b for a, b in zip(*pair, strict=True)) for pair in same_length) == 1
    assert all(pair[0].isdigit() for pair in (draw_answers(rng, 3, grown=False) for _ in range(100)))


@pytest.mark.parametrize(
    ("query", "target", "expected"),
    [("30852", "3085", ["no"] * 4), ("parcel 12", "parcel 19", ["no", "yes"]), ("3", "319", ["no"] * 3)],
)
def test_every_digit_says_what_is_known_up_to_it_and_the_answer_stands_where_the_server_begins(
    query, target, expected, judge
):
    ids, labels = lesson(judge, query, target)
    style = load_relevance_style("compact")
    opened, closed = judge.turn(question(query, target))
    assert ids[: len(opened) + len(closed)] == opened + closed
    at = {place: judge.tokenizer.decode([label]) for place, label in enumerate(labels) if label != IGNORED}
    digits = [place for place in at if judge.tokenizer.decode([ids[place]]).isdigit()]
    assert [at[place] for place in digits] == expected
    assert judge.tokenizer.decode(ids[digits[0] : digits[-1] + 1]) == target.split()[-1]
    answer = style.no_word if agree(query, target) else style.yes_word
    assert at[len(opened) - 1] == at[len(opened) + len(closed) - 1] == answer
    assert judge.tokenizer.decode(ids[len(opened) + len(closed) :]) == f"{answer}<|im_end|>"


def test_a_few_steps_on_the_easiest_level_learn_something(judge):
    rng = random.Random(0)
    optimizer = MuonAdamW(judge.model, lr=2e-3, muon_lr=3e-3, warmup=5, total=200)
    losses = []
    for _ in range(25):
        loss, _ = judge.loss([lesson(judge, *draw_answers(rng, 1, grown=False)) for _ in range(32)])
        optimizer.step(loss)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("change", [{"batch_size": 0}, {"accuracy": 1.0}, {"level_accuracy": 0.0}])
def test_settings_that_cannot_work_are_refused(change):
    with pytest.raises(ConfigError):
        RelevanceTraining(**change)
