# SPDX-License-Identifier: Apache-2.0
"""A tiny instruct model that names the matching candidate: the judge of the digits world.

A Qwen2 of about a million parameters learns from judge's lists as RL will make them, prompts written by the same code
(`embedrl_verl.judge`), over T-CoTs of the cold start's pairs: numbers as they are, cut short, or with a digit misread.
It never sees a picture and no policy's T-CoT, and it is frozen in RL.

To look a text up in a list is an ability that transformers get suddenly and, from long lists, late. So it is drilled
first, on lists of two lines, then longer ones (a level a time, the next when 85% are right); and the heads of the first
two layers begin by looking a fixed number of tokens back, which is how the digits of a number come together. Then come
judge's lists, several questions about each, and at last single questions.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from embedrl_verl.data.schema import SIDES, Side
from embedrl_verl.errors import ConfigError
from embedrl_verl.judge import judge_prompt, judge_style, parse_choice
from embedrl_verl.tcot import TCoT, parse_tcot
from recipes.tiny_digits.judge_model import IGNORED, Lesson, TinyJudge
from recipes.tiny_digits.models import END
from recipes.tiny_digits.muon import MuonAdamW
from recipes.tiny_digits.settings import run_program
from recipes.tiny_digits.world import FAMILY_SIZE, SHEET_ANSWER, Sample, cut_short, read_samples

STYLE = "compact"
DRILL_STEPS = 800
"""At most, of all levels together."""
DRILL_TOKENS = 2600  # of a batch of drills
STEPS, BATCH_SIZE = 400, 16  # on judge's lists
QUESTIONS = 8
"""About one list, in a conversation; the last quarter of the steps has one question a list as often."""
GROWN = 0.4
"""Share of the steps after which all lists have their full length and all T-CoTs their faults."""
OWN_CANDIDATES, HARD_PAIRS = 8, 4  # of a full list
CUT_SHARE, MISREAD_SHARE = 0.25, 0.25  # of the T-CoTs of pictures
CHECKED_LISTS = 200


class Level(NamedTuple):
    """A drill: lists of `keys` numbers of `digits` digits (or one less), looked up until there are `lines` lines."""

    keys: int
    lines: int
    digits: int


LEVELS = (Level(2, 6, 1), Level(3, 9, 1), Level(3, 10, 2), Level(5, 16, 3), Level(7, 22, 4), Level(9, 28, 5))


class JudgedList(NamedTuple):
    """A conversation about one list.

    Attributes:
        questions: contents of the user's turns; the first holds the list.
        answers: right candidates of each question, counted from 1.
        own: which candidates are of the pair that the first question asks about.
    """

    questions: list[str]
    answers: list[tuple[int, ...]]
    own: list[bool]


class ListMaker:
    """Draws lists from the world's pairs; families of near numbers lie side by side in `samples`."""

    def __init__(self, samples: Sequence[Sample], rng: random.Random) -> None:
        self._rng = rng
        self._families: dict[str, list[Sequence[Sample]]] = {}
        for start in range(0, len(samples), FAMILY_SIZE):
            family = samples[start : start + FAMILY_SIZE]
            if any(parse_tcot(family[0].truth(side).tcot).answer == SHEET_ANSWER for side in SIDES):
                continue  # it names no number: a judge that reads T-CoTs has nothing to go by
            self._families.setdefault(family[0].record.data_source, []).append(family)

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
            candidates = [(self._write(pairs[0], other, grown), True) for _ in range(count)]
            candidates += [(self._write(pair, other, grown), False) for pair in pairs[1:]]
            rng.shuffle(candidates)
            texts, own = [tcot for tcot, _ in candidates], [is_own for _, is_own in candidates]
            asked: list[TCoT] = []
            answers: list[tuple[int, ...]] = []
            for _ in range(20 * questions):
                tcot = self._write(rng.choice(pairs) if asked else pairs[0], side, grown)
                best = best_matches(tcot.answer, [text.answer for text in texts])
                if best and (asked or all(own[i - 1] for i in best)):
                    asked.append(tcot)
                    answers.append(best)
                if len(asked) == questions:
                    prompt = judge_prompt(texts, side=side, style=STYLE)
                    turns = [str(prompt.messages(one)[0]["content"]) for one in asked]
                    shared = len(prompt.body) + len(prompt.style.join)
                    return JudgedList([turns[0], *(turn[shared:] for turn in turns[1:])], answers, own)

    def _pairs(self, grown: float) -> tuple[list[Sample], int]:
        """The own pair first, and how many candidates it has."""
        rng = self._rng
        families = self._families[rng.choice(sorted(self._families))]
        if rng.random() < grown:
            near, far = rng.sample(families, 2)
            own, *others = rng.sample(near, len(near))
            return [own, *[*others, rng.choice(far)][-HARD_PAIRS:]], OWN_CANDIDATES
        return [rng.choice(family) for family in rng.sample(families, rng.randint(3, 7))], rng.choice([1, 1, 2])

    def _write(self, sample: Sample, side: Side, grown: float) -> TCoT:
        truth, chance = sample.truth(side), self._rng.random() / max(grown, 1e-9)
        if truth.cells and chance < CUT_SHARE:
            return parse_tcot(cut_short(truth.tcot))
        if truth.cells and chance < CUT_SHARE + MISREAD_SHARE:
            return parse_tcot(misread(truth.tcot, self._rng))
        return parse_tcot(truth.tcot)


def misread(tcot: str, rng: random.Random) -> str:
    """The T-CoT with one digit of its answer replaced by another."""
    start = tcot.index("<answer>")
    place = rng.choice([start + match.start() for match in re.finditer(r"\d", tcot[start:])])
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
    shorter, longer = sorted((judged, candidate), key=len)
    return 0.5 if longer.startswith(shorter) else float(len(longer))


def drill(level: Level, judge: TinyJudge, rng: random.Random) -> Lesson:
    """Lines of a list, numbered at random; every line that repeats one has a label."""
    style = judge_style(STYLE)
    keys: list[str] = []
    while len(keys) < level.keys:
        digits = rng.randint(max(1, level.digits - 1), level.digits)
        key = "".join(rng.choice("0123456789") for _ in range(digits))
        keys += [key] if key not in keys else []
    numbers = dict(zip(keys, rng.sample("123456789", level.keys), strict=True))
    ids: list[int] = []
    labels: list[int] = []
    end = judge.ids(style.join)
    for line in range(level.lines):
        key = keys[line] if line < level.keys else rng.choice(keys)
        text = style.candidate(numbers[key], key)
        asked, answer = judge.ids(text[: text.rindex(numbers[key])]), judge.ids(numbers[key])
        ids += asked + answer + end
        known = answer[0] if line >= level.keys else IGNORED
        labels += [IGNORED] * (len(asked) - 1) + [known, IGNORED] + [IGNORED] * len(end)
    return ids, labels


def lesson(one: JudgedList, judge: TinyJudge, rng: random.Random) -> Lesson:
    """A conversation; of several right candidates one is the label. The answer is asked for twice: where it has to be
    given, and where the question ends."""
    ids: list[int] = []
    labels: list[int] = []
    between = judge.ids("\n")
    for question, right in zip(one.questions, one.answers, strict=True):
        opened, closed = judge.turn(question)
        answer = judge.ids(f"{rng.choice(right)}{END}")
        ids += opened + closed + answer + between
        labels += [IGNORED] * (len(opened) - 1) + [answer[0]] + [IGNORED] * (len(closed) - 1)
        labels += [*answer, IGNORED] + [IGNORED] * len(between)
    return ids, labels


def check_judge(judge: TinyJudge, maker: ListMaker) -> tuple[float, float]:
    """Shares of full lists: own candidate named, and what a blind judge would hit."""
    lists = [maker.draw() for _ in range(CHECKED_LISTS)]
    named = [parse_choice(judge.answer(one.questions[0]), len(one.own)) for one in lists]
    hits = [number is not None and one.own[number - 1] for one, number in zip(lists, named, strict=True)]
    return sum(hits) / len(lists), sum(sum(one.own) / len(one.own) for one in lists) / len(lists)


def train_judge(samples: Sequence[Sample], checks: Sequence[Sample], seed: int) -> TinyJudge:
    """A judge trained on `samples` and measured on `checks`."""
    rng, judge = random.Random(seed), TinyJudge(seed=seed)
    optimizer = MuonAdamW(judge.model, total=DRILL_STEPS // 2 + STEPS)
    started, step = time.monotonic(), 0

    def update(lessons: list[Lesson]) -> float:
        loss, accuracy = judge.loss(lessons)
        optimizer.step(loss)
        return accuracy

    def report(what: str) -> None:
        print(f"judge: {what}, {time.monotonic() - started:.0f} s", flush=True)

    for number, level in enumerate(LEVELS, start=1):
        right = 0.0
        rows = max(8, DRILL_TOKENS // (level.lines * (level.digits + 3)))
        while right < 0.85:
            step += 1
            if step > DRILL_STEPS:
                raise ConfigError(f"the judge has not learnt drill {number} in {DRILL_STEPS} steps: try another seed")
            right = 0.9 * right + 0.1 * update([drill(level, judge, rng) for _ in range(rows)])
        report(f"drill {number} of {len(LEVELS)} learnt after {step} steps")
    maker = ListMaker(samples, rng)
    for step in range(1, STEPS + 1):
        grown, last = min(1.0, step / (GROWN * STEPS)), step > 0.75 * STEPS
        lists = [
            maker.draw(questions=rng.choice([1, QUESTIONS]) if last else QUESTIONS, grown=grown)
            for _ in range(BATCH_SIZE)
        ]
        right = update([lesson(one, judge, rng) for one in lists])
        if step % 100 == 0:
            report(f"step {step}, {right:.1%} of the tokens right")
    hit, blind = check_judge(judge, ListMaker(checks, random.Random(seed + 1)))
    report(f"own pair named in {hit:.1%} of {CHECKED_LISTS} new lists; blind {blind:.1%}")
    return judge


def main(world: Path, out: Path, seed: int = 0) -> None:
    """Train a judge on the WORLD and write it to OUT."""
    train_judge(read_samples(world / "sft.parquet"), read_samples(world / "train.parquet"), seed).save(out)
    print(f"wrote the judge to {out}")


if __name__ == "__main__":
    run_program(main)
