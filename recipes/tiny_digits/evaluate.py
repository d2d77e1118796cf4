# SPDX-License-Identifier: Apache-2.0
"""Held-out retrieval of a tiny run: raw input, T-CoT before RL, T-CoT after RL; of the digits world, whose truth is
known, also the true T-CoT as the ceiling, and whether answers are right.

It is `embedrl eval` (embedrl_verl/evaluation) with the settings of the tiny models; no stage trained on the pairs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from embedrl_verl.data.schema import SIDES
from embedrl_verl.evaluation.command import failure_lines, write_results
from embedrl_verl.evaluation.comparison import RAW
from embedrl_verl.evaluation.retrieval import Pairs, Tcots, score_view, tcot_lines, write_tcots
from embedrl_verl.model import Written
from embedrl_verl.model.embedders import LocalEmbedder
from embedrl_verl.tcot import parse_tcot
from recipes.tiny_digits.contrastive import load_embedder
from recipes.tiny_digits.settings import MAX_NEW_TOKENS, TcotParts, evidence_of, run_program, tiny_reasoner
from recipes.tiny_digits.world import Sample, parts_of, read_samples, truths_of

THREADS = 2


def true_tcots(samples: Sequence[Sample], parts: TcotParts = "full") -> Tcots:
    """The T-CoTs of an annotator that makes no mistakes."""
    return {side: [Written(parts_of(sample.truth(side).tcot, parts)) for sample in samples] for side in SIDES}


def digits_right(samples: Sequence[Sample], tcots: Tcots) -> dict[str, float]:
    """Of the T-CoTs of pictures and clips, shares in [0, 1]: "digits" of the true digits that were written at their
    place, "written" of the written digits that are right (what was left out does not count), "exact" of right answers:
    those that are the true answer, character by character."""
    right = true = written = exact = seen = 0
    for side in SIDES:
        for sample, one in zip(samples, tcots[side], strict=True):
            if any(cell >= 0 for cell in sample.truth(side).cells):
                wanted, found = (parse_tcot(text or "").answer for text in (sample.truth(side).tcot, one.text))
                seen += 1
                exact += wanted == found
                true += sum(sign.isdigit() for sign in wanted)
                written += sum(sign.isdigit() for sign in found)
                right += sum(a == b for a, b in zip(wanted, found, strict=False) if a.isdigit())
    return {"digits": right / true, "written": right / max(written, 1), "exact": exact / seen}


def main(
    embedder: Path,
    out: Annotated[Path, typer.Argument(help="folder to write evaluation.json and tcots.jsonl to")],
    before: Annotated[Path, typer.Argument(help="the Reasoner before RL")],
    after: Annotated[Path, typer.Argument(help="the Reasoner after RL")],
    pairs: Annotated[list[str], typer.Argument(help="held-out pair files")],
    media_root: Annotated[str | None, typer.Option(help="of their media paths")] = None,
    seed: Annotated[int | None, typer.Option(help="of the run, written down; the evaluation draws nothing")] = None,
    tcot: Annotated[TcotParts, typer.Option(help="what of a T-CoT there is")] = "full",
    suffix: Annotated[str, typer.Option(help="of the names of the files")] = "",
) -> None:
    """Evaluate both Reasoners on held-out PAIRS by the EMBEDDER."""
    torch.set_num_threads(THREADS)
    started = time.monotonic()
    model, held_out, evidence = load_embedder(embedder), Pairs.read(pairs, media_root), evidence_of(tcot)
    reader, family = LocalEmbedder(model), model.processor.family
    samples = read_samples(Path(pairs[0])) if len(pairs) == 1 and truths_of(Path(pairs[0])).is_file() else None
    views: dict[str, Any] = {RAW: score_view(reader, held_out, None, family, evidence)}
    written: dict[str, Tcots] = {}
    for name, folder in {"before": before, "after": after}.items():
        written[name] = write_tcots(tiny_reasoner(folder), held_out)
    if samples:
        written["truth"] = true_tcots(samples, tcot)
    for name, tcots in written.items():
        views[name] = score_view(reader, held_out, tcots, family, evidence)
        if samples:
            views[name]["quality"] |= digits_right(samples, tcots)
    write_results(
        out,
        held_out,
        views,
        {name: tcot_lines(held_out, name, tcots, views[name]["ranks"]) for name, tcots in written.items()},
        suffix=suffix,
        seed=seed,
        max_new_tokens=MAX_NEW_TOKENS,
        media_limits=asdict(model.processor.limits),
        seconds=round(time.monotonic() - started, 1),
    )
    print("\n".join(failure_lines(views)))  # the table comes with the summary
    print(f"wrote {out / f'evaluation{suffix}.json'} and {out / f'tcots{suffix}.jsonl'}")


if __name__ == "__main__":
    run_program(main)
