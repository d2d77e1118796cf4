# SPDX-License-Identifier: Apache-2.0
"""Pairs with what Reasoners wrote about them: those of an evaluation, with what T-CoTs fixed and broke; their cards."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
from typing_extensions import Self

from embedrl_verl.config.schema import EvidenceConfig, MediaConfig
from embedrl_verl.data.files import read_object
from embedrl_verl.data.schema import SIDES, Side, input_kind
from embedrl_verl.data.table import LocatedPair, PairTable
from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.evaluation.comparison import RAW
from embedrl_verl.families import BOX_UNITS, DEFAULT_FAMILY, family_of
from embedrl_verl.report.evidence import TcotReader
from embedrl_verl.report.rows import rows_with_ids
from embedrl_verl.report.show import Examiner, Written
from embedrl_verl.report.views import CardView
from embedrl_verl.rewards.dump import PAIRS

TCOTS = "tcots.jsonl"
Chosen = dict[tuple[str, str], dict[Side, list[Written]]]
"""By data source and pair id: what was written about each side."""

Change = Literal["fixed", "broken", "same"]
KINDS: tuple[Change, ...] = get_args(Change)


@dataclass(frozen=True)
class Evaluated:
    """A pair of an evaluation: its lines in `tcots.jsonl`, and by view the rank of its target, 0 if not retrieved;
    first that of the input alone, where `evaluation.json` tells it."""

    source: str
    pair_id: str
    lines: list[dict[str, Any]]
    ranks: dict[str, int]

    @property
    def compared(self) -> tuple[str, str]:
        """The first and the last view with T-CoTs; with but one, the input alone and this one."""
        views = [view for view in self.ranks if view != RAW]
        return (views if len(views) > 1 else list(self.ranks))[0], views[-1]

    @property
    def change(self) -> Change:
        """Whether the last view finds at once what the first does not, or the other way round."""
        first, last = (self.ranks[view] == 1 for view in self.compared)
        return "same" if first == last else "fixed" if last else "broken"


def evaluated(folder: Path) -> list[Evaluated]:
    """The pairs of an evaluation, in the order of the file; DataError without `tcots.jsonl`."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; name that of a run, or of embedrl eval")
    if not (folder / TCOTS).is_file():
        raise DataError(
            f"{folder} has no {TCOTS}, which an evaluation writes; --steps 1,40 shows the rollouts of training"
        )
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    text = (folder / TCOTS).read_text(encoding="utf-8")
    for line in map(json.loads, filter(None, text.split("\n"))):  # not splitlines: a T-CoT may hold U+2028
        if line["view"] != "truth":
            found[line["data_source"], line["pair_id"]].append(line)
    result = folder / "evaluation.json"
    plain = read_object(result).get("views", {}).get(RAW, {}).get("ranks", {}) if result.is_file() else {}
    if plain and {source: len(ranks) for source, ranks in plain.items()} != Counter(source for source, _ in found):
        raise DataError(f"{result} and {TCOTS} beside it must be of the same pairs; evaluate again")
    left = {source: iter(ranks) for source, ranks in plain.items()}  # in the order of the file, as the lines
    pairs = []
    for (source, pair_id), lines in found.items():
        raw = {RAW: next(left[source])} if source in left else {}
        pairs.append(
            Evaluated(source, pair_id, lines, raw | {one["view"]: one["rank"] for one in lines if "rank" in one})
        )
    return pairs


def written_of(pairs: Iterable[Evaluated]) -> Chosen:
    """The T-CoTs of some pairs, by view, with ranks and failures."""
    chosen: Chosen = {}
    for pair in pairs:
        told = chosen[pair.source, pair.pair_id] = {side: [] for side in SIDES}
        for line in pair.lines:
            rank, name = pair.ranks[line["view"]], line["view"]
            facts = (("rank of the target", str(rank) if rank else "not retrieved"),) if line["side"] == "query" else ()
            if line.get("failure"):
                facts = (*facts, ("failed", line["failure"]))
            told[line["side"]].append(Written(line["tcot"] or "", name, f"{name} ", facts))
    return chosen


@dataclass(frozen=True)
class CaseReader:
    """Makes cards of a run's pairs and what was written about them; `units` of the boxes, in words; `readers` of those
    views of an evaluation whose Reasoner was noted: boxes are in the units of its family."""

    examiner: Examiner
    table: PairTable
    units: str
    readers: Mapping[str, TcotReader]

    @classmethod
    def of(cls, folder: Path, which: str, data: Sequence[str] | None = None, media_root: str | None = None) -> Self:
        """Of the pair files that the run has noted as `which` ("val_files", "train_files"), or `data`.

        Raises:
            ConfigError: nothing says which files. DataError: they cannot be read.
        """
        noted, prompts = _of_evaluation(folder) if which == "val_files" else ({}, {})
        noted = noted or _of_run(folder)
        files = data or noted.get(which)
        if not files:
            raise ConfigError(f"{folder} does not say which pair files its T-CoTs are of; name them with --data")
        table = PairTable(files, media_root or noted.get("media_root"))
        media = MediaConfig.from_config(noted)
        reader = _reader(media)
        readers = {view: _reader(*_asked(one)) for view, one in prompts.items()}
        units = dict.fromkeys(BOX_UNITS[one.convention].words for one in readers.values() or [reader])
        return cls(Examiner(reader, media.max_frames), table, " or ".join(units), readers)

    def cards(self, chosen: Chosen) -> Iterator[CardView]:
        """In the order of `chosen`."""
        numbers = _numbers(self.table, chosen)
        for (source, pair_id), written in chosen.items():
            number = numbers[source, pair_id]
            located = self.table[number]
            if not isinstance(located, LocatedPair):
                yield self.examiner.card(located, None)
                continue
            record, root = located.record, self.table.media_root(number)
            sides = [
                self.examiner.side(
                    record.item(side),
                    side.capitalize(),
                    input_kind(record, side),
                    root,
                    written=[one._replace(reader=self.readers.get(one.title)) for one in written[side]],
                )
                for side in SIDES
            ]
            yield CardView(pair_id, source, f"{Path(located.file).name}, row {located.row}", tuple(sides))


def _of_run(folder: Path) -> Mapping[str, Any]:
    """What a run has noted about its pairs, in its folder or in that of its rollouts; {} if nothing."""
    for file in (folder / PAIRS, folder / "rollouts" / PAIRS, *sorted(folder.glob(f"*/rollouts/{PAIRS}"))):
        if file.is_file():
            return read_object(file)
    return {}


def _of_evaluation(folder: Path) -> tuple[Mapping[str, Any], dict[str, dict[str, Any]]]:
    """What `embedrl eval` has noted about its pairs, and how each view was asked; nothing where it is another's."""
    result = folder / "evaluation.json"
    found = read_object(result) if result.is_file() else {}
    prompts = {
        view: {name: value for name, value in prompt.items() if name != "max_response_length"}
        for view, prompt in found.get("prompts", {}).items()
    }
    if not prompts:
        return {}, {}
    media = {name: value for name, value in next(iter(prompts.values())).items() if name != "evidence"}
    return {"val_files": found["files"], "media_root": found["media_root"], "embedrl": media}, prompts


def _asked(prompt: Mapping[str, Any]) -> tuple[MediaConfig, EvidenceConfig]:
    """How a view was asked, and what of its T-CoTs was cut; older evaluations do not say the latter."""
    values = dict(prompt)
    evidence = EvidenceConfig(**values.pop("evidence", {}))
    return MediaConfig.from_config({"embedrl": values}), evidence


def _reader(media: MediaConfig, evidence: EvidenceConfig = EvidenceConfig()) -> TcotReader:  # noqa: B008 - immutable
    family = family_of(media.family) if media.family != "auto" else DEFAULT_FAMILY
    return TcotReader.of(media, family, evidence)


def _numbers(table: PairTable, chosen: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int]:
    wanted = dict.fromkeys(chosen)
    rows = rows_with_ids(table, list(dict.fromkeys(pair_id for _, pair_id in wanted)))
    found: dict[tuple[str, str], int] = {}
    taken = pa.array(rows, pa.int64())  # an empty list has no type
    names = zip(*(table.column(name).take(taken).to_pylist() for name in ("data_source", "pair_id")), strict=True)
    for pair, row in zip(names, rows, strict=True):
        if pair in wanted and pair in found:
            raise DataError(f"{' and '.join(str(table.place(one)[0]) for one in (found[pair], row))} both have {pair}")
        found[pair] = row
    if missing := [pair for pair in wanted if pair not in found]:
        raise DataError(f"no row has the data_source and pair_id {', '.join(map(repr, missing[:5]))}")
    return found
