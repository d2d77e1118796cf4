# SPDX-License-Identifier: Apache-2.0
"""Held-out retrieval: raw input, T-CoT before RL, T-CoT after RL, and the true T-CoT as the ceiling.

Queries and candidates are the held-out pairs, whose scans no stage trained on. Every query is ranked against all
targets of its data source, among them three near copies of its own; ties count against the model; the targets of all
pairs with an equal query or an equal target are relevant; an input that cannot be embedded is not retrieved, and is
counted. The Embedder is the same throughout, only what it reads differs: T-CoTs are greedy, evidence is cut from the
originals.

Command: `python -m embedrl_verl.tiny.evaluate --embedder DIR --world DIR --before DIR --after DIR --out FILE.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from embedrl_verl.data.identity import content_id, shares_content
from embedrl_verl.data.schema import SIDES, Side, input_kind
from embedrl_verl.embedder import Embedder, EmbedInput, Encoded
from embedrl_verl.errors import DataError, EmbedderError, MediaError
from embedrl_verl.evaluation.metrics import hit_at_k, ndcg_at_k
from embedrl_verl.kinds import EVIDENCE_KEY_OF_KIND
from embedrl_verl.tcot import format_reward
from embedrl_verl.tiny.contrastive import embed_input
from embedrl_verl.tiny.digits import Sample, read_samples
from embedrl_verl.tiny.reasoner import Prompt, Reasoner, family_of_folder, tiny_limits
from embedrl_verl.tiny.sft import read_accuracy

NDCG_K = 5
MAX_NEW_TOKENS = 96
"""Longest T-CoT, as in the RL stage (data.max_response_length of the recipe)."""
THREADS = 2
Tcots = Mapping[Side, Sequence[str]]


@dataclass(frozen=True)
class Quality:
    """What the T-CoTs of a view are like; shares in [0, 1] over both sides.

    Attributes:
        well_formed: share that keeps the form.
        format: share that also carries the evidence its input calls for (the reward's F).
        digits, written, exact: see `Reading`; of pictures and clips only.
        evidence: crops and key frames cut for a T-CoT, mean.
    """

    well_formed: float
    format: float
    digits: float
    written: float
    exact: float
    evidence: float


@dataclass(frozen=True)
class View:
    """Scores of one way of reading the inputs; shares in [0, 1].

    Attributes:
        hit1, ndcg5: by data source, and under "all" the plain mean over sources.
        hits: by data source, 1 or 0 for each query in the order of the file.
        failed_rows: inputs of either side without an embedding.
        problems: why they failed, the first five.
        quality: None without T-CoTs.
    """

    hit1: dict[str, float]
    ndcg5: dict[str, float]
    hits: dict[str, list[int]]
    failed_rows: int
    problems: tuple[str, ...] = ()
    quality: Quality | None = None


def write_tcots(reasoner: Reasoner, samples: Sequence[Sample]) -> dict[Side, list[str]]:
    """Greedy T-CoTs of both sides of each pair."""
    return {
        side: reasoner.generate([Prompt(sample.record, side) for sample in samples], max_new_tokens=MAX_NEW_TOKENS)
        for side in SIDES
    }


def true_tcots(samples: Sequence[Sample]) -> dict[Side, list[str]]:
    """The T-CoTs of an annotator that makes no mistakes."""
    return {"query": [s.query.tcot for s in samples], "target": [s.target.tcot for s in samples]}


def score_view(embedder: Embedder, samples: Sequence[Sample], tcots: Tcots | None = None) -> View:
    """Embed both sides with these T-CoTs (None = raw input) and rank."""
    inputs = {
        side: [
            embed_input(s, side, tcots[side][i] if tcots else None, embedder.processor.family)
            for i, s in enumerate(samples)
        ]
        for side in SIDES
    }
    embedded = {side: embed_rows(embedder, inputs[side]) for side in SIDES}
    problems = [f"{side} of {samples[i].record.pair_id}: {why}" for side in SIDES for i, why in embedded[side][1]]
    hit1, ndcg5, hits = {}, {}, {}
    for source in dict.fromkeys(sample.record.data_source for sample in samples):
        rows = [i for i, sample in enumerate(samples) if sample.record.data_source == source]
        scores = embedded["query"][0][rows] @ embedded["target"][0][rows].T
        contents = torch.tensor([content_id(samples[i].record, None) for i in rows])
        relevant = shares_content(contents, contents)
        found = hit_at_k(scores, relevant, 1, per_query=True)
        hits[source] = [int(hit) for hit in found]
        hit1[source] = float(found.mean())
        ndcg5[source] = ndcg_at_k(scores, relevant, NDCG_K)
    for by_source in (hit1, ndcg5):
        by_source["all"] = sum(by_source.values()) / len(by_source)
    quality = None if tcots is None else _quality(samples, tcots, inputs)
    return View(hit1, ndcg5, hits, len(problems), tuple(problems[:5]), quality)


def embed_rows(embedder: Embedder, inputs: Sequence[EmbedInput]) -> tuple[torch.Tensor, list[tuple[int, str]]]:
    """Embeddings float32 (n, D), NaN where there is none, and (index, reason) of those rows."""
    rows: list[Encoded] = []
    places: list[int] = []
    problems: list[tuple[int, str]] = []
    for i, one in enumerate(inputs):
        try:
            rows.append(embedder.processor.encode(one))
            places.append(i)
        except (MediaError, EmbedderError) as error:
            problems.append((i, str(error)))
    vectors = torch.full((len(inputs), embedder.dim), float("nan"))
    vectors[places] = embedder.embed_encoded(rows)
    broken = ~vectors.isfinite().all(dim=1)
    problems += [(i, "the vector is not finite") for i in places if broken[i]]
    return vectors.masked_fill(broken[:, None], float("nan")), problems


def _quality(samples: Sequence[Sample], tcots: Tcots, inputs: Mapping[Side, Sequence[EmbedInput]]) -> Quality:
    forms, kept, evidence = [], [], []
    seen, truths = [], []
    for side in SIDES:
        for sample, text, one in zip(samples, tcots[side], inputs[side], strict=True):
            assert one.tcot is not None, "inputs must have been made with these T-CoTs"
            kept.append(float(one.tcot.is_well_formed))
            forms.append(format_reward(one.tcot, EVIDENCE_KEY_OF_KIND[input_kind(sample.record, side)]))
            evidence.append(len(one.evidence))
            truth = sample.truth(side)
            if truth.cells:
                seen.append(text)
                truths.append(truth)
    reading = read_accuracy(seen, truths)
    return Quality(
        sum(kept) / len(kept),
        sum(forms) / len(forms),
        reading.digits,
        reading.written,
        reading.exact,
        sum(evidence) / len(evidence),
    )


def evaluate(embedder: Embedder, samples: Sequence[Sample], reasoners: Mapping[str, Reasoner]) -> dict[str, View]:
    """Views "raw", one for each Reasoner by its name, and "truth".

    Raises:
        DataError: no pair.
    """
    if not samples:
        raise DataError("the evaluation needs at least one held-out pair; got none: write the world again")
    views = {"raw": score_view(embedder, samples)}
    for name, reasoner in reasoners.items():
        views[name] = score_view(embedder, samples, write_tcots(reasoner, samples))
    views["truth"] = score_view(embedder, samples, true_tcots(samples))
    return views


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: evaluate and write one JSON file."""
    parser = argparse.ArgumentParser(prog="python -m embedrl_verl.tiny.evaluate", description=evaluate.__doc__)
    parser.add_argument("--embedder", type=Path, required=True, help="folder of the trained Embedder")
    parser.add_argument("--world", type=Path, required=True, help="folder of embedrl_verl.tiny.digits")
    parser.add_argument(
        "--before", "--reasoner-before", type=Path, required=True, help="folder of the Reasoner before RL"
    )
    parser.add_argument("--after", "--reasoner-after", type=Path, help="folder of the Reasoner after RL")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seed", type=int, help="seed of the run, written down; the evaluation itself draws nothing")
    args = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    started = time.monotonic()
    folders = {"before": args.before} | ({"after": args.after} if args.after else {})
    limits = tiny_limits(family_of_folder(args.embedder))
    embedder = Embedder.from_pretrained(args.embedder, limits=limits)
    samples = read_samples(args.world / "heldout.parquet")
    reasoners = {name: Reasoner.from_pretrained(folder) for name, folder in folders.items()}
    views = evaluate(embedder, samples, reasoners)
    result = {
        "seed": args.seed,
        "pairs": len(samples),
        "queries": {source: len(hits) for source, hits in views["raw"].hits.items()},
        "ndcg_k": NDCG_K,
        "max_new_tokens": MAX_NEW_TOKENS,
        "media_limits": asdict(limits),
        "views": {name: asdict(view) for name, view in views.items()},
        "seconds": round(time.monotonic() - started, 1),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, view in views.items():
        line = f"{name:>7}: Hit@1 {view.hit1['all']:.3f}, NDCG@{NDCG_K} {view.ndcg5['all']:.3f}"
        if view.quality is not None:
            line += f", well-formed {view.quality.well_formed:.1%}, answers right {view.quality.exact:.1%}"
        print(f"{line}, failed rows {view.failed_rows}")
        for problem in view.problems:
            print(f"         {problem}")


if __name__ == "__main__":
    main()
