# SPDX-License-Identifier: Apache-2.0
"""A tiny instruct model that names the matching candidate: the judge of the digits world.

A Qwen2 of about a million parameters learns from judge's lists as RL will make them, prompts written by the same code
(`embedrl_verl.judge`), over T-CoTs of the cold start's pairs: numbers as they are, cut short, or with a digit misread.
It never sees a picture and no policy's T-CoT, and it is frozen in RL.

To look a text up in a list is an ability that transformers get suddenly and, from long lists, late. So it is drilled
first, on lists of two lines, then longer ones (a level a time, the next when 85% are right); and the heads of the first
two layers begin by looking a fixed number of tokens back, which is how the digits of a number come together. Then come
judge's lists, several questions about each, and at last single questions.

Command: `python -m embedrl_verl.tiny.judge --world DIR --out DIR [--seed 0]`.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedrl_verl.data.schema import SIDES
from embedrl_verl.errors import ConfigError
from embedrl_verl.judge import judge_prompt, judge_style, parse_choice
from embedrl_verl.rewards import Side
from embedrl_verl.tcot import TCoT, parse_tcot
from embedrl_verl.tiny.digits import FAMILY_SIZE, Sample, cut_short, read_samples
from embedrl_verl.tiny.judge_model import END, IGNORED, JudgeSize, TinyJudge
from embedrl_verl.tiny.optim import MuonAdamW

STYLE = "compact"


@dataclass(frozen=True)
class Level:
    """A drill: lists of `keys` numbers of `digits` digits (or one less), looked up until there are `lines` lines."""

    keys: int
    lines: int
    digits: int


LEVELS = (Level(2, 6, 1), Level(3, 9, 1), Level(3, 10, 2), Level(5, 16, 3), Level(7, 22, 4), Level(9, 28, 5))


@dataclass(frozen=True)
class JudgeTraining:
    """Settings of the tiny judge's training.

    Attributes:
        drill_steps: at most, of all levels together; above it the training stops with an error.
        drill_tokens: of a batch of drills.
        steps, batch_size: on judge's lists.
        questions: about one list, in a conversation; the last quarter of the steps has one question a list as often.
        grown: share of the steps after which all lists have their full length and all T-CoTs their faults.
        lr, muon_lr, warmup: see `MuonAdamW`.
        rollouts, hard_pairs: candidates of the own pair, and other pairs, in a full list.
        terse, misread: share of the T-CoTs of pictures whose number is cut short, or has a wrong digit.
        checks: lists of the measurement at the end, from pairs it was not trained on.
    """

    drill_steps: int = 800
    drill_tokens: int = 2600
    steps: int = 400
    batch_size: int = 16
    questions: int = 8
    grown: float = 0.4
    lr: float = 2e-3
    muon_lr: float = 3e-3
    warmup: int = 30
    rollouts: int = 8
    hard_pairs: int = 4
    terse: float = 0.25
    misread: float = 0.25
    checks: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.drill_steps, self.drill_tokens, self.steps, self.batch_size, self.questions)
        if min(*counts, self.rollouts, self.checks, self.warmup) < 1:
            raise ConfigError(f"counts of JudgeTraining must be at least 1; got {self}")
        if not 1 <= self.hard_pairs <= FAMILY_SIZE:
            raise ConfigError(f"hard_pairs must be 1 to {FAMILY_SIZE}: near numbers and a far one; got {self}")
        if min(self.terse, self.misread) < 0 or self.terse + self.misread > 1:
            raise ConfigError(f"terse and misread are shares whose sum is at most 1; got {self}")


@dataclass(frozen=True)
class JudgedList:
    """A conversation about one list.

    Attributes:
        questions: contents of the user's turns; the first holds the list.
        answers: right candidates of each question, counted from 1.
        own: which candidates are of the pair that the first question asks about.
    """

    questions: tuple[str, ...]
    answers: tuple[tuple[int, ...], ...]
    own: tuple[bool, ...]


class ListMaker:
    """Draws lists from the world's pairs; families of near numbers lie side by side in `samples`."""

    def __init__(self, samples: Sequence[Sample], config: JudgeTraining, rng: random.Random) -> None:
        self._config, self._rng = config, rng
        families: dict[str, list[list[Sample]]] = {}
        for start in range(0, len(samples), FAMILY_SIZE):
            family = list(samples[start : start + FAMILY_SIZE])
            families.setdefault(family[0].record.data_source, []).append(family)
        self._families = families

    def draw(self, *, questions: int = 1, grown: float = 1.0) -> JudgedList:
        """One list. With `grown` below 1 lists may be shorter, of numbers far apart, and T-CoTs have fewer faults.

        The first question is about the own pair, and only its candidates match best; later ones may be about any pair
        of the list.
        """
        rng = self._rng
        while True:
            side: Side = rng.choice(SIDES)
            other: Side = "target" if side == "query" else "query"
            pairs, count = self._pairs(grown)
            candidates = [(self._write(pairs[0], other, grown), 0) for _ in range(count)]
            candidates += [(self._write(pair, other, grown), i) for i, pair in enumerate(pairs[1:], start=1)]
            rng.shuffle(candidates)
            texts = [tcot for tcot, _ in candidates]
            own = tuple(number == 0 for _, number in candidates)
            asked: list[TCoT] = []
            right: list[tuple[int, ...]] = []
            for _ in range(20 * questions):
                tcot = self._write(rng.choice(pairs) if asked else pairs[0], side, grown)
                best = best_matches(tcot.answer, [text.answer for text in texts])
                if best and (asked or all(own[i - 1] for i in best)):
                    asked.append(tcot)
                    right.append(best)
                if len(asked) == questions:
                    prompt = judge_prompt(texts, side=side, style=STYLE)
                    turns = [str(prompt.messages(one)[0]["content"]) for one in asked]
                    shared = len(prompt.body) + len(prompt.style.join)
                    return JudgedList((turns[0], *(turn[shared:] for turn in turns[1:])), tuple(right), own)

    def _pairs(self, grown: float) -> tuple[list[Sample], int]:
        """The own pair first, and how many candidates it has."""
        rng, config = self._rng, self._config
        families = self._families[rng.choice(sorted(self._families))]
        if rng.random() < grown:
            near, far = rng.sample(families, 2)
            own, *others = rng.sample(near, len(near))
            return [own, *[*others, rng.choice(far)][-config.hard_pairs :]], config.rollouts
        return [rng.choice(family) for family in rng.sample(families, rng.randint(3, 7))], rng.choice([1, 1, 2])

    def _write(self, sample: Sample, side: Side, grown: float) -> TCoT:
        truth, rng, config = sample.truth(side), self._rng, self._config
        chance = rng.random() / max(grown, 1e-9)
        if truth.cells and chance < config.terse:
            return parse_tcot(cut_short(truth.tcot))
        if truth.cells and chance < config.terse + config.misread:
            return parse_tcot(misread(truth.tcot, rng))
        return parse_tcot(truth.tcot)


def misread(tcot: str, rng: random.Random) -> str:
    """The T-CoT with one digit of its answer replaced by another."""
    start = tcot.index("<answer>")
    places = [start + match.start() for match in re.finditer(r"\d", tcot[start:])]
    place = rng.choice(places)
    other = rng.choice([digit for digit in "0123456789" if digit != tcot[place]])
    return tcot[:place] + other + tcot[place + 1 :]


def best_matches(judged: str, candidates: Sequence[str]) -> tuple[int, ...]:
    """Numbers, from 1, of the candidates that are closest to the judged answer; none if two or more places differ."""
    gaps = [_gap(judged, candidate) for candidate in candidates]
    return tuple(i for i, gap in enumerate(gaps, start=1) if gap == min(gaps)) if min(gaps) < 2 else ()


def _gap(judged: str, candidate: str) -> float:
    """How far two answers are apart: wrong places of equally long ones; one that begins the other counts as half."""
    if len(judged) == len(candidate):
        return sum(a != b for a, b in zip(judged, candidate, strict=True))
    longer, shorter = sorted((judged, candidate), key=len, reverse=True)
    return 0.5 if longer.startswith(shorter) else float(len(longer))


def drill(level: Level, judge: TinyJudge, rng: random.Random) -> tuple[list[int], list[int]]:
    """Tokens and labels of one drill: lines of a list, numbered at random; every line that repeats one has a label."""
    style = judge_style(STYLE)
    keys: list[str] = []
    while len(keys) < level.keys:
        digits = rng.randint(max(1, level.digits - 1), level.digits)
        key = "".join(rng.choice("0123456789") for _ in range(digits))
        keys += [key] if key not in keys else []
    numbers = dict(zip(keys, rng.sample("123456789", level.keys), strict=True))
    ids, labels = [], []
    for line in range(level.lines):
        key = keys[line] if line < level.keys else rng.choice(keys)
        text = style.candidate(numbers[key], key)
        asked = judge.ids(text[: text.rindex(numbers[key])])
        answer = judge.ids(numbers[key])
        ids += asked + answer + judge.ids(style.join)
        known = answer[0] if line >= level.keys else IGNORED
        labels += [IGNORED] * (len(asked) - 1) + [known, IGNORED] + [IGNORED] * len(judge.ids(style.join))
    return ids, labels


def lesson(one: JudgedList, judge: TinyJudge, rng: random.Random) -> tuple[list[int], list[int]]:
    """Tokens and labels of a conversation; of several right candidates one is the label. The answer is asked for twice:
    where it has to be given, and where the question ends."""
    ids: list[int] = []
    labels: list[int] = []
    for question, right in zip(one.questions, one.answers, strict=True):
        opened, closed = judge.turn(question)
        answer = judge.ids(f"{rng.choice(right)}{END}")
        between = judge.ids("\n")
        ids += opened + closed + answer + between
        labels += [IGNORED] * (len(opened) - 1) + [answer[0]] + [IGNORED] * (len(closed) - 1)
        labels += [*answer, IGNORED] + [IGNORED] * len(between)
    return ids, labels


@dataclass(frozen=True)
class JudgeReport:
    """Shares in [0, 1] over the check's lists: own candidate named, what a blind judge would hit, nothing named."""

    hit: float
    blind: float
    unknown: float


def check_judge(judge: TinyJudge, maker: ListMaker, count: int) -> JudgeReport:
    """Ask it about `count` full lists."""
    lists = [maker.draw() for _ in range(count)]
    named = [parse_choice(judge.answer(one.questions[0]), len(one.own)) for one in lists]
    hits = [number is not None and one.own[number - 1] for one, number in zip(lists, named, strict=True)]
    blind = [sum(one.own) / len(one.own) for one in lists]
    return JudgeReport(sum(hits) / count, sum(blind) / count, sum(number is None for number in named) / count)


def train_judge(
    samples: Sequence[Sample], checks: Sequence[Sample], config: JudgeTraining, size: JudgeSize | None = None
) -> tuple[TinyJudge, JudgeReport]:
    """Train a judge on `samples` and measure on `checks`.

    Raises:
        ConfigError: the drills were not learnt in `drill_steps`.
    """
    rng = random.Random(config.seed)
    judge = TinyJudge(size or JudgeSize(), seed=config.seed)
    optimizer = MuonAdamW(
        judge.model,
        lr=config.lr,
        muon_lr=config.muon_lr,
        warmup=config.warmup,
        total=config.drill_steps // 2 + config.steps,
    )
    started = time.monotonic()
    step = 0

    def update(rows: list[tuple[list[int], list[int]]]) -> float:
        loss, accuracy = judge.loss(rows)
        optimizer.step(loss)
        return accuracy

    def report(what: str) -> None:
        print(f"judge: {what}, {time.monotonic() - started:.0f} s", flush=True)

    for number, level in enumerate(LEVELS, start=1):
        right = 0.0
        rows = max(8, config.drill_tokens // (level.lines * (level.digits + 3)))
        while right < 0.85:
            step += 1
            if step > config.drill_steps:
                raise ConfigError(f"the judge has not learnt drill {number} in drill_steps={config.drill_steps} steps")
            right = 0.9 * right + 0.1 * update([drill(level, judge, rng) for _ in range(rows)])
        report(f"drill {number} of {len(LEVELS)} learnt after {step} steps")
    maker = ListMaker(samples, config, rng)
    for step in range(1, config.steps + 1):
        grown = min(1.0, step / (config.grown * config.steps))
        single = step > 0.75 * config.steps
        lists = [
            maker.draw(questions=rng.choice([1, config.questions]) if single else config.questions, grown=grown)
            for _ in range(config.batch_size)
        ]
        right = update([lesson(one, judge, rng) for one in lists])
        if step % 100 == 0 or step == config.steps:
            report(f"step {step}, {right:.1%} of the tokens right")
    measured = check_judge(judge, ListMaker(checks, config, random.Random(config.seed + 1)), config.checks)
    report(f"own pair named in {measured.hit:.1%} of {config.checks} new lists; blind {measured.blind:.1%}")
    return judge, measured


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: train a tiny judge on a digits world."""
    defaults: Any = JudgeTraining
    parser = argparse.ArgumentParser(prog="python -m embedrl_verl.tiny.judge", description=train_judge.__doc__)
    parser.add_argument("--world", type=Path, required=True, help="folder of embedrl_verl.tiny.digits")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=defaults.steps, help="on judge's lists")
    args = parser.parse_args(argv)
    samples, checks = read_samples(args.world / "sft.parquet"), read_samples(args.world / "train.parquet")
    judge, _ = train_judge(samples, checks, JudgeTraining(steps=args.steps, seed=args.seed))
    judge.save(args.out)
    print(f"wrote the judge to {args.out}")


if __name__ == "__main__":
    main()
