# SPDX-License-Identifier: Apache-2.0
"""Reward maths against a per-row Python loop and against one bare matrix product with top-k, in the same run.

    python benchmarks/bench_reward_math.py [--rows 512 1024 4096 16384] [--dim 2048] [--rollouts 8]
    python benchmarks/bench_reward_math.py --table functions --rows 512 1024 4096

prints markdown tables. In the first, with R rows a side, S is (R, R) and a step has 2R rollouts. Times are the best of
several rounds that alternate:

- rewards: outcome of both directions (masks, false negatives, ties) and the total, from S;
- all: the same from the embeddings, S included;
- bare: one float32 `E_q @ E_t.T` and one `topk` of its rows, which is less than any reward must do;
- loop: the same definition as `rewards`, a Python loop over the rows with loops over the columns, from S as lists. In
  full up to 4,096 rows; above, 64 rows a direction and multiplied (~), since every row costs the same;
- torch loop: one row at a time in torch operations without masks, from S; 256 rows and multiplied (~).

Peak is what `all` adds to the memory of the process. Every size runs in a fresh process.

The second has the ready-made reward functions on one RewardBatch (raw embeddings included, the judge answers at once),
and their time over that of outcome_only. A batch is built once, outside the time.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from embedrl_verl.rewards import OutcomeReward, RewardBatch, outcome_reward, similarity_matrix, total_reward
from embedrl_verl.rewards.functions import NEEDS
from embedrl_verl.rewards.load import load_reward_function
from embedrl_verl.tcot import parse_tcot

FULL_LOOP_ROWS, SAMPLED_ROWS, TORCH_ROWS = 4096, 64, 256
TEMPERATURE = 0.5


def both_directions(similarity: Tensor, pair: Tensor, valid: Tensor, form: Tensor) -> list[OutcomeReward]:
    """What a step computes from S; `form` (R,) stands for the format term, the pair is its own content."""
    result = []
    for scores in (similarity, similarity.T):
        outcome = outcome_reward(
            scores,
            pair,
            pair,
            col_content=torch.stack((pair, pair), dim=1),
            col_valid=valid,
            row_valid=valid,
            temperature=TEMPERATURE,
        )
        total_reward(form, torch.full_like(form, torch.nan), outcome.outcome, beta=0.0, gamma=0.8)
        result.append(outcome)
    return result


def loop_rows(scores: list[list[float]], pair: list[int], valid: list[bool], rows: range) -> list[float]:
    """Outcomes of `rows` (scores[k] belongs to rows[k]), as written on paper; the pair is its own content."""
    result = []
    for row, i in zip(scores, rows, strict=True):
        shown = {pair[j] for j in range(len(row)) if pair[j] == pair[i]}
        positives, negatives = [], []
        for j, score in enumerate(row):
            if not valid[j]:
                continue
            if pair[j] == pair[i]:
                positives.append(score)
            elif pair[j] not in shown:
                negatives.append(score)
        if not valid[i] or not positives:
            result.append(math.nan)
            continue
        top = sorted([(-s, 1) for s in positives] + [(-s, 0) for s in negatives])[: len(positives)]
        share = sum(positive for _, positive in top) / len(positives)
        weights = [math.exp(s / TEMPERATURE) for s in negatives]
        hard = sum(w * s for w, s in zip(weights, negatives, strict=True)) / sum(weights)
        result.append(share * (sum(positives) / len(positives) - hard))
    return result


def torch_rows(similarity: Tensor, pair: Tensor, rows: range) -> list[float]:
    """The same, one row at a time in torch (without care for ties)."""
    result = []
    for i in rows:
        scores, own = similarity[i], pair == pair[i]
        positives, negatives = scores[own], scores[~own]
        share = own[scores.topk(len(positives)).indices].float().mean()
        result.append(float(share * (positives.mean() - (negatives / TEMPERATURE).softmax(0) @ negatives)))
    return result


def best(rounds: int, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of the fastest of `rounds` alternating rounds."""
    seconds = dict.fromkeys(calls, math.inf)
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(rows: int, dim: int, rollouts: int) -> dict[str, float]:
    """All numbers of one size, in this process."""
    generator = torch.Generator().manual_seed(0)
    pair = torch.arange(rows) // rollouts
    centre = torch.randn(int(pair.max()) + 1, dim, generator=generator)[pair]
    query, target = (
        torch.nn.functional.normalize(centre + 5.0 * torch.randn(rows, dim, generator=generator), dim=1)
        for _ in range(2)
    )
    del centre
    valid = torch.rand(rows, generator=generator) < 0.99
    form = torch.ones(rows)
    outcome_reward(torch.eye(8), torch.arange(8), torch.arange(8))  # libraries are loaded before memory is measured
    query[:8] @ target[:8].T

    before = _peak_bytes()
    both_directions(similarity_matrix(query, target), pair, valid, form)
    peak = _peak_bytes() - before

    similarity = similarity_matrix(query, target)
    seconds = best(
        {256: 40, 512: 40, 1024: 20, 4096: 8}.get(rows, 3),
        {
            "rewards": lambda: both_directions(similarity, pair, valid, form),
            "all": lambda: both_directions(similarity_matrix(query, target), pair, valid, form),
            "bare": lambda: (query @ target.T).topk(rollouts, dim=1),
        },
    )

    sampled = rows if rows <= FULL_LOOP_ROWS else SAMPLED_ROWS
    listed = [scores[:sampled].tolist() for scores in (similarity, similarity.T)]
    pairs, valids = pair.tolist(), valid.tolist()
    start = time.perf_counter()
    looped = [loop_rows(scores, pairs, valids, range(sampled)) for scores in listed]
    seconds["loop"] = (time.perf_counter() - start) * rows / sampled
    few = range(min(rows, TORCH_ROWS))
    start = time.perf_counter()
    for scores in (similarity, similarity.T):
        torch_rows(scores, pair, few)
    seconds["torch loop"] = (time.perf_counter() - start) * rows / len(few)

    rewards = [direction.outcome[:sampled] for direction in both_directions(similarity, pair, valid, form)]
    difference = max(
        float((torch.tensor(a) - b).abs().nan_to_num().max()) for a, b in zip(looped, rewards, strict=True)
    )
    return {**seconds, "peak": peak, "difference": difference}


async def judge(batch: RewardBatch) -> Tensor:
    """Every pick is right."""
    return torch.ones(len(batch))


def measure_functions(rows: int, dim: int, rollouts: int) -> dict[str, float]:
    """Seconds of every ready-made function, with `rows` rows a side."""
    generator = torch.Generator().manual_seed(0)
    pair = (torch.arange(rows) // rollouts).repeat(2)
    side = torch.arange(2).repeat_interleave(rows)
    raw = torch.randn(2, rows // rollouts, dim, generator=generator)[side, pair]
    vectors = raw + 5.0 * torch.randn(2 * rows, dim, generator=generator)
    tcot = parse_tcot('<thinking>It says {"text_keywords": ["a"]}.</thinking><rethink>Yes.</rethink><answer>a</answer>')
    batch = RewardBatch.build(
        side=side,
        pair=pair,
        rollout=torch.arange(2 * rows) % rollouts,
        content=torch.stack((pair, pair), dim=1),
        tcots=[tcot] * (2 * rows),
        required=["text_keywords"] * (2 * rows),
        embeddings=torch.nn.functional.normalize(vectors, dim=1),
        valid=torch.rand(2 * rows, generator=generator) < 0.99,
        lengths=torch.randint(1, 2048, (2 * rows,), generator=generator),
        raw_embeddings=torch.nn.functional.normalize(raw, dim=1),
        judge=judge,
    )
    functions = {name: load_reward_function(f"pkg://embedrl_verl.rewards.functions.{name}")[0] for name in NEEDS}
    # A copy of the batch for every call: a batch keeps its retrieval.
    calls = {name: lambda function=function: function(replace(batch)) for name, function in functions.items()}
    return best({256: 20, 512: 20, 1024: 10}.get(rows, 3), calls)


def run_child(table: str, rows: int, options: argparse.Namespace) -> dict[str, float]:
    """One size of one table in a process of its own."""
    command = [sys.executable, __file__, "--child", "--table", table, "--rows", str(rows)]
    command += ["--dim", str(options.dim), "--rollouts", str(options.rollouts)]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(child.stdout)
    return result


def print_functions(options: argparse.Namespace) -> None:
    """The second table."""
    print(f"| rows a side | {' | '.join(NEEDS)} |\n|" + "---:|" * (len(NEEDS) + 1))
    for rows in options.rows:
        m = run_child("functions", rows, options)
        cells = [f"{m[name] * 1e3:,.1f} ms ({m[name] / m['outcome_only']:.1f}x)" for name in NEEDS]
        print(f"| {rows:,} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 1024, 4096, 16384], help="rows a side")
    parser.add_argument("--dim", type=int, default=2048, help="embedding size (2048: Embed-RL-2B)")
    parser.add_argument("--rollouts", type=int, default=8, help="G; must divide the rows")
    parser.add_argument("--table", choices=("both", "maths", "functions"), default="both", help="which table (both)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for rows in options.rows:
        if rows % options.rollouts:
            parser.error(f"--rows must be multiples of --rollouts ({options.rollouts}); got {rows}")
    if options.child:
        measured = measure_functions if options.table == "functions" else measure
        print(json.dumps(measured(options.rows[0], options.dim, options.rollouts)))
        return
    print(f"D = {options.dim}, G = {options.rollouts}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    if options.table != "functions":
        print_maths(options)
        print()
    if options.table != "maths":
        print_functions(options)


def print_maths(options: argparse.Namespace) -> None:
    """The first table."""
    heads = ["rows a side", "rewards", "all", "bare", "loop", "loop / rewards", "torch loop / rewards", "all / bare"]
    heads += ["S", "peak", "peak / S", "largest difference to loop"]
    print(f"| {' | '.join(heads)} |\n|" + "---:|" * len(heads))
    for rows in options.rows:
        m = run_child("maths", rows, options)
        size = 4 * rows * rows
        cells = [f"{rows:,}", *(f"{m[name] * 1e3:,.1f} ms" for name in ("rewards", "all", "bare"))]
        cells += [f"{'~' if rows > FULL_LOOP_ROWS else ''}{m['loop']:,.2f} s", f"{m['loop'] / m['rewards']:,.0f}x"]
        cells += [f"{'~' if rows > TORCH_ROWS else ''}{m['torch loop'] / m['rewards']:,.1f}x"]
        cells += [f"{m['all'] / m['bare']:.2f}x", f"{size / 2**20:,.2f} MiB", f"{m['peak'] / 2**20:,.0f} MiB"]
        cells += [f"{m['peak'] / size:.2f}", f"{m['difference']:.0e}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
