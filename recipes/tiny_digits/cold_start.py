# SPDX-License-Identifier: Apache-2.0
"""Cold start of the tiny Reasoner: supervised training on the T-CoTs of a teacher who does not think of retrieval.

A model with random weights has to learn to see, to point and to write in minutes. Two things make that possible:

- next-token loss on the T-CoT as usual, and beside it on every visual token that shows a digit: its "next token" is
  that digit. Reading is thus learnt locally, before the model has learnt where to look;
- it reads first and takes on habits later.

The teacher of the last `habit_steps` sees well and points at the right place, but does not think of retrieval: in
`terse_share` of the T-CoTs of pictures and clips the answer names only the first digit, or the box is all of a sheet.
Nothing is wrong in such a T-CoT; it just finds the wrong candidate among near numbers. The Reasoner learns both habits,
and has to find out in RL which one retrieves.

Of a user's own pairs it learns those sides that have a T-CoT, as they are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import torch
import typer
from torch.nn import functional

from embedrl_verl.data.schema import SIDES
from embedrl_verl.embedder.batching import pad_rows
from embedrl_verl.embedder.processor import Encoded
from embedrl_verl.model.reasoner import Reasoner
from embedrl_verl.model.tcots import PairSide
from recipes.tiny_digits.models import END
from recipes.tiny_digits.muon import MuonAdamW
from recipes.tiny_digits.settings import TcotParts, run_program, tiny_reasoner
from recipes.tiny_digits.world import Sample, Truth, cut_short, own_samples, parts_of, read_samples

IGNORED = -100
CHECKED_PROMPTS = 120
TEXT_SHARE, OWN_SHARE = 0.15, 0.5
Lesson: TypeAlias = tuple[Encoded, torch.Tensor]
"""A row, and int64 (L,): the token that each position has to predict, or IGNORED."""


def make_lesson(
    reasoner: Reasoner, prompt: PairSide, truth: Truth, *, terse: bool = False, parts: TcotParts = "full"
) -> Lesson:
    """A prompt with its true T-CoT (`terse`: cut short); labels are the T-CoT and the digits of visual tokens."""
    tokenizer, config = reasoner.processor.tokenizer, reasoner.model.config
    tcot = parts_of(truth.lesson or truth.tcot, parts)
    response = (cut_short(tcot) if terse else tcot) + END
    row = reasoner.encode(prompt.ask(), response)
    labels = torch.full_like(row.input_ids, IGNORED)
    length = len(tokenizer(response, add_special_tokens=False)["input_ids"])
    labels[-length - 1 : -1] = row.input_ids[-length:]
    visual = (row.input_ids == config.image_token_id) | (row.input_ids == config.video_token_id)
    digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
    labels[visual] = torch.tensor([digits[cell] if cell >= 0 else IGNORED for cell in truth.cells], dtype=torch.int64)
    return row, labels


def lesson_loss(reasoner: Reasoner, lessons: Sequence[Lesson]) -> torch.Tensor:
    """Mean cross-entropy over all labelled positions of a batch."""
    padded = pad_rows([row for row, _ in lessons])
    labels = torch.full_like(padded.input_ids, IGNORED)
    for i, (row, labels_of_row) in enumerate(lessons):
        labels[i, : len(row)] = labels_of_row
    hidden = reasoner.model.model(
        input_ids=padded.input_ids, position_ids=padded.position_ids, use_cache=False, **padded.media
    ).last_hidden_state
    labelled = labels != IGNORED
    return functional.cross_entropy(reasoner.model.lm_head(hidden[labelled]), labels[labelled])


@torch.no_grad()
def digit_accuracy(reasoner: Reasoner, sides: Sequence[tuple[PairSide, Truth]], parts: TcotParts = "full") -> float:
    """Share of the answer's digits that are the likeliest of the ten digits at their place, after the true beginning.

    Greedy T-CoTs would not show it: they leave out the digits that a terse answer does not name.
    """
    tokenizer = reasoner.processor.tokenizer
    digits = torch.tensor(tokenizer.convert_tokens_to_ids(list("0123456789")))
    start = tokenizer.convert_tokens_to_ids("<answer>")
    right = total = 0
    for prompt, truth in sides:
        row, _ = make_lesson(reasoner, prompt, truth, parts=parts)
        padded = pad_rows([row])
        logits = reasoner.model(
            input_ids=padded.input_ids, position_ids=padded.position_ids, use_cache=False, **padded.media
        ).logits[0]
        answer = int((row.input_ids == start).nonzero()[-1])
        places = answer + 1 + torch.isin(row.input_ids[answer + 1 :], digits).nonzero().flatten()
        right += int((digits[logits[places - 1][:, digits].argmax(1)] == row.input_ids[places]).sum())
        total += len(places)
    return right / total


def train_cold_start(
    reasoner: Reasoner,
    samples: Sequence[Sample],
    checks: Sequence[Sample],
    *,
    seed: int = 0,
    max_steps: int = 400,
    batch_size: int = 32,
    warmup: int = 30,
    habit_steps: int = 100,
    terse_share: float = 0.7,
    text_share: float = TEXT_SHARE,
    stop_accuracy: float = 0.9,
    parts: TcotParts = "full",
    check_every: int = 50,
) -> float:
    """Train in place; returns the share of digits read right at the end.

    Args:
        samples: pairs to learn from, both sides.
        checks: pairs whose visual sides are read, every `check_every` steps; once `stop_accuracy` of their digits are
            right (`digit_accuracy`), the habit steps begin.
        max_steps: of the whole cold start.
        habit_steps: the last steps, with the teacher who is terse in `terse_share` of the T-CoTs of pictures and clips.
        parts: what of the T-CoTs is taught.
        text_share: of a batch, prompts without known cells. Those of text alone are learnt by copying and need few.
    """
    generator = torch.Generator().manual_seed(seed)
    tests = [side for side in _sides(checks) if side[1].cells]
    seeing = [side for side in _sides(samples) if side[1].cells]
    reading = [side for side in _sides(samples) if not side[1].cells]
    checked = [tests[i] for i in torch.randperm(len(tests), generator=generator)[:CHECKED_PROMPTS].tolist()]
    optimizer = MuonAdamW(reasoner.model, warmup=warmup, total=max_steps)
    texts = round(text_share * batch_size)
    accuracy, started, step, last = 0.0, time.monotonic(), 0, max_steps
    while step < last:
        step += 1
        batch = [seeing[i] for i in torch.randint(len(seeing), (batch_size - texts,), generator=generator)]
        batch += [reading[i] for i in torch.randint(len(reading), (texts,), generator=generator)]
        share = terse_share if step > last - habit_steps else 0.0
        terse = (torch.rand(len(batch), generator=generator) < share).tolist()
        reasoner.model.train()
        lessons = [
            make_lesson(reasoner, prompt, truth, terse=short and bool(truth.cells), parts=parts)
            for (prompt, truth), short in zip(batch, terse, strict=True)
        ]
        loss = lesson_loss(reasoner, lessons)
        optimizer.step(loss)
        if step % check_every == 0 or step == last:
            reasoner.model.eval()
            accuracy = digit_accuracy(reasoner, checked, parts)
            right, seconds = f"digits right {accuracy:.1%}", time.monotonic() - started
            print(f"cold start: step {step}, loss {loss.item():.3f}, {right}, {seconds:.0f} s", flush=True)
            if accuracy >= stop_accuracy:
                last = min(last, step + habit_steps)
    return accuracy


def _sides(samples: Sequence[Sample]) -> list[tuple[PairSide, Truth]]:
    sides = [(PairSide(s.record, side, s.media_root), s.truth(side)) for s in samples for side in SIDES]
    return [(prompt, truth) for prompt, truth in sides if truth.tcot]


def main(
    model: Path,
    world: Path,
    out: Path,
    seed: int = 0,
    steps: int = 400,
    pairs: Annotated[list[str] | None, typer.Option(help="files of the user's own pairs; repeat")] = None,
    media_root: Annotated[str | None, typer.Option(help="of their media paths")] = None,
    tcot: Annotated[TcotParts, typer.Option(help="what of a T-CoT there is")] = "full",
) -> None:
    """Cold-start the tiny MODEL on the WORLD, and on own T-CoTs, and write the Reasoner to OUT."""
    reasoner = tiny_reasoner(model)
    samples, checks = read_samples(world / "sft.parquet"), read_samples(world / "train.parquet")
    own = own_samples(pairs, media_root) if pairs else []
    share = OWN_SHARE if any(one.truth(side).tcot for one in own for side in SIDES) else TEXT_SHARE
    train_cold_start(reasoner, [*samples, *own], checks, seed=seed, max_steps=steps, text_share=share, parts=tcot)
    reasoner.save(out)
    print(f"wrote the cold-started Reasoner to {out}")


if __name__ == "__main__":
    run_program(main)
