# SPDX-License-Identifier: Apache-2.0
"""A tiny instruct model that names the matching candidate: the judge of the digits world.

A Qwen2 of about a million parameters learns from judge's lists as RL will make them, prompts written by the same code
(`embedrl_verl.judge`), over T-CoTs of the cold start's pairs: numbers as they are, cut short, or with a digit misread.
It never sees a picture and no policy's T-CoT, and it is frozen in RL.

Two things make it learn in minutes. Lists begin short and grow. And next-token loss on the prompt itself, with a small
weight, teaches copying early: a list repeats the own pair's number, and "which line starts with this" is copying
backwards.

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

import torch
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from embedrl_verl.data.schema import SIDES
from embedrl_verl.errors import ConfigError
from embedrl_verl.judge import judge_messages, parse_choice
from embedrl_verl.rewards import Side
from embedrl_verl.tcot import TCoT, parse_tcot
from embedrl_verl.tiny.digits import FAMILY_SIZE, Sample, cut_short, read_samples
from embedrl_verl.tiny.models import CHAT_TEMPLATE
from embedrl_verl.tiny.optim import MuonAdamW
from embedrl_verl.tiny.tokenizer import build_tokenizer

END = "<|im_end|>"
IGNORED = -100
STYLE = "compact"


@dataclass(frozen=True)
class JudgeTraining:
    """Settings of the tiny judge.

    Attributes:
        steps, batch_size, lr, muon_lr, warmup: of its training (see `MuonAdamW`).
        prompt_weight: of the next-token loss on the prompt.
        grown: share of the steps after which lists have their full length.
        rollouts, hard_pairs: candidates of the own pair, and other pairs, in a full list.
        terse, misread: share of the T-CoTs of pictures whose number is cut short, or has a wrong digit.
        checks: lists of the measurement at the end, from pairs it was not trained on.
        hidden_size, layers: of the model.
    """

    steps: int = 1000
    batch_size: int = 32
    lr: float = 2e-3
    muon_lr: float = 3e-3
    warmup: int = 30
    prompt_weight: float = 0.3
    grown: float = 0.4
    rollouts: int = 8
    hard_pairs: int = 4
    terse: float = 0.25
    misread: float = 0.25
    checks: int = 200
    hidden_size: int = 128
    layers: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.rollouts, self.checks, self.layers, self.warmup) < 1:
            raise ConfigError(f"counts of JudgeTraining must be at least 1; got {self}")
        if not 1 <= self.hard_pairs <= FAMILY_SIZE:
            raise ConfigError(f"hard_pairs must be 1 to {FAMILY_SIZE}: near numbers and a far one; got {self}")
        if min(self.terse, self.misread) < 0 or self.terse + self.misread > 1:
            raise ConfigError(f"terse and misread are shares whose sum is at most 1; got {self}")


@dataclass(frozen=True)
class JudgedList:
    """One question: the messages, which candidates are of the own pair, and those that are right to name (from 1)."""

    messages: list[dict[str, object]]
    own: tuple[bool, ...]
    right: tuple[int, ...]


class ListMaker:
    """Draws lists from the world's pairs; families of near numbers lie side by side in `samples`."""

    def __init__(self, samples: Sequence[Sample], config: JudgeTraining, rng: random.Random) -> None:
        self._config, self._rng = config, rng
        families: dict[str, list[list[Sample]]] = {}
        for start in range(0, len(samples), FAMILY_SIZE):
            family = list(samples[start : start + FAMILY_SIZE])
            families.setdefault(family[0].record.data_source, []).append(family)
        self._families = families

    def draw(self, grown: float = 1.0) -> JudgedList:
        """One list; with `grown` below 1 it may be shorter. A list in which a stranger matches best is drawn anew."""
        rng, config = self._rng, self._config
        while True:
            families = self._families[rng.choice(sorted(self._families))]
            near, far = rng.sample(families, 2)
            own, *others = rng.sample(near, len(near))
            side: Side = rng.choice(SIDES)
            other: Side = "target" if side == "query" else "query"
            full = rng.random() < grown
            others = [*others, rng.choice(far)][-config.hard_pairs :] if full else [rng.choice(others)]
            count = config.rollouts if full else rng.choice([1, 2, 4])
            judged = self._write(own, side)
            candidates = [(self._write(own, other), True) for _ in range(count)]
            candidates += [(self._write(stranger, other), False) for stranger in others]
            rng.shuffle(candidates)
            gaps = [_gap(judged.answer, tcot.answer) for tcot, _ in candidates]
            best = [i for i, gap in enumerate(gaps) if gap == min(gaps)]
            if all(candidates[i][1] for i in best):
                messages = judge_messages([tcot for tcot, _ in candidates], judged, side=side, style=STYLE)
                return JudgedList(messages, tuple(mine for _, mine in candidates), tuple(i + 1 for i in best))

    def _write(self, sample: Sample, side: Side) -> TCoT:
        truth, rng = sample.truth(side), self._rng
        chance = rng.random()
        if truth.cells and chance < self._config.terse:
            return parse_tcot(cut_short(truth.tcot))
        if truth.cells and chance < self._config.terse + self._config.misread:
            return parse_tcot(misread(truth.tcot, rng))
        return parse_tcot(truth.tcot)


def misread(tcot: str, rng: random.Random) -> str:
    """The T-CoT with one digit of its answer replaced by another."""
    start = tcot.index("<answer>")
    places = [match.start() for match in re.finditer(r"\d", tcot[start:])]
    place = start + rng.choice(places)
    other = rng.choice([digit for digit in "0123456789" if digit != tcot[place]])
    return tcot[:place] + other + tcot[place + 1 :]


def _gap(judged: str, candidate: str) -> float:
    """How far two answers are apart: wrong places of equally long ones; a beginning of the other counts as half."""
    if len(judged) == len(candidate):
        return sum(a != b for a, b in zip(judged, candidate, strict=True))
    longer, shorter = sorted((judged, candidate), key=len, reverse=True)
    return 0.5 if longer.startswith(shorter) else float(len(longer))


def build_judge(config: JudgeTraining, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """The model with random weights."""
    end, pad = (int(tokenizer.convert_tokens_to_ids(token)) for token in (END, "<|endoftext|>"))
    heads = config.hidden_size // 32  # vLLM's CPU attention wants a head size of 32 or 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=-(-len(tokenizer) // 64) * 64,
                hidden_size=config.hidden_size,
                intermediate_size=3 * config.hidden_size,
                num_hidden_layers=config.layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=4096,
                initializer_range=0.05,
                rope_parameters={"rope_type": "default", "rope_theta": 100.0},
                bos_token_id=pad,
                eos_token_id=end,
                pad_token_id=pad,
            )
        )
    model.generation_config = GenerationConfig(bos_token_id=pad, eos_token_id=[end, pad], pad_token_id=pad)
    return model


class TinyJudge:
    """Model and tokenizer; the chat template is the tiny Reasoner's."""

    def __init__(self, config: JudgeTraining) -> None:
        self.tokenizer = build_tokenizer(with_emb_token=False)
        self.tokenizer.chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
        self.model = build_judge(config, self.tokenizer)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, messages: list[dict[str, object]]) -> str:
        """The messages as the server writes them."""
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def loss(self, lists: Sequence[JudgedList], choices: Sequence[int], prompt_weight: float) -> torch.Tensor:
        """Cross-entropy of the numbers named, plus `prompt_weight` times that of all tokens."""
        prompts = [self._ids(self.prompt(one.messages)) for one in lists]
        answers = [self._ids(f"{choice}{END}") for choice in choices]
        longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.full((len(lists), longest), self.tokenizer.pad_token_id)
        answer_labels, all_labels = torch.full_like(ids, IGNORED), torch.full_like(ids, IGNORED)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            row = torch.tensor(prompt + answer)
            ids[i, : len(row)] = row
            all_labels[i, : len(row) - 1] = row[1:]
            answer_labels[i, len(prompt) - 1 : len(row) - 1] = row[len(prompt) :]
        logits = self.model(input_ids=ids, use_cache=False).logits
        losses = [
            functional.cross_entropy(logits[labels != IGNORED], labels[labels != IGNORED])
            for labels in (answer_labels, all_labels)
        ]
        return losses[0] + prompt_weight * losses[1]

    @torch.no_grad()
    def name(self, one: JudgedList) -> int | None:
        """The number it names, decoded greedily; None = none of the list."""
        prompt = self._ids(self.prompt(one.messages))
        output = self.model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=4, do_sample=False)
        text = self.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)
        return parse_choice(str(text), len(one.own))

    def save(self, path: Path) -> None:
        """Write a Hugging Face folder."""
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)


@dataclass(frozen=True)
class JudgeReport:
    """Shares in [0, 1] over the check's lists: own candidate named, what a blind judge would hit, nothing named."""

    hit: float
    blind: float
    unknown: float


def check_judge(judge: TinyJudge, maker: ListMaker, count: int) -> JudgeReport:
    """Ask it about `count` full lists."""
    judge.model.eval()
    lists = [maker.draw() for _ in range(count)]
    named = [judge.name(one) for one in lists]
    hits = [number is not None and one.own[number - 1] for one, number in zip(lists, named, strict=True)]
    blind = [sum(one.own) / len(one.own) for one in lists]
    return JudgeReport(sum(hits) / count, sum(blind) / count, sum(number is None for number in named) / count)


def train_judge(samples: Sequence[Sample], checks: Sequence[Sample], config: JudgeTraining) -> TinyJudge:
    """Train a judge on `samples` and print how often it is right on `checks`."""
    rng = random.Random(config.seed)
    maker = ListMaker(samples, config, rng)
    judge = TinyJudge(config)
    optimizer = MuonAdamW(judge.model, lr=config.lr, muon_lr=config.muon_lr, warmup=config.warmup, total=config.steps)
    started = time.monotonic()
    for step in range(1, config.steps + 1):
        judge.model.train()
        grown = min(1.0, step / (config.grown * config.steps))
        lists = [maker.draw(grown) for _ in range(config.batch_size)]
        loss = judge.loss(lists, [rng.choice(one.right) for one in lists], config.prompt_weight)
        optimizer.step(loss)
        if step % 100 == 0 or step == config.steps:
            print(f"judge: step {step}, loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
    report = check_judge(judge, ListMaker(checks, config, random.Random(config.seed + 1)), config.checks)
    print(f"judge: own pair named in {report.hit:.1%} of new lists, blind {report.blind:.1%}", flush=True)
    return judge


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: train a tiny judge on a digits world."""
    parser = argparse.ArgumentParser(prog="python -m embedrl_verl.tiny.judge", description=train_judge.__doc__)
    parser.add_argument("--world", type=Path, required=True, help="folder of embedrl_verl.tiny.digits")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=JudgeTraining.steps)
    args = parser.parse_args(argv)
    samples, checks = read_samples(args.world / "sft.parquet"), read_samples(args.world / "train.parquet")
    train_judge(samples, checks, JudgeTraining(steps=args.steps, seed=args.seed)).save(args.out)
    print(f"wrote the judge to {args.out}")


if __name__ == "__main__":
    main()
