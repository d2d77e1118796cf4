# SPDX-License-Identifier: Apache-2.0
"""`embedrl rollouts show RUN`: an HTML page of what the Reasoner wrote, with boxes and frames drawn.

Without steps: the T-CoTs of the evaluation (`tcots.jsonl`), before and after RL beside one another, pairs first whose
rank RL changed. With steps: of each pair of a training step the best and the worst rollout of either side.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from embedrl_verl.data.schema import SIDES, Side
from embedrl_verl.errors import ConfigError
from embedrl_verl.report.cases import KINDS, CaseReader, Chosen, evaluated, written_of
from embedrl_verl.report.page import PageHead
from embedrl_verl.report.show import Written, page_to_write, write_page
from embedrl_verl.report.views import Facts
from embedrl_verl.rewards.dump import find_dumps, read_reward_dump
from embedrl_verl.rewards.retrieval import ranks
from embedrl_verl.rewards.trial import is_in, parse_steps


def show_rollouts(
    run: str,
    out: str | None,
    *,
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
        steps: "1,40" or "1,5-10".
        limit: pairs, of each step.
        data: pair files, media_root: of their paths; None: as the run has noted.

    Raises:
        DataError: the run has no T-CoTs, or its pair files are not where they were.
    """
    folder = Path(run)
    page = page_to_write(out or str((folder if folder.is_dir() else folder.parent) / "rollouts.html"))
    if steps is None:
        pairs = sorted(evaluated(folder), key=lambda pair: KINDS.index(pair.change))  # stable: else as in the file
        chosen, how = written_of(pairs[:limit]), "held-out pairs, those first whose rank changed"
        reader = CaseReader.of(folder, "val_files", data, media_root)
    else:
        dumps = find_dumps(run)
        chosen, how = _of_steps(dumps, run, steps, limit), f"of step {steps}, the best and the worst rollout of a side"
        reader = CaseReader.of(dumps[0][1].parent, "train_files", data, media_root)
    facts: Facts = (("run", str(folder)), ("chosen", how), ("boxes are read as", reader.units))
    head = PageHead(f"T-CoTs of {folder.resolve().name}", facts)
    write_page(page, head, reader.cards(chosen), len(chosen), max_mib=max_mib, max_side=picture_side)


def _of_steps(dumps: Sequence[tuple[str, Path]], run: str, steps: str, limit: int) -> Chosen:
    wanted = parse_steps(steps)
    chosen: Chosen = {}
    dumps = [(step, path) for step, path in dumps if is_in(step, wanted)]
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
