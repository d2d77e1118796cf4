# SPDX-License-Identifier: Apache-2.0
"""The tiny judges' lessons are right, their prompts are those of the servers, and they learn to look a text up."""

import random
from collections.abc import Callable

import pytest
import torch

from embedrl_verl.annotate.relevance import STYLES
from embedrl_verl.tcot import parse_tcot
from recipes.tiny_digits import relevance
from recipes.tiny_digits.canvas import TRAIN_SCANS
from recipes.tiny_digits.judge import LEVELS, ListMaker, best_matches, drill, lesson, misread
from recipes.tiny_digits.judge_model import IGNORED, Lesson, TinyJudge
from recipes.tiny_digits.models import END
from recipes.tiny_digits.muon import MuonAdamW
from recipes.tiny_digits.world import SOURCES, make_samples

TCOT = '<thinking>{"bbox_2d":[0,500,1000,750]}</thinking><rethink>ok</rethink><answer>3085</answer>'


@pytest.fixture(scope="module")
def judge() -> TinyJudge:
    return TinyJudge()


def maker(seed: int = 0) -> ListMaker:
    samples = [s for source in SOURCES for s in make_samples(source, 16, scans=TRAIN_SCANS, seed=0)]
    return ListMaker(samples, random.Random(seed))


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


def test_lists_hold_no_pair_whose_tcot_names_no_number() -> None:
    assert set(maker()._families) == set(SOURCES) - {"digits_sheet"}


def test_a_misread_changes_one_digit_of_the_answer_alone() -> None:
    rng = random.Random(0)
    for _ in range(50):
        other = misread(TCOT, rng)
        assert len(other) == len(TCOT) and sum(a != b for a, b in zip(other, TCOT, strict=True)) == 1
        assert parse_tcot(other).boxes == parse_tcot(TCOT).boxes and parse_tcot(other).is_well_formed


def test_a_full_list_is_that_of_the_reward_and_its_first_question_has_only_own_answers() -> None:
    """8 own candidates and 4 strangers; every right candidate of the first question is of the own pair."""
    draws = maker()
    for _ in range(40):
        one = draws.draw(questions=3)
        assert len(one.own) == 12 and sum(one.own) == 8
        assert all(one.own[number - 1] for number in one.answers[0])
        assert len(one.questions) == len(one.answers) == 3
        lines = one.questions[0].split("\n")
        assert [int(line.rsplit("=", 1)[1]) for line in lines[:12]] == list(range(1, 13))
        for question, right in zip([lines[12], *one.questions[1:]], one.answers, strict=True):
            texts = [line.rsplit("=", 1)[0] for line in lines[:12]]
            assert right == best_matches(question.rstrip("="), texts)


def test_own_candidates_have_no_place_of_their_own() -> None:
    draws = maker(seed=1)
    shares = torch.tensor([draws.draw().own for _ in range(2000)], dtype=torch.float64).mean(dim=0)
    assert (shares - 8 / 12).abs().max() < 4 * (8 / 12 * 4 / 12 / 2000) ** 0.5


def test_a_lesson_asks_for_the_answer_where_the_server_lets_the_model_begin(judge: TinyJudge) -> None:
    one = maker().draw(questions=2)
    ids, labels = lesson(one, judge, random.Random(0))
    assert len(ids) == len(labels)
    message = [{"role": "user", "content": one.questions[0]}]
    prompt = judge.ids(judge.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    assert ids[: len(prompt)] == prompt
    answer = labels[len(prompt) - 1 : labels.index(judge.ids(END)[0], len(prompt) - 1)]
    assert int(judge.tokenizer.decode(answer)) in one.answers[0]
    for place in range(len(prompt), len(prompt) + len(answer)):
        assert ids[place] == labels[place - 1], "what is asked for is what comes next"


def test_a_drill_labels_every_line_that_repeats_one_with_its_number(judge: TinyJudge) -> None:
    for level in LEVELS:
        ids, labels = drill(level, judge, random.Random(1))
        lines = judge.tokenizer.decode(ids).split("\n")[:-1]
        numbers = dict(line.split("=") for line in lines[: level.keys])
        assert len(lines) == level.lines and len(numbers) == level.keys
        assert all(numbers[key] == number for key, number in (line.split("=") for line in lines))
        wanted = judge.tokenizer.convert_ids_to_tokens([label for label in labels if label != IGNORED])
        assert wanted == [line.split("=")[1] for line in lines[level.keys :]]
        assert all(ids[i + 1] == label for i, label in enumerate(labels) if label != IGNORED)


def test_heads_begin_by_looking_their_number_of_tokens_back() -> None:
    """Mean attention weight over many places of random tokens."""
    model = TinyJudge().model
    model.set_attn_implementation("eager")
    tokens = torch.randint(20, 200, (4, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = model.model(input_ids=tokens, output_attentions=True, use_cache=False).attentions[0]
    for head, offset in enumerate((1, 2, 3, 4)):
        back = torch.stack([first[:, head].diagonal(-k, dim1=1, dim2=2)[:, 20:].mean() for k in range(0, 9)])
        assert int(back.argmax()) == offset and back[offset] > 0.5


@pytest.mark.parametrize(
    ("query", "target", "expected"),
    [("308", "308", True), ("3", "308", True), ("308", "3", True), ("308", "318", False), ("a 3", "b 3", False)],
)
def test_answers_agree_if_one_begins_the_other(query: str, target: str, expected: bool) -> None:
    assert relevance.agree(query, target) is expected


def test_half_of_the_answers_agree_also_of_short_ones_and_faults_are_one_digit() -> None:
    rng = random.Random(0)
    drawn = [relevance.draw_answers(rng) for _ in range(2000)]
    same_length = [pair for pair in drawn if len(pair[0]) == len(pair[1])]
    cut = [pair for pair in drawn if len(pair[0]) != len(pair[1])]
    for pairs in (same_length, cut):
        assert len(pairs) > 500 and abs(sum(relevance.agree(*pair) for pair in pairs) / len(pairs) - 0.5) < 0.05
    assert max(sum(a != b for a, b in zip(*pair, strict=True)) for pair in same_length) == 1
    assert all(pair[0].isdigit() for pair in (relevance.draw_answers(rng, 3, grown=False) for _ in range(100)))


@pytest.mark.parametrize(
    ("query", "target", "expected"),
    [("30852", "3085", ["no"] * 4), ("parcel 12", "parcel 19", ["no", "yes"]), ("3", "319", ["no"] * 3)],
)
def test_every_digit_says_what_is_known_up_to_it_and_the_answer_stands_where_the_server_begins(
    query, target, expected, judge
):
    ids, labels = relevance.lesson(judge, query, target)
    style = STYLES["compact"]
    opened, closed = judge.turn(relevance.question(query, target))
    assert ids[: len(opened) + len(closed)] == opened + closed
    at = {place: judge.tokenizer.decode([label]) for place, label in enumerate(labels) if label != IGNORED}
    digits = [place for place in at if judge.tokenizer.decode([ids[place]]).isdigit()]
    assert [at[place] for place in digits] == expected
    assert judge.tokenizer.decode(ids[digits[0] : digits[-1] + 1]) == target.split()[-1]
    answer = style.no_word if relevance.agree(query, target) else style.yes_word
    assert at[len(opened) - 1] == at[len(opened) + len(closed) - 1] == answer
    assert judge.tokenizer.decode(ids[len(opened) + len(closed) :]) == f"{answer}<|im_end|>"


def losses_of(judge: TinyJudge, make: Callable[[], list[Lesson]], steps: int) -> tuple[list[float], list[float]]:
    """Losses and accuracies of a few steps of training."""
    optimizer, found = MuonAdamW(judge.model, warmup=10, total=400), []
    for _ in range(steps):
        loss, accuracy = judge.loss(make())
        optimizer.step(loss)
        found.append((loss.item(), accuracy))
    losses, accuracies = zip(*found, strict=True)
    return list(losses), list(accuracies)


def test_a_few_steps_lower_the_loss_of_both() -> None:
    judge, rng = TinyJudge(), random.Random(0)
    losses, _ = losses_of(judge, lambda: [drill(LEVELS[0], judge, rng) for _ in range(16)], 10)
    assert losses[-1] < 0.8 * losses[0]
    pairs = lambda: [relevance.draw_answers(rng, 1, grown=False) for _ in range(32)]  # noqa: E731
    losses, _ = losses_of(judge, lambda: [relevance.lesson(judge, *pair) for pair in pairs()], 25)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.nightly
def test_it_learns_to_look_a_text_up() -> None:
    judge, rng = TinyJudge(), random.Random(0)
    _, accuracies = losses_of(judge, lambda: [drill(LEVELS[0], judge, rng) for _ in range(64)], 120)
    assert sum(accuracies[-5:]) / 5 > 0.8, "two numbers to choose from: chance is a half"
