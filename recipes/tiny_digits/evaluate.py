# SPDX-License-Identifier: Apache-2.0
"""Held-out retrieval: raw input, T-CoT before RL, T-CoT after RL, and the true T-CoT as the ceiling.

Queries and candidates are the held-out pairs, whose scans no stage trained on. Every query is ranked against all
targets of its data source, among them three near copies of its own; ties count against the model; the targets of all
pairs with an equal query or an equal target are relevant; an input that cannot be embedded is not retrieved, and is
counted. The Embedder is the same throughout, only what it reads differs: T-CoTs are greedy, evidence is cut from the
originals.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from embedrl_verl.data.identity import content_id, shares_content
from embedrl_verl.data.schema import SIDES, Side, input_kind
from embedrl_verl.embedder import Embedder, EmbedInput, Encoded
from embedrl_verl.errors import EmbedderError, MediaError
from embedrl_verl.evaluation.metrics import hit_at_k, ndcg_at_k
from embedrl_verl.kinds import EVIDENCE_KEY_OF_KIND
from embedrl_verl.tcot import format_reward, parse_tcot
from recipes.tiny_digits.contrastive import embed_input, load_embedder
from recipes.tiny_digits.reasoner import Prompt, Reasoner
from recipes.tiny_digits.world import Sample, read_samples

NDCG_K = 5
MAX_NEW_TOKENS = 96
"""Longest T-CoT, as in the RL stage (data.max_response_length of the recipe)."""
THREADS = 2
Tcots = Mapping[Side, Sequence[str]]


def write_tcots(reasoner: Reasoner, samples: Sequence[Sample]) -> Tcots:
    """Greedy T-CoTs of both sides of each pair."""
    return {
        side: reasoner.generate([Prompt(sample.record, side) for sample in samples], max_new_tokens=MAX_NEW_TOKENS)
        for side in SIDES
    }


def true_tcots(samples: Sequence[Sample]) -> Tcots:
    """The T-CoTs of an annotator that makes no mistakes."""
    return {side: [sample.truth(side).tcot for sample in samples] for side in SIDES}


def score_view(embedder: Embedder, samples: Sequence[Sample], tcots: Tcots | None = None) -> dict[str, Any]:
    """Embed both sides with these T-CoTs (None = raw input) and rank.

    Returns:
        "hit1", "ndcg5": by data source, and under "all" the plain mean over sources. "hits": by data source, 1 or 0
        for each query in the order of the file. "failed_rows": inputs of either side without an embedding;
        "problems": why, the first five. "quality": see `quality_of`, None without T-CoTs.
    """
    family = embedder.processor.family
    inputs = {
        side: [embed_input(s, side, tcots[side][i] if tcots else None, family) for i, s in enumerate(samples)]
        for side in SIDES
    }
    embedded = {side: embed_rows(embedder, inputs[side]) for side in SIDES}
    problems = [f"{side} of {samples[i].record.pair_id}: {why}" for side in SIDES for i, why in embedded[side][1]]
    hit1: dict[str, float] = {}
    ndcg5: dict[str, float] = {}
    hits: dict[str, list[int]] = {}
    for source in dict.fromkeys(sample.record.data_source for sample in samples):
        rows = [i for i, sample in enumerate(samples) if sample.record.data_source == source]
        scores = embedded["query"][0][rows] @ embedded["target"][0][rows].T
        contents = torch.tensor([content_id(samples[i].record, None) for i in rows])
        relevant = shares_content(contents, contents)
        hits[source] = [int(hit) for hit in hit_at_k(scores, relevant, 1, per_query=True)]
        hit1[source] = hit_at_k(scores, relevant, 1)
        ndcg5[source] = ndcg_at_k(scores, relevant, NDCG_K)
    for by_source in (hit1, ndcg5):
        by_source["all"] = sum(by_source.values()) / len(by_source)
    scored = {"hit1": hit1, "ndcg5": ndcg5, "hits": hits, "failed_rows": len(problems), "problems": problems[:5]}
    return scored | {"quality": tcots and quality_of(samples, tcots, inputs)}


def embed_rows(embedder: Embedder, inputs: Sequence[EmbedInput]) -> tuple[torch.Tensor, list[tuple[int, str]]]:
    """Embeddings float32 (n, D), NaN where there is none, and (index, reason) of those rows."""
    rows: dict[int, Encoded] = {}
    problems: list[tuple[int, str]] = []
    for i, one in enumerate(inputs):
        try:
            rows[i] = embedder.processor.encode(one)
        except (MediaError, EmbedderError) as error:
            problems.append((i, str(error)))
    vectors = torch.full((len(inputs), embedder.dim), float("nan"))
    vectors[list(rows)] = embedder.embed_encoded(list(rows.values()))
    problems += [(i, "the vector is not finite") for i in rows if not vectors[i].isfinite().all()]
    return vectors, problems


def quality_of(
    samples: Sequence[Sample], tcots: Tcots, inputs: Mapping[Side, Sequence[EmbedInput]]
) -> dict[str, float]:
    """What T-CoTs are like; shares in [0, 1] over both sides.

    Returns:
        "well_formed": share that keeps the form. "format": share that also carries the evidence its input calls for
        (the reward's F). Of pictures and clips only: "digits" (share of the true digits that were written at their
        place), "written" (share of the written digits that are right; what was left out does not count) and "exact"
        (share of right answers). "evidence": crops and key frames cut for a T-CoT, mean.
    """
    forms, kept, evidence = [], [], []
    right = true = written = exact = seen = 0
    for side in SIDES:
        for sample, text, one in zip(samples, tcots[side], inputs[side], strict=True):
            assert one.tcot is not None, "inputs must have been made with these T-CoTs"
            kept.append(float(one.tcot.is_well_formed))
            forms.append(format_reward(one.tcot, EVIDENCE_KEY_OF_KIND[input_kind(sample.record, side)]))
            evidence.append(len(one.evidence))
            if sample.truth(side).cells:
                wanted, found = parse_tcot(sample.truth(side).tcot).answer, parse_tcot(text).answer
                seen += 1
                exact += wanted == found
                true += sum(sign.isdigit() for sign in wanted)
                written += sum(sign.isdigit() for sign in found)
                right += sum(a == b for a, b in zip(wanted, found, strict=False) if a.isdigit())
    return {
        "well_formed": sum(kept) / len(kept),
        "format": sum(forms) / len(forms),
        "digits": right / true,
        "written": right / max(written, 1),
        "exact": exact / seen,
        "evidence": statistics.fmean(evidence),
    }


def main(
    embedder: Path,
    world: Path,
    before: Annotated[Path, typer.Argument(help="the Reasoner before RL")],
    after: Annotated[Path, typer.Argument(help="the Reasoner after RL")],
    out: Annotated[Path, typer.Argument(help="JSON file to write")],
    seed: Annotated[int | None, typer.Option(help="of the run, written down; the evaluation draws nothing")] = None,
) -> None:
    """Evaluate both Reasoners on the WORLD's held-out pairs by the EMBEDDER."""
    torch.set_num_threads(THREADS)
    started = time.monotonic()
    reader, samples = load_embedder(embedder), read_samples(world / "heldout.parquet")
    views = {"raw": score_view(reader, samples)}
    for name, folder in {"before": before, "after": after}.items():
        views[name] = score_view(reader, samples, write_tcots(Reasoner(folder), samples))
    views["truth"] = score_view(reader, samples, true_tcots(samples))
    result = {
        "seed": seed,
        "pairs": len(samples),
        "queries": {source: len(hits) for source, hits in views["raw"]["hits"].items()},
        "ndcg_k": NDCG_K,
        "max_new_tokens": MAX_NEW_TOKENS,
        "media_limits": asdict(reader.processor.limits),
        "views": views,
        "seconds": round(time.monotonic() - started, 1),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, view in views.items():
        line = f"{name:>7}: Hit@1 {view['hit1']['all']:.3f}, NDCG@{NDCG_K} {view['ndcg5']['all']:.3f}"
        if quality := view["quality"]:
            line += f", well-formed {quality['well_formed']:.1%}, answers right {quality['exact']:.1%}"
        print(f"{line}, failed rows {view['failed_rows']}")
        for problem in view["problems"]:
            print(f"         {problem}")


if __name__ == "__main__":
    typer.run(main)
