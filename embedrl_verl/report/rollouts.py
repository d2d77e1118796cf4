# SPDX-License-Identifier: Apache-2.0
"""`embedrl rollouts show RUN`: an HTML page of what the Reasoner wrote, with boxes and frames drawn.

Without steps: the T-CoTs of the evaluation (`tcots.jsonl`), before and after RL beside one another, pairs first whose
rank RL changed. With steps: of each pair of a training step the best and the worst rollout of either side.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from embedrl_verl.config.schema import EvidenceConfig, MediaConfig
from embedrl_verl.data.files import read_object
from embedrl_verl.data.media import MediaLimits
from embedrl_verl.data.schema import SIDES, Side, input_kind
from embedrl_verl.data.table import LocatedPair, PairTable
from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.families import BOX_UNITS, box_convention, family_of, token_side
from embedrl_verl.report.evidence import TcotReader
from embedrl_verl.report.page import PageHead
from embedrl_verl.report.rows import rows_with_ids
from embedrl_verl.report.show import Examiner, Written, page_to_write, write_page
from embedrl_verl.report.views import CardView, Facts
from embedrl_verl.rewards.dump import PAIRS, find_dumps, read_reward_dump
from embedrl_verl.rewards.retrieval import ranks
from embedrl_verl.rewards.trial import is_in, parse_steps

TCOTS = "tcots.jsonl"
Chosen = dict[tuple[str, str], dict[Side, list[Written]]]
"""By data source and pair id: what was written about each side."""


def show_rollouts(
    run: str,
    out: str | None,
    *,
    default_family: str,
    steps: str | None = None,
    limit: int = 40,
    data: Sequence[str] | None = None,
    media_root: str | None = None,
    max_mib: float = 20.0,
    picture_side: int = 640,
) -> None:
    """Write the page and print what is on it.

    Args:
        run: folder of a run, or of an evaluation (`embedrl eval --out`).
        out: page to write; None: rollouts.html in the run's folder.
        default_family: whose boxes they are where nothing was noted.
        steps: "1,40" or "1,5-10".
        limit: pairs, of each step.
        data: pair files, media_root: of their paths; None: as the run has noted.

    Raises:
        DataError: the run has no T-CoTs, or its pair files are not where they were.
    """
    folder = Path(run)
    page = page_to_write(out or str((folder if folder.is_dir() else folder.parent) / "rollouts.html"))
    noted = _noted(folder)
    if steps is None:
        chosen, how = _evaluated(folder, limit), "held-out pairs, those first whose rank changed"
        files = data or (noted or {}).get("val_files")
    else:
        chosen, how = _of_steps(run, steps, limit), f"of step {steps}, the best and the worst rollout of each side"
        files = data or (noted or {}).get("train_files")
    if not files:
        raise ConfigError(f"{run} does not say which pair files its T-CoTs are of; name them with --data")
    table = PairTable(files, media_root or (noted or {}).get("media_root"))
    media = MediaConfig.from_config(noted or {})
    family = family_of(media.family if media.family != "auto" else default_family)
    convention = box_convention(family)
    limits = MediaLimits.of(media, token_side(family), media.max_frames)
    examiner = Examiner(TcotReader(convention, limits, EvidenceConfig()), media.max_frames)
    facts: Facts = (("run", str(folder)), ("chosen", how), ("boxes are read as", BOX_UNITS[convention].words))
    head = PageHead(f"T-CoTs of {folder.resolve().name}", facts)
    cards = _cards(examiner, table, chosen)
    write_page(page, head, cards, len(chosen), max_mib=max_mib, max_side=picture_side)


def _noted(folder: Path) -> Mapping[str, Any] | None:
    """What a run has noted about its pairs; an evaluation has it in its result."""
    for file in (folder / PAIRS, folder / "rollouts" / PAIRS, *sorted(folder.glob(f"*/rollouts/{PAIRS}"))):
        if file.is_file():
            return read_object(file)
    result = folder / "evaluation.json"
    found = read_object(result) if result.is_file() else {}
    prompts: dict[str, Any] = next(iter(found.get("prompts", {}).values()), {})
    media = {name: value for name, value in prompts.items() if name != "max_response_length"}
    return {"val_files": found["files"], "media_root": found["media_root"], "embedrl": media} if prompts else None


def _evaluated(folder: Path, limit: int) -> Chosen:
    """The T-CoTs of an evaluation, as many pairs of each kind of change as fit: fixed, broken, the others."""
    if not (folder / TCOTS).is_file():
        raise DataError(
            f"{folder} has no {TCOTS}, which an evaluation writes; --steps 1,40 shows the rollouts of training"
        )
    lines = [json.loads(line) for line in (folder / TCOTS).read_text(encoding="utf-8").splitlines()]
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        if line["view"] != "truth":
            found[line["data_source"], line["pair_id"]].append(line)
    ordered = sorted(found.items(), key=lambda pair: _change(pair[1]))  # stable: else as in the file
    chosen: Chosen = {}
    for pair, several in ordered[:limit]:
        chosen[pair] = {side: [] for side in SIDES}
        rank_of = {line["view"]: line["rank"] for line in several if "rank" in line}
        for line in several:
            rank = rank_of[line["view"]]
            told = (("rank of the target", str(rank) if rank else "not retrieved"),) if line["side"] == "query" else ()
            if line.get("failure"):
                told = (*told, ("failed", line["failure"]))
            name = line["view"]
            chosen[pair][line["side"]].append(Written(line["tcot"] or "", name, f"{name} ", told))
    return chosen


def _change(lines: Sequence[Mapping[str, Any]]) -> int:
    """0: the last view finds at once what the first did not; 1: the other way round; 2: neither."""
    hits = [line["rank"] == 1 for line in lines if "rank" in line]
    return 2 if hits[0] == hits[-1] else int(hits[0])


def _of_steps(run: str, steps: str, limit: int) -> Chosen:
    wanted = parse_steps(steps)
    chosen: Chosen = {}
    dumps = [(step, path) for step, path in find_dumps(run) if is_in(step, wanted)]
    if not dumps:
        raise ConfigError(f"--steps {steps} names no dumped step of {run}")
    for step, path in dumps:
        dump = read_reward_dump(path)
        batch, place = dump.batch, torch.full((len(dump.rows),), torch.nan)
        for side in SIDES:
            direction = batch.direction(side)
            place[direction.rows] = ranks(direction, positives="best").rank.float()
        groups: dict[tuple[str, str], dict[Side, list[int]]] = defaultdict(lambda: {side: [] for side in SIDES})
        for number, (row, side) in enumerate(zip(dump.rows, batch.side.tolist(), strict=True)):
            groups[row["data_source"], row["pair_id"]][SIDES[side]].append(number)
        for pair, sides in list(groups.items())[:limit]:
            told = chosen.setdefault(pair, {side: [] for side in SIDES})
            for side, numbers in sides.items():
                score = dump.parts["score"]
                numbers = sorted(numbers, key=lambda one: -float(score[one].nan_to_num(nan=-torch.inf)))
                for name, number in (("best", numbers[0]), ("worst", numbers[-1])):
                    parts = [(part, _number(values[number])) for part, values in dump.parts.items()]
                    title = f"step {step}, {name} of {len(numbers)}, rollout {int(batch.rollout[number])}"
                    prefix = f"{step}{name[0]}"
                    facts: Facts = (("rank", _number(place[number], ".0f")), *parts)
                    told[side].append(Written(dump.rows[number]["text"], title, prefix, facts))
    return chosen


def _number(value: torch.Tensor, form: str = ".3f") -> str:
    return "unknown" if bool(value.isnan()) else f"{float(value):{form}}"


def _cards(examiner: Examiner, table: PairTable, chosen: Chosen) -> Iterator[CardView]:
    """In the order of `chosen`."""
    numbers = _numbers(table, [pair_id for _, pair_id in chosen])
    for (source, pair_id), written in chosen.items():
        number = numbers[pair_id]
        located = table[number]
        if not isinstance(located, LocatedPair):
            yield examiner.card(located, None)
            continue
        record, root = located.record, table.media_root(number)
        sides = [
            examiner.side(record.item(side), side.capitalize(), input_kind(record, side), root, written=written[side])
            for side in SIDES
        ]
        yield CardView(pair_id, source, f"{Path(located.file).name}, row {located.row}", tuple(sides))


def _numbers(table: PairTable, ids: Iterable[str]) -> dict[str, int]:
    rows = rows_with_ids(table, list(dict.fromkeys(ids)))
    names = table.column("pair_id").take(rows).to_pylist()
    return dict(zip(names, rows, strict=True))
