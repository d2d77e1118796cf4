# SPDX-License-Identifier: Apache-2.0
"""Held-out retrieval: raw input, T-CoT before RL, T-CoT after RL, and the true T-CoT as the ceiling.

Queries and candidates are the held-out pairs, whose scans no stage trained on. Every query is ranked against all
targets of its data source, among them three near copies of its own; ties count against the model; targets of the same
content are all relevant. The Embedder is the same throughout, only what it reads differs. T-CoTs are greedy.

Command: `python -m embedrl_verl.tiny.evaluate --embedder DIR --world DIR --before DIR [--after DIR] --out FILE.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from embedrl_verl.data.schema import SIDES, Side, input_kind
from embedrl_verl.embedder import Embedder
from embedrl_verl.evaluation.metrics import hit_at_k, ndcg_at_k
from embedrl_verl.kinds import EVIDENCE_KEY_OF_KIND
from embedrl_verl.tcot import format_reward, parse_tcot
from embedrl_verl.tiny.contrastive import embed_input
from embedrl_verl.tiny.digits import Sample, read_samples
from embedrl_verl.tiny.reasoner import TINY_LIMITS, Prompt, Reasoner
from embedrl_verl.tiny.sft import digit_accuracy

NDCG_K = 5
Tcots = Mapping[Side, Sequence[str]]


@dataclass(frozen=True)
class View:
    """Scores of one way of reading the inputs; shares in [0, 1].

    Attributes:
        hit1, ndcg5: by data source, and under "all" the plain mean over sources.
        hits: by data source, 1 or 0 for each query.
        digits, exact: share of digits and of whole answers that the T-CoTs of pictures and clips got right.
        well_formed: share of T-CoTs that are well formed with the evidence that their input calls for.
    """

    hit1: dict[str, float]
    ndcg5: dict[str, float]
    hits: dict[str, list[int]]
    digits: float | None = None
    exact: float | None = None
    well_formed: float | None = None


def write_tcots(reasoner: Reasoner, samples: Sequence[Sample]) -> dict[Side, list[str]]:
    """Greedy T-CoTs of both sides of each pair."""
    return {side: reasoner.generate([Prompt(sample.record, side) for sample in samples]) for side in SIDES}


def true_tcots(samples: Sequence[Sample]) -> dict[Side, list[str]]:
    """The T-CoTs of an annotator that makes no mistakes."""
    return {"query": [s.query.tcot for s in samples], "target": [s.target.tcot for s in samples]}


def score_view(embedder: Embedder, samples: Sequence[Sample], tcots: Tcots | None = None) -> View:
    """Embed both sides with these T-CoTs (None = raw input) and rank."""
    vectors = {
        side: embedder.embed([embed_input(s, side, tcots[side][i] if tcots else None) for i, s in enumerate(samples)])
        for side in SIDES
    }
    hit1, ndcg5, hits = {}, {}, {}
    for source in dict.fromkeys(sample.record.data_source for sample in samples):
        rows = [i for i, sample in enumerate(samples) if sample.record.data_source == source]
        scores = vectors["query"][rows] @ vectors["target"][rows].T
        contents = [samples[i].record.target_id for i in rows]
        relevant = torch.tensor([[a == b for b in contents] for a in contents])
        found = hit_at_k(scores, relevant, 1, per_query=True)
        hits[source] = [int(hit) for hit in found]
        hit1[source] = float(found.mean())
        ndcg5[source] = ndcg_at_k(scores, relevant, NDCG_K)
    for by_source in (hit1, ndcg5):
        by_source["all"] = sum(by_source.values()) / len(by_source)
    if tcots is None:
        return View(hit1, ndcg5, hits)
    return View(hit1, ndcg5, hits, *_quality(samples, tcots))


def _quality(samples: Sequence[Sample], tcots: Tcots) -> tuple[float, float, float]:
    sides = [(text, sample, side) for side in SIDES for text, sample in zip(tcots[side], samples, strict=True)]
    forms = [
        format_reward(parse_tcot(text), EVIDENCE_KEY_OF_KIND[input_kind(sample.record, side)])
        for text, sample, side in sides
    ]
    truths = [(text, sample.query if side == "query" else sample.target) for text, sample, side in sides]
    seen = [(text, truth) for text, truth in truths if truth.cells]
    digits, exact = digit_accuracy([text for text, _ in seen], [truth for _, truth in seen])
    return digits, exact, sum(forms) / len(forms)


def evaluate(embedder: Embedder, samples: Sequence[Sample], reasoners: Mapping[str, Reasoner]) -> dict[str, View]:
    """Views "raw", one for each Reasoner by its name, and "truth"."""
    views = {"raw": score_view(embedder, samples)}
    for name, reasoner in reasoners.items():
        views[name] = score_view(embedder, samples, write_tcots(reasoner, samples))
    views["truth"] = score_view(embedder, samples, true_tcots(samples))
    return views


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: evaluate and write one JSON file."""
    parser = argparse.ArgumentParser(prog="python -m embedrl_verl.tiny.evaluate", description=__doc__)
    parser.add_argument("--embedder", type=Path, required=True, help="folder of the trained Embedder")
    parser.add_argument("--world", type=Path, required=True, help="folder of embedrl_verl.tiny.digits")
    parser.add_argument("--before", type=Path, required=True, help="folder of the Reasoner before RL")
    parser.add_argument("--after", type=Path, help="folder of the Reasoner after RL")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    folders = {"before": args.before} | ({"after": args.after} if args.after else {})
    embedder = Embedder.from_pretrained(args.embedder, limits=TINY_LIMITS)
    samples = read_samples(args.world / "heldout.parquet")
    reasoners = {name: Reasoner.from_pretrained(folder) for name, folder in folders.items()}
    views = evaluate(embedder, samples, reasoners)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({name: asdict(view) for name, view in views.items()}, indent=1), encoding="utf-8")
    for name, view in views.items():
        print(f"{name:>7}: Hit@1 {view.hit1['all']:.3f}, NDCG@{NDCG_K} {view.ndcg5['all']:.3f}")


if __name__ == "__main__":
    main()
