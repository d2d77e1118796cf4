# SPDX-License-Identifier: Apache-2.0
"""A tiny instruct model that says whether two answers contradict each other: the relevance judge of the digits world.

`TinyJudge` with two layers; prompts are written by the code of the filter (`embedrl_verl.annotate.relevance`, style
compact), over pairs of numbers that are equal, cut short, or misread in a digit. Two answers agree if one is the
beginning of the other, since a terse T-CoT is not wrong.

To compare long texts is learnt late from the last word alone. So numbers grow digit by digit, a level at a time; every
digit of the second number is labelled with what can be said up to it; and the heads begin by looking back as far as the
digit of the same place in the first number may lie.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

from embedrl_verl.annotate.relevance import STYLES, read_verdict
from embedrl_verl.errors import ConfigError
from recipes.tiny_digits.judge_model import IGNORED, Lesson, TinyJudge
from recipes.tiny_digits.models import END
from recipes.tiny_digits.muon import MuonAdamW
from recipes.tiny_digits.settings import run_program
from recipes.tiny_digits.world import WORDS, render_tcot

STYLE = STYLES["compact"]
LONGEST = 5
# Digit i of a number of n digits lies n + 1 tokens before that of the second; a word before them adds two.
LOOK_BACK = ((2, 3, 4, 5), (6, 7, 8, 1))
MAX_STEPS, BATCH_SIZE = 700, 96
# Share of the labels right, over the last steps, at which numbers get a digit longer; and at which the last level ends,
# whose numbers are cut short and have words before them.
LEVEL_ACCURACY, ACCURACY = 0.93, 0.96
CHECKS = 300


def agree(query: str, target: str) -> bool:
    """Whether one answer is the beginning of the other."""
    return query.startswith(target) or target.startswith(query)


def draw_answers(rng: random.Random, digits: int = LONGEST, *, grown: bool = True) -> tuple[str, str]:
    """Answers of the two sides of a pair, as a Reasoner might write them; half of them contradict each other.

    `digits`: of the number, or one less. `grown`: some are cut short to the first digit, or have a word before them.
    """
    number = "".join(rng.choice("0123456789") for _ in range(rng.randint(max(1, digits - 1), digits)))
    is_cut, sides = grown and rng.random() < 0.4, [number, number]
    if rng.random() < 0.5:
        place = 0 if is_cut else rng.randrange(len(number))
        other = rng.choice([digit for digit in "0123456789" if digit != number[place]])
        sides[1] = number[:place] + other + number[place + 1 :]
    if is_cut:
        side = rng.randrange(2)
        sides[side] = sides[side][:1]
    word = rng.choice(WORDS) + " " if grown and rng.random() < 0.2 else ""
    return word + sides[0], word + sides[1]


def question(query: str, target: str) -> str:
    """What the filter asks about T-CoTs with these answers."""
    tcots = [render_tcot({"text_keywords": answer.split()}, answer) for answer in (query, target)]
    return STYLE.prompt("", *tcots)


def lesson(judge: TinyJudge, query: str, target: str) -> Lesson:
    """One question with its answer; both words of the style are one token each."""
    (yes,), (no,) = judge.ids(STYLE.yes_word), judge.ids(STYLE.no_word)
    opened, closed = judge.turn(question(query, target))
    word = no if agree(query, target) else yes
    answer = [word, *judge.ids(END)]
    labels = [IGNORED] * (len(opened) - 1) + [word] + [IGNORED] * (len(closed) - 1) + [*answer, IGNORED]
    end = len(judge.ids("=")) + 1  # the question ends with the target and "="
    shown = [len(judge.ids(target[: i + 1])) for i in range(len(target))]
    first = len(opened) - end - shown[-1] + 1
    for i, length in enumerate(shown):
        if target[i].isdigit():
            labels[first + length - 1] = no if agree(query, target[: i + 1]) else yes
    return opened + closed + answer, labels


def train_relevance(seed: int) -> TinyJudge:
    """A relevance judge; prints its share of right verdicts, decoded as the server does."""
    rng, judge = random.Random(seed), TinyJudge(layers=2, seed=seed)
    judge.look_back(LOOK_BACK)
    optimizer = MuonAdamW(judge.model, total=MAX_STEPS)
    started, step = time.monotonic(), 0
    for level in range(1, LONGEST + 2):
        grown = level > LONGEST
        right, wanted = 0.0, ACCURACY if grown else LEVEL_ACCURACY
        while right < wanted and not (grown and step >= MAX_STEPS):
            step += 1
            if step > MAX_STEPS:
                raise ConfigError(
                    f"the relevance judge has not learnt level {level} in {MAX_STEPS} steps: another seed?"
                )
            answers = [draw_answers(rng, min(level, LONGEST), grown=grown) for _ in range(BATCH_SIZE)]
            loss, accuracy = judge.loss([lesson(judge, *pair) for pair in answers])
            optimizer.step(loss)
            right = 0.9 * right + 0.1 * accuracy
            if step % 100 == 0:
                print(f"relevance judge: step {step}, level {level}, {right:.1%} of the labels right", flush=True)
        seconds = time.monotonic() - started
        print(f"relevance judge: level {level} done after {step} steps, {seconds:.0f} s", flush=True)
    checks = random.Random(seed + 1)
    pairs = [draw_answers(checks) for _ in range(CHECKS)]
    verdicts = [read_verdict(judge.answer(question(*pair)), STYLE) for pair in pairs]
    hits = sum((one == "match") == agree(*pair) for one, pair in zip(verdicts, pairs, strict=True) if one != "unknown")
    print(f"relevance judge: {hits / CHECKS:.1%} of {CHECKS} new questions right", flush=True)
    return judge


def main(out: Path, seed: int = 0) -> None:
    """Train a relevance judge and write it to OUT."""
    train_relevance(seed).save(out)
    print(f"wrote the relevance judge to {out}")


if __name__ == "__main__":
    run_program(main)
