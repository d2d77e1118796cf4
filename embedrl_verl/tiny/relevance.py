# SPDX-License-Identifier: Apache-2.0
"""A tiny instruct model that says whether two answers contradict each other: the relevance judge of the digits world.

The model is `TinyJudge`'s Qwen2 with two layers, well under a million parameters; prompts are written by the code of
the filter (`embedrl_verl.curate.relevance`, style compact), over pairs of numbers that are equal, cut short, or misread
in a digit. Two answers agree if one is the beginning of the other, since a terse T-CoT is not wrong.

To compare long texts is learnt late from the last word alone. So numbers grow digit by digit, a level at a time; every
digit of the second number is labelled with what can be said up to it; and the heads begin by looking back as far as the
digit of the same place in the first number may lie.

Command: `python -m embedrl_verl.tiny.relevance --out DIR [--seed 0]`.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embedrl_verl.curate.relevance import load_relevance_style, read_verdict
from embedrl_verl.errors import ConfigError
from embedrl_verl.tiny.digits import WORDS, render_tcot
from embedrl_verl.tiny.judge_model import END, IGNORED, JudgeSize, TinyJudge, look_back
from embedrl_verl.tiny.optim import MuonAdamW

STYLE = "compact"
LONGEST = 5
SIZE = JudgeSize(layers=2)
# Digit i of a number of n digits lies n + 1 tokens before that of the second; a word before them adds two.
LOOK_BACK = ((2, 3, 4, 5), (6, 7, 8, 1))


@dataclass(frozen=True)
class RelevanceTraining:
    """Settings of the training.

    Attributes:
        max_steps: of the whole training; if the last level has not begun by then, there is an error.
        batch_size: questions of a step.
        level_accuracy: share of the labels right, over the last steps, at which numbers get a digit longer.
        accuracy: the same of the last level, whose numbers are cut short and have words before them, at which it ends
            before `max_steps`.
        checks: new questions of the measurement at the end.
        lr, muon_lr, warmup: see `MuonAdamW`.
    """

    max_steps: int = 700
    batch_size: int = 96
    level_accuracy: float = 0.93
    accuracy: float = 0.96
    checks: int = 300
    lr: float = 2e-3
    muon_lr: float = 3e-3
    warmup: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.max_steps, self.batch_size, self.checks, self.warmup) < 1:
            raise ConfigError(f"counts of RelevanceTraining must be at least 1; got {self}")
        if not (0 < self.level_accuracy < 1 and 0 < self.accuracy < 1):
            raise ConfigError(f"level_accuracy and accuracy must be between 0 and 1; got {self}")


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
    return load_relevance_style(STYLE).prompt("", *tcots)


def lesson(judge: TinyJudge, query: str, target: str) -> tuple[list[int], list[int]]:
    """Tokens and labels of one question with its answer."""
    style = load_relevance_style(STYLE)
    yes, no = judge.ids(style.yes_word), judge.ids(style.no_word)
    if len(yes) != 1 or len(no) != 1:
        raise ConfigError(f"the words {style.yes_word!r} and {style.no_word!r} must be one token each")
    opened, closed = judge.turn(question(query, target))
    word = no if agree(query, target) else yes
    answer = word + judge.ids(END)
    ids = opened + closed + answer
    labels = [IGNORED] * (len(opened) - 1) + word + [IGNORED] * (len(closed) - 1) + [*answer, IGNORED]
    end = len(judge.ids("=")) + 1  # the question ends with the target and "="
    shown = [len(judge.ids(target[: i + 1])) for i in range(len(target))]
    first = len(opened) - end - shown[-1] + 1
    for i, length in enumerate(shown):
        if target[i].isdigit():
            labels[first + length - 1] = (no if agree(query, target[: i + 1]) else yes)[0]
    return ids, labels


def accuracy_of(judge: TinyJudge, pairs: Sequence[tuple[str, str]]) -> float:
    """Share of right verdicts, decoded as the server does."""
    style = load_relevance_style(STYLE)
    right = 0
    for query, target in pairs:
        verdict = read_verdict(judge.answer(question(query, target)), style)
        right += verdict == ("match" if agree(query, target) else "mismatch")
    return right / len(pairs)


def train_relevance(config: RelevanceTraining) -> tuple[TinyJudge, float]:
    """Train a relevance judge; returns it and its accuracy on new questions.

    Raises:
        ConfigError: a level was not learnt in `max_steps`.
    """
    rng = random.Random(config.seed)
    judge = TinyJudge(SIZE, seed=config.seed)
    for layer, offsets in enumerate(LOOK_BACK):
        look_back(judge.model.model.layers[layer].self_attn, offsets)
    optimizer = MuonAdamW(
        judge.model, lr=config.lr, muon_lr=config.muon_lr, warmup=config.warmup, total=config.max_steps
    )
    started, step = time.monotonic(), 0
    for level in range(1, LONGEST + 2):
        grown = level > LONGEST
        right, wanted = 0.0, config.accuracy if grown else config.level_accuracy
        while right < wanted:
            step += 1
            if step > config.max_steps and grown:
                break
            if step > config.max_steps:
                raise ConfigError(
                    f"the relevance judge has not learnt level {level} in max_steps={config.max_steps} steps"
                )
            answers = [draw_answers(rng, min(level, LONGEST), grown=grown) for _ in range(config.batch_size)]
            loss, accuracy = judge.loss([lesson(judge, *pair) for pair in answers])
            optimizer.step(loss)
            right = 0.9 * right + 0.1 * accuracy
            if step % 100 == 0:
                print(f"relevance judge: step {step}, level {level}, {right:.1%} of the labels right", flush=True)
        seconds = time.monotonic() - started
        print(f"relevance judge: level {level} done after {step} steps, {seconds:.0f} s", flush=True)
    checks = random.Random(config.seed + 1)
    measured = accuracy_of(judge, [draw_answers(checks) for _ in range(config.checks)])
    print(f"relevance judge: {measured:.1%} of {config.checks} new questions right", flush=True)
    return judge, measured


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: train a tiny relevance judge."""
    parser = argparse.ArgumentParser(prog="python -m embedrl_verl.tiny.relevance", description=train_relevance.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=RelevanceTraining.max_steps)
    args = parser.parse_args(argv)
    judge, _ = train_relevance(RelevanceTraining(seed=args.seed, max_steps=args.max_steps))
    judge.save(args.out)
    print(f"wrote the relevance judge to {args.out}")


if __name__ == "__main__":
    main()
