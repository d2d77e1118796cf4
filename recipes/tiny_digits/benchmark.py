# SPDX-License-Identifier: Apache-2.0
"""A finished tiny run on a benchmark of its own: the held-out digits in MMEB-V2's layout, through `embedrl benchmark`.

    python -m recipes.tiny_digits.benchmark runs/tiny_cpu/seed0 OUT --table benchmarks/results/tiny_benchmark.md

1. The held-out pairs as rows, pictures and frames, and `tasks.yaml` that names them, as own data would be laid.
2. Scores plain and with the T-CoTs of the Reasoner after RL, in four cells. Every query must be hit or missed as in the
   run's own evaluation.json: two programs that read, embed and rank the same differently would show here.
3. The gate: fitted on new pairs of the same scans, then scored on the held-out ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from embedrl_verl.data.parquet import read_pairs
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.embedder.loading import family_of_config, load_config
from embedrl_verl.errors import DataError
from embedrl_verl.evaluation.benchmarks.command import run_benchmark
from embedrl_verl.evaluation.benchmarks.tables import read_tables
from embedrl_verl.evaluation.comparison import gain_cell
from embedrl_verl.evaluation.paired import paired, read_results
from embedrl_verl.model.options import PairOptions
from embedrl_verl.retrieval.gate_file import fit_gate, measure_gate, read_gate
from recipes.tiny_digits.canvas import HELD_OUT_SCANS
from recipes.tiny_digits.settings import run_program
from recipes.tiny_digits.world import SOURCES, make_samples

VIEWS = {"plain-plain": "raw", "tcot-tcot": "after"}
"""Cells that the run's own evaluation has too, with their names there."""
GATE_SEED, GATE_PAIRS = 1000, 48
"""Of pairs that the gate is fitted on: no world has this seed; pairs a source."""
PARSERS = {
    "digits_i2t": {"dataset_parser": "image_i2t"},
    "digits_vqa": {"dataset_parser": "image_qa"},
    "digits_t2i": {"dataset_parser": "image_t2i"},
    "digits_i2i": {"dataset_parser": "image_i2i_vg"},
    "digits_video": {"dataset_parser": "video_classification", "instruction": SOURCES["digits_video"][1]},
    "digits_sheet": {"dataset_parser": "image_i2t"},
    "digits_page": {"dataset_parser": "image_i2t", "kind": "page"},
}


def write_layout(pairs: Path, root: Path) -> Path:
    """Write `rows/SOURCE/test.jsonl`, `media` and `tasks.yaml`; returns the latter's path."""
    by_source: dict[str, list[PairRecord]] = {}
    for record in read_pairs(pairs):
        by_source.setdefault(record.data_source, []).append(record)
    entries: dict[str, Any] = {}
    for source, records in by_source.items():
        make = _video_row if source == "digits_video" else _image_row
        targets = [_part(root, f"{source}/t{i}", record.item("target")) for i, record in enumerate(records)]
        rows = [make(root, i, record, targets) for i, record in enumerate(records)]
        file = root / "rows" / source / "test.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        media = {"frame_root" if source == "digits_video" else "image_root": "media"}
        rows_of = {"data_path": "rows", "subset_name": source, "eval_type": "local"}
        entries[source] = {**PARSERS[source], **rows_of, **media}
    (root / "tasks.yaml").write_text(yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")
    return root / "tasks.yaml"


def _part(root: Path, name: str, item: Item) -> tuple[str, str]:
    """Text and path of the picture of an item, which is written."""
    if not item.images:
        return item.text, ""
    return item.text, _written(root, f"{name}.png", item.images[0])


def _written(root: Path, name: str, picture: object) -> str:
    if not isinstance(picture, bytes):
        raise DataError(f"pictures of the digits world are bytes; {name} is {type(picture).__name__}")
    file = root / "media" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(picture)
    return name


def _image_row(root: Path, number: int, record: PairRecord, targets: list[tuple[str, str]]) -> dict[str, Any]:
    """All targets of the source are candidates, the query's own first."""
    item = record.item("query")
    text, path = _part(root, f"{record.data_source}/q{number}", item)
    texts, paths = zip(targets[number], *targets[:number], *targets[number + 1 :], strict=True)
    query = {"qry_inst": item.instruction, "qry_text": text, "qry_img_path": path}
    return query | {"tgt_inst": record.item("target").instruction, "tgt_text": texts, "tgt_img_path": paths}


def _video_row(root: Path, number: int, record: PairRecord, targets: list[tuple[str, str]]) -> dict[str, Any]:
    video = record.item("query").video
    folder = f"{record.data_source}/q{number}"
    for place, frame in enumerate(video.frames if video else ()):
        _written(root, f"{folder}/{place}.png", frame)
    return {"video_id": folder, "pos_text": targets[number][0], "neg_text": [text for text, _ in targets]}


def check_equal(scores: Path, evaluation: Mapping[str, Any]) -> None:
    """DataError unless every query is hit or missed as in the run's own evaluation."""
    for source, result in read_results(scores).items():
        for cell, view in VIEWS.items():
            mine, own = list(result.cells[cell].values()), evaluation["views"][view]["hits"][source]
            if different := [i for i, (a, b) in enumerate(zip(mine, own, strict=True)) if a != b]:
                raise DataError(
                    f"{source}, {cell}: embedrl benchmark must give the hits of view {view} in evaluation.json; "
                    f"{len(different)} of {len(own)} queries differ, the first is {different[0]}"
                )


def cells_table(scores: Path) -> list[str]:
    """Markdown: Hit@1 of each cell by task, and the gain of each over plain-plain with its interval."""
    found = read_results(scores)
    cells = list(next(iter(found.values())).cells)
    lines = ["| task | queries | " + " | ".join(f"{cell} | gain" if i else cell for i, cell in enumerate(cells)) + " |"]
    lines.append("|---|" + "---:|" * (2 * len(cells)))
    for name in [*found, None]:
        tasks = [one for task, one in found.items() if name in (task, None)]
        shown = []
        for cell in cells:
            rows = [list(zip(one.cells[cell].values(), one.cells[cells[0]].values(), strict=True)) for one in tasks]
            one = paired(rows)
            shown += [f"{one.ours:.3f}"] + ([gain_cell(one.gain).strip()] if cell != cells[0] else [])
        lines.append(f"| {name or f'mean of {len(found)}'} | {one.queries} | {' | '.join(shown)} |")
    return lines


def gate_table(fitted: Mapping[str, Any], scored: Mapping[str, Any]) -> list[str]:
    """Markdown: never, always and gated thinking of held-out queries."""
    shares = {"never": 0.0, "always": 1.0, "gated": scored["share"]}
    return [
        "| thinks | of the queries | Hit@1 | ms a query |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {share:.1%} | {scored['hit1'][name]:.3f} | {1e3 * scored['seconds'][name]:.1f} |"
            for name, share in shares.items()
        ),
        "",
        "A query that does not think is compared with candidates without T-CoTs, one that thinks with those with: "
        "never is the cell plain-plain, always tcot-tcot. Times on the CPU, with decoded media.",
        "",
        f"Threshold {fitted['threshold']:.4f}, fitted on {fitted['queries']} other pairs (Hit@1 there: never "
        f"{fitted['hit1']['never']:.3f}, always {fitted['hit1']['always']:.3f}, gated {fitted['hit1']['gated']:.3f}; "
        f"{fitted['share']:.1%} think).",
    ]


def main(
    run: Annotated[Path, typer.Argument(help="finished folder of a run, as runs/tiny_cpu/seed0")],
    out: Annotated[Path, typer.Argument(help="folder to write to")],
    table: Annotated[Path | None, typer.Option(help="also write the tables to this file")] = None,
) -> None:
    """Held-out digits of RUN as a benchmark: four cells, equal to the run's own evaluation, and the gate."""
    heldout, embedder, reasoner = run / "world" / "heldout.parquet", str(run / "embedder"), str(run / "reasoner")
    tasks = write_layout(heldout, out / "data")
    pair = PairOptions(embedder, reasoner, device="cpu")
    run_benchmark("own", pair, str(out / "scores"), str(out / "data"), tables=[str(tasks)])
    check_equal(out / "scores", json.loads((run / "evaluation.json").read_text(encoding="utf-8")))
    family = family_of_config(load_config(embedder))
    samples = [
        sample
        for source in read_tables(tasks).tasks
        for sample in make_samples(source, GATE_PAIRS, scans=HELD_OUT_SCANS, seed=GATE_SEED, family=family, name="gate")
    ]
    write_pairs([sample.record for sample in samples], out / "gate.parquet")
    fitted = fit_gate([str(out / "gate.parquet")], str(out / "gate.json"), pair)
    scored = measure_gate([str(heldout)], pair, read_gate(out / "gate.json", pair))
    lines = [
        "# The tiny pair on held-out digits, through embedrl benchmark",
        "",
        "`python -m recipes.tiny_digits.benchmark RUN OUT --table benchmarks/results/tiny_benchmark.md`. Cells are "
        "queries-candidates; plain-plain and tcot-tcot have the hits of the run's own evaluation.json (raw, after), "
        "query by query. Gains over plain-plain with paired 95% bootstrap intervals over queries.",
        "",
        *cells_table(out / "scores"),
        "",
        "## The gate",
        "",
        *gate_table(fitted, scored),
    ]
    print("\n".join(lines))
    if table is not None:
        table.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
