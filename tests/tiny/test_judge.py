# SPDX-License-Identifier: Apache-2.0
"""The tiny judge's lessons are right, its prompts are the server's, and it learns to look a text up."""

import random

import pytest
import torch

from embedrl_verl.errors import ConfigError
from embedrl_verl.tcot import parse_tcot
from recipes.tiny_digits.judge import LEVELS, JudgeTraining, ListMaker, best_matches, drill, lesson, misread
from recipes.tiny_digits.judge_model import END, IGNORED, JudgeSize, TinyJudge
from recipes.tiny_digits.muon import MuonAdamW
from recipes.tiny_digits.world import read_samples, write_world

TCOT = '<thinking>{"bbox_2d":[0,500,1000,750]}</thinking><rethink>ok</rethink><answer>3085</answer>'


@pytest.fixture(scope="module")
def judge():
    return TinyJudge(JudgeSize(), seed=0)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, sft=16, train=4, heldout=4)
    return read_samples(folder / "sft.parquet")


def _maker(samples, seed=0, **settings):
    return ListMaker(samples, JudgeTraining(**settings), random.Random(seed))


@pytest.mark.parametrize(
    ("judged", "candidates", "expected"),
    [
        ("3085", ["3085", "9086", "3085"], (1, 3)),
        ("3", ["3085", "9086", "34"], (1, 3)),
        ("3085", ["3", "3087"], (1,)),
        ("3085", ["9999", "30"], (2,)),
        ("3085", ["9999", "3999"], ()),
        ("ticket 12", ["ticket 12", "parcel 12"], (1,)),
    ],
)
def test_the_closest_answers_are_right_and_far_ones_are_not(judged, candidates, expected):
    assert best_matches(judged, candidates) == expected


def test_a_misread_changes_one_digit_of_the_answer_alone():
    rng = random.Random(0)
    for _ in range(50):
        other = misread(TCOT, rng)
        assert len(other) == len(TCOT) and sum(a != b for a, b in zip(other, TCOT, strict=True)) == 1
        assert parse_tcot(other).boxes == parse_tcot(TCOT).boxes and parse_tcot(other).is_well_formed


def test_a_full_list_is_that_of_the_reward_and_its_first_question_has_only_own_answers(samples):
    """8 own candidates and 4 strangers; every right candidate of the first question is of the own pair."""
    maker = _maker(samples)
    for _ in range(40):
        one = maker.draw(questions=3)
        assert len(one.own) == 12 and sum(one.own) == 8
        assert all(one.own[number - 1] for number in one.answers[0])
        assert len(one.questions) == len(one.answers) == 3
        lines = one.questions[0].split("\n")
        assert [int(line.rsplit("=", 1)[1]) for line in lines[:12]] == list(range(1, 13))
        for question, right in zip([lines[12], *one.questions[1:]], one.answers, strict=True):
            texts = [line.rsplit("=", 1)[0] for line in lines[:12]]
            assert right == best_matches(question.rstrip("="), texts)


def test_own_candidates_have_no_place_of_their_own(samples):
    maker = _maker(samples, seed=1)
    shares = torch.tensor([maker.draw().own for _ in range(2000)], dtype=torch.float64).mean(dim=0)
    assert (shares - 8 / 12).abs().max() < 4 * (8 / 12 * 4 / 12 / 2000) ** 0.5


def test_a_lesson_asks_for_the_answer_where_the_server_lets_the_model_begin(samples, judge):
    one = _maker(samples).draw(questions=2)
    ids, labels = lesson(one, judge, random.Random(0))
    assert len(ids) == len(labels)
    message = [{"role": "user", "content": one.questions[0]}]
    prompt = judge.ids(judge.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    assert ids[: len(prompt)] == prompt
    end = judge.ids(END)[0]
    answer = labels[len(prompt) - 1 : labels.index(end, len(prompt) - 1)]
    assert int(judge.tokenizer.decode(answer)) in one.answers[0]
    for place in range(len(prompt), len(prompt) + len(answer)):
        assert ids[place] == labels[place - 1], "what is asked for is what comes next"


def test_a_drill_labels_every_line_that_repeats_one_with_its_number(judge):
    for level in LEVELS:
        ids, labels = drill(level, judge, random.Random(1))
        lines = judge.tokenizer.decode(ids).split("\n")[:-1]
        numbers = dict(line.split("=") for line in lines[: level.keys])
        assert len(lines) == level.lines and len(numbers) == level.keys
        assert all(numbers[key] == number for key, number in (line.split("=") for line in lines))
        wanted = judge.tokenizer.convert_ids_to_tokens([label for label in labels if label != IGNORED])
        assert wanted == [line.split("=")[1] for line in lines[level.keys :]]
        assert all(ids[i + 1] == label for i, label in enumerate(labels) if label != IGNORED)


def test_heads_begin_by_looking_their_number_of_tokens_back(judge):
    """Mean attention weight over many places of random tokens."""
    model = judge.model
    model.set_attn_implementation("eager")
    try:
        tokens = torch.randint(20, 200, (4, 40), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            first = model.model(input_ids=tokens, output_attentions=True, use_cache=False).attentions[0]
    finally:
        model.set_attn_implementation("sdpa")
    for head, offset in enumerate((1, 2, 3, 4)):
        back = torch.stack([first[:, head].diagonal(-k, dim1=1, dim2=2)[:, 20:].mean() for k in range(0, 9)])
        assert int(back.argmax()) == offset and back[offset] > 0.5


def drilled(steps: int, drills: int) -> list[tuple[float, float]]:
    """Loss and accuracy of every step of a new judge's training."""
    judge = TinyJudge(JudgeSize(), seed=0)
    optimizer = MuonAdamW(judge.model, lr=2e-3, muon_lr=3e-3, warmup=10, total=400)
    rng, found = random.Random(0), []
    for _ in range(steps):
        loss, accuracy = judge.loss([drill(LEVELS[0], judge, rng) for _ in range(drills)])
        optimizer.step(loss)
        found.append((loss.item(), accuracy))
    return found


def test_a_few_steps_lower_the_loss():
    losses = [loss for loss, _ in drilled(10, 16)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.nightly
def test_it_learns_to_look_a_text_up():
    right = 0.0
    for _, accuracy in drilled(120, 64):
        right = 0.7 * right + 0.3 * accuracy
    assert right > 0.8, "two numbers to choose from: chance is a half"


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="terse and misread"):
        JudgeTraining(terse=0.6, misread=0.6)
    with pytest.raises(ConfigError, match="hard_pairs must be 1 to 4"):
        JudgeTraining(hard_pairs=5)
    with pytest.raises(ConfigError, match="multiple of 128"):
        JudgeSize(hidden_size=64)
