# SPDX-License-Identifier: Apache-2.0
"""Cold start of the tiny Reasoner: supervised training on the T-CoTs of a teacher who does not think of retrieval.

A model with random weights has to learn to see, to point and to write in minutes. Two things make that possible:

- next-token loss on the T-CoT as usual, and beside it on every visual token that shows a digit: its "next token" is
  that digit. Reading is thus learnt locally, before the model has learnt where to look;
- it reads first and takes on habits later.

The teacher of the last `habit_steps` sees well and points at the right place, but does not think of retrieval: in
`terse_share` of the T-CoTs of pictures and clips the answer names only the first digit. Nothing is wrong in such a
T-CoT; it just finds the wrong candidate among near numbers. The Reasoner learns both habits, and has to find out in RL
which one retrieves.

Command: `python -m embedrl_verl.tiny.sft --model DIR --world DIR --out DIR [--seed 0]`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from embedrl_verl.data.schema import SIDES
from embedrl_verl.embedder.batching import pad_rows
from embedrl_verl.embedder.processor import Encoded
from embedrl_verl.errors import ConfigError
from embedrl_verl.tcot import parse_tcot
from embedrl_verl.tiny.digits import Sample, Truth, cut_short, read_samples
from embedrl_verl.tiny.optim import MuonAdamW
from embedrl_verl.tiny.reasoner import END, Prompt, Reasoner

IGNORED = -100


@dataclass(frozen=True)
class SftConfig:
    """Settings of the cold start.

    Attributes:
        max_steps, batch_size: of the whole cold start.
        lr, muon_lr, warmup: see `MuonAdamW`.
        habit_steps: the last steps, with the teacher who is often terse.
        terse_share: share of its T-CoTs of pictures and clips whose answer is cut short.
        text_share: share of text-only prompts in a batch; they are learnt by copying and need few.
        stop_accuracy: share of digits read right (new pictures, see `digit_accuracy`) at which the habit steps begin.
        check_every: steps between two measurements of it.
        check_prompts: pictures and clips of one measurement.
    """

    max_steps: int = 400
    batch_size: int = 32
    lr: float = 2e-3
    muon_lr: float = 3e-3
    warmup: int = 30
    habit_steps: int = 100
    terse_share: float = 0.7
    text_share: float = 0.15
    stop_accuracy: float = 0.9
    check_every: int = 50
    check_prompts: int = 120
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.batch_size, self.warmup, self.check_every, self.check_prompts) < 1 or self.habit_steps < 0:
            raise ConfigError(f"counts of SftConfig must be at least 1, habit_steps 0; got {self}")
        if self.max_steps <= self.habit_steps:
            raise ConfigError(f"max_steps must be above habit_steps; got {self}")
        if not all(0 <= share < 1 for share in (self.text_share, self.terse_share)):
            raise ConfigError(f"text_share and terse_share must be in [0, 1); got {self}")
        if not (0 < self.stop_accuracy <= 1 and min(self.lr, self.muon_lr) > 0):
            raise ConfigError(f"stop_accuracy must be in (0, 1], learning rates positive; got {self}")


@dataclass(frozen=True, eq=False)
class _Lesson:
    """One supervised row: labels int64 (L,) name the token that each position has to predict, or IGNORED."""

    row: Encoded
    labels: torch.Tensor


def make_lesson(reasoner: Reasoner, prompt: Prompt, truth: Truth, *, terse: bool = False) -> _Lesson:
    """The row of a prompt with its true T-CoT, labelled on the T-CoT and on the visual tokens that show a digit.

    `terse`: the answer is cut short.
    """
    tokenizer = reasoner.processor.tokenizer
    response = (cut_short(truth.tcot) if terse else truth.tcot) + END
    row = reasoner.encode(prompt, response)
    labels = torch.full_like(row.input_ids, IGNORED)
    length = len(tokenizer(response, add_special_tokens=False)["input_ids"])
    labels[-length - 1 : -1] = row.input_ids[-length:]
    config = reasoner.model.config
    visual = (row.input_ids == config.image_token_id) | (row.input_ids == config.video_token_id)
    digits = tokenizer.convert_tokens_to_ids([str(cell) if cell >= 0 else "0" for cell in truth.cells])
    shown = [token if cell >= 0 else IGNORED for token, cell in zip(digits, truth.cells, strict=True)]
    labels[visual] = torch.tensor(shown, dtype=torch.int64)
    return _Lesson(row, labels)


def lesson_loss(reasoner: Reasoner, lessons: Sequence[_Lesson]) -> torch.Tensor:
    """Mean cross-entropy over all labelled positions of a batch."""
    padded = pad_rows([lesson.row for lesson in lessons])
    labels = torch.full_like(padded.input_ids, IGNORED)
    for i, lesson in enumerate(lessons):
        labels[i, : len(lesson.labels)] = lesson.labels
    hidden = reasoner.model.model(
        input_ids=padded.input_ids, position_ids=padded.position_ids, use_cache=False, **padded.media
    ).last_hidden_state
    labelled = labels != IGNORED
    return functional.cross_entropy(reasoner.model.lm_head(hidden[labelled]), labels[labelled])


@torch.no_grad()
def digit_accuracy(reasoner: Reasoner, sides: Sequence[tuple[Prompt, Truth]]) -> float:
    """Share of the answer's digits that are the likeliest of the ten digits at their place, after the true beginning.

    Greedy T-CoTs would not show it: they leave out the digits that a terse answer does not name.
    """
    tokenizer, model = reasoner.processor.tokenizer, reasoner.model
    digits = torch.tensor(tokenizer.convert_tokens_to_ids(list("0123456789")))
    start = tokenizer.convert_tokens_to_ids("<answer>")
    right = total = 0
    for prompt, truth in sides:
        row = make_lesson(reasoner, prompt, truth).row
        padded = pad_rows([row])
        logits = model(
            input_ids=padded.input_ids, position_ids=padded.position_ids, use_cache=False, **padded.media
        ).logits[0]
        answer = int((row.input_ids == start).nonzero()[-1])
        places = answer + 1 + torch.isin(row.input_ids[answer + 1 :], digits).nonzero().flatten()
        right += int((digits[logits[places - 1][:, digits].argmax(1)] == row.input_ids[places]).sum())
        total += len(places)
    return right / total


@dataclass(frozen=True)
class Reading:
    """How well numbers were read; shares in [0, 1], digits compared place by place.

    Attributes:
        digits: share of the true digits that were written at their place.
        written: share of the written digits that are right; what was left out does not count. 0 when none was written.
        exact: share of answers that are right as a whole.
    """

    digits: float
    written: float
    exact: float


def read_accuracy(texts: Sequence[str], truths: Sequence[Truth]) -> Reading:
    """Compare the answers of T-CoTs with the true ones."""
    right = true = written = exact = 0
    for text, truth in zip(texts, truths, strict=True):
        wanted, found = parse_tcot(truth.tcot).answer, parse_tcot(text).answer
        exact += wanted == found
        true += sum(sign.isdigit() for sign in wanted)
        written += sum(sign.isdigit() for sign in found)
        right += sum(a == b for a, b in zip(wanted, found, strict=False) if a.isdigit())
    return Reading(right / true, right / max(written, 1), exact / len(truths))


def train_sft(reasoner: Reasoner, lessons: Sequence[Sample], checks: Sequence[Sample], config: SftConfig) -> float:
    """Train in place; returns the share of digits read right at the end.

    Args:
        lessons: pairs to learn from, both sides.
        checks: pairs whose visual sides are read to decide when to stop.
    """
    generator = torch.Generator().manual_seed(config.seed)
    lessons_of, tests = _sides(lessons), [side for side in _sides(checks) if side[1].cells]
    seeing = [side for side in lessons_of if side[1].cells]
    reading = [side for side in lessons_of if not side[1].cells]
    picks = torch.randperm(len(tests), generator=generator)[: config.check_prompts].tolist()
    checked = [tests[i] for i in picks]

    optimizer = MuonAdamW(
        reasoner.model, lr=config.lr, muon_lr=config.muon_lr, warmup=config.warmup, total=config.max_steps
    )
    texts = round(config.text_share * config.batch_size)
    accuracy, started = 0.0, time.monotonic()
    step, last = 0, config.max_steps
    while step < last:
        step += 1
        batch = [seeing[i] for i in torch.randint(len(seeing), (config.batch_size - texts,), generator=generator)]
        batch += [reading[i] for i in torch.randint(len(reading), (texts,), generator=generator)]
        terse_share = config.terse_share if step > last - config.habit_steps else 0.0
        terse = (torch.rand(len(batch), generator=generator) < terse_share).tolist()
        reasoner.model.train()
        loss = lesson_loss(
            reasoner,
            [
                make_lesson(reasoner, prompt, truth, terse=short and bool(truth.cells))
                for (prompt, truth), short in zip(batch, terse, strict=True)
            ],
        )
        optimizer.step(loss)
        if step % config.check_every == 0 or step == last:
            reasoner.model.eval()
            accuracy = digit_accuracy(reasoner, checked)
            seconds = time.monotonic() - started
            print(
                f"cold start: step {step}, loss {loss.item():.3f}, digits right {accuracy:.1%}, {seconds:.0f} s",
                flush=True,
            )
            if accuracy >= config.stop_accuracy:
                last = min(last, step + config.habit_steps)
    return accuracy


def _sides(samples: Sequence[Sample]) -> list[tuple[Prompt, Truth]]:
    return [(Prompt(s.record, side), s.truth(side)) for s in samples for side in SIDES]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: cold-start a tiny Reasoner."""
    parser = argparse.ArgumentParser(prog="python -m embedrl_verl.tiny.sft", description=train_sft.__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of embedrl_verl.tiny.models")
    parser.add_argument("--world", type=Path, required=True, help="folder of embedrl_verl.tiny.digits")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the Reasoner to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=SftConfig.max_steps)
    parser.add_argument("--stop-accuracy", type=float, default=SftConfig.stop_accuracy)
    args = parser.parse_args(argv)
    reasoner = Reasoner.from_pretrained(args.model)
    config = SftConfig(max_steps=args.max_steps, stop_accuracy=args.stop_accuracy, seed=args.seed)
    lessons, checks = read_samples(args.world / "sft.parquet"), read_samples(args.world / "train.parquet")
    train_sft(reasoner, lessons, checks, config)
    reasoner.save(args.out)
    print(f"wrote the cold-started Reasoner to {args.out}")


if __name__ == "__main__":
    main()
