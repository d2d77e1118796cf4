# SPDX-License-Identifier: Apache-2.0
"""`embedrl eval`: retrieval on any pair file, plain and with the T-CoTs of one or more Reasoners.

Reasoners are asked and evidence is cut as in training: the settings are those of the run's configuration, and what no
override names is taken from a Reasoner's own `training.json` (checkpoints and exports have one).
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from embedrl_verl.data.files import write_atomically
from embedrl_verl.errors import ConfigError
from embedrl_verl.evaluation.comparison import RAW, hit1_interval, interval_words, source_table, verdict
from embedrl_verl.evaluation.retrieval import NDCG_K, Pairs, Tcots, score_view, tcot_lines, write_tcots
from embedrl_verl.evaluation.stamp import ModelFacts, model_facts
from embedrl_verl.model.loading import check_reasoner, load_embedder, load_reasoner, read_settings
from embedrl_verl.model.tcots import Writes


def named_reasoners(words: Iterable[str]) -> dict[str, str]:
    """ "NAME=FOLDER" or "FOLDER" words as name -> folder; without a name the folder's own."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        name, path = (name, path) if equals and "/" not in name else (Path(word).resolve().name, word)
        if name in (RAW, "truth") or name in found or not path:
            raise ConfigError(f"--reasoner must be NAME=FOLDER with names of their own, not {RAW}; got {word!r}")
        found[name] = path
    return found


def run_eval(
    files: Sequence[str],
    embedder: str,
    reasoners: Sequence[str],
    out: str,
    *,
    media_root: str | None = None,
    limit: int | None = None,
    device: str = "auto",
    overrides: Sequence[str] = (),
    overwrite: bool = False,
) -> None:
    """Evaluate and write `evaluation.json` and `tcots.jsonl` to `out`; prints the table. Arguments as the command's."""
    folder, named = Path(out), named_reasoners(reasoners)
    if (folder / "evaluation.json").exists() and not overwrite:
        raise ConfigError(f"--out {out} has an evaluation.json; choose another folder, or replace it with --overwrite")
    _check_out(folder)
    settings = read_settings(embedder, overrides, device)
    root = media_root or settings.data["media_root"]
    root = root and str(Path(root).expanduser().resolve())  # it is noted for who reads the T-CoTs elsewhere
    files = [str(Path(file).resolve()) for file in files]
    for path in named.values():  # not after hours with those before it
        check_reasoner(path)
    max_frames = settings.max_frames(list(named.values()))
    pairs = Pairs.read(files, root, limit, max_frames)
    started = time.monotonic()
    reader = load_embedder(settings, max_frames)
    views, written = {RAW: score_view(reader, pairs, None, None, settings.embedrl.evidence)}, {}
    prompts: dict[str, Any] = {}
    for name, path in named.items():
        reasoner = load_reasoner(path, settings)
        media, length = settings.asked(path)
        prompts[name] = dataclasses.asdict(media) | {"family": reasoner.family, "max_response_length": length}
        evidence = settings.evidence(path)
        prompts[name]["evidence"] = dataclasses.asdict(evidence)
        tcots = _write(name, reasoner, pairs)
        views[name] = score_view(reader, pairs, tcots, reasoner.family, evidence)
        written[name] = tcot_lines(pairs, name, tcots, views[name]["ranks"])
        del reasoner
    facts: dict[str, Any] = {"prompts": prompts, "files": files, "media_root": root, "limit": limit}
    write_results(folder, pairs, views, written, model=model_facts(settings), **facts)
    print("\n".join(report_lines(views)))
    print(f"\n{time.monotonic() - started:.0f} s; wrote {folder}/evaluation.json and tcots.jsonl")


def _check_out(folder: Path) -> None:
    """Refuse a folder that could not be written at the end, hours later."""
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {folder} cannot be written ({there}); choose another folder")


def _write(name: str, reasoner: Writes, pairs: Pairs) -> Tcots:
    with tqdm(total=2 * len(pairs.records), desc=f"T-CoTs of {name}", unit="row", disable=None) as bar:
        return write_tcots(reasoner, pairs, said=bar.update)


def write_results(
    folder: Path,
    pairs: Pairs,
    views: Mapping[str, Mapping[str, Any]],
    tcots: Mapping[str, Sequence[Mapping[str, Any]]],
    suffix: str = "",
    model: ModelFacts | None = None,
    **facts: Any,
) -> None:
    """Write `evaluation.json` and `tcots.jsonl`, with `suffix` in their names.

    Args:
        model: for the stamp.
        facts: others, of the evaluation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for several in tcots.values() for line in several]
    write_atomically(folder / f"tcots{suffix}.jsonl", "".join(lines))
    counts = {source: len(numbers) for source, numbers in pairs.by_source.items()}
    ids = {source: [pairs.records[i].pair_id for i in numbers] for source, numbers in pairs.by_source.items()}
    stamp = {"pairs": pairs.digest(), "max_frames": str(pairs.max_frames), **dataclasses.asdict(model or ModelFacts())}
    result = {"pairs": len(pairs.records), "queries": counts, "ndcg_k": NDCG_K, "stamp": stamp, **facts}
    result |= {"query_ids": ids, "views": views}
    write_atomically(folder / f"evaluation{suffix}.json", json.dumps(result, indent=1) + "\n")


def report_lines(views: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table by source, what T-CoTs are like, and what failed."""
    lines = ["Hit@1: every query against all targets of its data source"]
    lines += source_table(
        [views], {name: name for name in views}, RAW, [name for name in views if name not in (RAW, "truth")]
    )
    for name, view in views.items():
        if quality := view["quality"]:
            gain = hit1_interval([views], name, RAW)
            lines.append(
                f"{name}: Hit@1 {gain.mean:+.3f} against {RAW} ({interval_words(gain)} over queries): "
                f"{verdict(gain)}; well-formed {quality['well_formed']:.1%}"
            )
    return lines + failure_lines(views)


def failure_lines(views: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Of each view that has some: how many inputs have no vector, and why the first."""
    lines = []
    for name, view in views.items():
        if view["failed_rows"]:
            lines.append(f"ATTENTION: {name}: {view['failed_rows']} inputs without a vector, counted as misses:")
            lines += [f"  {problem}" for problem in view["problems"]]
    return lines
