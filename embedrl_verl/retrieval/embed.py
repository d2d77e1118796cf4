# SPDX-License-Identifier: Apache-2.0
"""`embedrl embed`: inputs in, parquet parts of vectors out, resumable.

Columns: `id`; `vector`, float32 of fixed size and length 1, null where there is none; `plain`, the same of the input
alone, if it was asked for beside the one with T-CoT; `tcot`, null where the input was embedded alone; `evidence`,
pieces cut for it; `problem`, why there is no vector, else null. The folder is made by data/build.py: parts are whole or
not there, and a command that was killed goes on with the next part.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from embedrl_verl import __version__
from embedrl_verl.data.build import Report, building, finish, make_parts
from embedrl_verl.data.files import CARD_FILE, REJECTED_FILE, part_name, publish, read_object, temporary_name
from embedrl_verl.data.media import LoadedItem
from embedrl_verl.data.threads import default_threads, in_threads
from embedrl_verl.embedder import EmbedInput
from embedrl_verl.errors import ConfigError, EmbedRLError
from embedrl_verl.model import Ask, EmbedRLModel
from embedrl_verl.model.options import PairOptions, placed
from embedrl_verl.model.pair import Encoding, Think
from embedrl_verl.platforms.cluster import Cluster
from embedrl_verl.retrieval.inputs import ROW_ERRORS, Inputs, Part, Reading, Row, read_part
from embedrl_verl.tcot import parse_tcot

FORMAT = "embedrl vectors 1"


def schema(dim: int, vectors: Sequence[str] = ("vector",)) -> pa.Schema:
    """Of parts with vectors of `dim` numbers in these columns."""
    columns = [(name, pa.list_(pa.float32(), dim)) for name in vectors]
    return pa.schema([("id", pa.string()), *columns, *((name, kind) for name, kind in _MORE.items())])


_MORE = {"tcot": pa.string(), "evidence": pa.int32(), "problem": pa.string()}


def embed_inputs(
    inputs: Sequence[str],
    out: str,
    pair: PairOptions,
    how: Reading,
    *,
    think: Think,
    with_plain: bool = False,
    rows_per_part: int,
    batch_size: int,
    max_failed_share: float,
    retry_failed: bool,
    command: Sequence[str],
    cluster: Cluster | None = None,
) -> list[str]:
    """Do what is left to do. Arguments as the command's; `with_plain`: beside vectors with T-CoTs those of the inputs
    alone, which decide what queries think (ThinkGate); `cluster`: where, if not in this process. Returns lines for
    the terminal.

    Raises:
        DataError: more than `max_failed_share` of the rows have no vector.
    """
    if with_plain and think == "never":
        raise ConfigError("--with-plain adds vectors without T-CoTs to those with; without thinking they are the same")
    inputs = [os.path.abspath(one) for one in inputs]  # workers of other nodes have another working directory
    how = replace(how, media_root=how.media_root and os.path.abspath(how.media_root))
    given = Inputs(inputs, rows_per_part)
    settings = {
        **pair.named(),
        "think": think,
        "with_plain": with_plain,
        "side": how.side,
        "instruction": how.instruction,
        "media_root": how.media_root,
        "rows_per_part": rows_per_part,
    }
    facts = {"tool": f"embedrl-verl {__version__}", "command": "embed", "settings": settings, "input": given.facts}
    folder = Path(os.path.abspath(out))
    with building(folder, facts, command, stamps=[given.stamps, pair.stamps()]) as work:
        if work is None:
            return [f"{out} is finished; nothing to do", *_report(folder)]
        for report in work.glob("part-*.json") if retry_failed else ():
            if read_object(report)["rejected"]:
                report.unlink()  # a part without a report is made again
        must_see = [str(work), *inputs, *([how.media_root] if how.media_root else [])]
        with placed(pair, cluster, must_see) as (known, place):
            reports = make_parts(
                Maker(known, think, how, batch_size, with_plain=with_plain),
                given.parts,
                work,
                rows=given.count,
                workers=place.workers,
                max_bad_share=max_failed_share,
                label="embed",
                option="--max-failed-share",
                run=place.run,
            )
        dim = pq.read_schema(folder / part_name(0)).field("vector").type.list_size
        tcots = {name: sum(report["tcots"][name] for report in reports) for name in ("written", "well_formed")}
        more = {"format": FORMAT, "dim": dim, "models": pair.stamps(), "tcots": tcots}
        finish(folder, "vectors", facts, reports, media_root=None, more=more)
    return _report(folder)


def _report(folder: Path) -> list[str]:
    card = read_object(folder / CARD_FILE)
    failed, tcots = card["rejected"], card.get("tcots", {})
    lines = [f"{folder}: {card['records']:,} rows, {failed['rows']:,} without a vector, {card['dim']} numbers a vector"]
    if written := tcots.get("written"):
        share = tcots["well_formed"] / written
        lines.append(f"  {written:,} T-CoTs, {share:.1%} of them well formed; others are embedded as they are")
    lines += [f"  {cause['rows']} x {cause['cause']} (first: {cause['example']})" for cause in failed["causes"]]
    return lines + ([f"  all of them: {folder / REJECTED_FILE}"] if failed["rows"] else [])


class Maker:
    """Makes the part of a task, here or in a worker of a cluster; its first task loads the models, so that it can be
    pickled before. In memory at a time: a batch, what threads decode ahead of it, and a part's vectors."""

    def __init__(
        self, pair: PairOptions, think: Think, how: Reading, batch_size: int, *, with_plain: bool = False
    ) -> None:
        self._pair, self._think, self._how, self._batch_size = pair, think, how, batch_size
        self._with_plain = with_plain

    @cached_property
    def _loaded(self) -> tuple[EmbedRLModel, int]:
        """The models, and the numbers of a vector."""
        model = self._pair.load(self._think)
        (probe,) = model.embedder.vectors([EmbedInput(LoadedItem("a heron", "", (), ()))], self._how.side)
        if isinstance(probe, EmbedRLError):  # no row would have a vector
            raise probe
        return model, len(probe.vector)

    def __call__(self, part: Part, file: Path) -> Report:
        model, dim = self._loaded
        found = list(self._encode(model, part))
        columns: dict[str, Any] = {"vector": _column([one.vector for _, _, one in found], dim)}
        if self._with_plain:
            columns["plain"] = _column([one.plain for _, _, one in found], dim)
        wanted = schema(dim, list(columns))
        columns |= {
            "id": [name for name, _, _ in found],
            "tcot": [one.tcot for _, _, one in found],
            "evidence": [one.evidence for _, _, one in found],
            "problem": [one.problem or None for _, _, one in found],
        }
        table = pa.table(columns)
        temporary = temporary_name(file)
        try:
            table = table.select(wanted.names).cast(wanted)
            pq.write_table(table, temporary, use_dictionary=False, write_page_checksum=True)
            publish(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
        rejected = [
            {"file": where, "id": name, "field": "", "reason": one.problem}
            for name, where, one in found
            if one.vector is None
        ]
        tcots = [one.tcot for _, _, one in found if one.tcot is not None]
        well_formed = sum(parse_tcot(text).is_well_formed for text in tcots)
        counts = {"written": len(tcots), "well_formed": well_formed}
        return {"records": len(found), "by_source": {}, "rejected": rejected, "tcots": counts}

    def _encode(self, model: EmbedRLModel, part: Part) -> Iterator[tuple[str, str, _Row]]:
        """Id and place of each row, and what became of it; not the row, which can hold the bytes of its media."""
        rows = in_threads(_decode, read_part(part, self._how), default_threads(), lambda row: not row.has_media)
        while batch := list(islice(rows, self._batch_size)):
            asks = [ask for _, ask in batch if isinstance(ask, Ask)]
            done = model.encodings(asks, self._how.side, batch_size=self._batch_size)
            alone = model.encodings(asks, self._how.side, think="never", batch_size=self._batch_size)
            for row, ask in batch:
                if isinstance(ask, Ask):
                    yield row.id, row.where, _Row.of(next(done), next(alone) if self._with_plain else None)
                else:
                    yield row.id, row.where, _Row(problem=ask)


class _Row(NamedTuple):
    """What is written of a row; a problem leaves it without vectors."""

    vector: torch.Tensor | None = None
    plain: torch.Tensor | None = None
    tcot: str | None = None
    evidence: int = 0
    problem: str = ""

    @classmethod
    def of(cls, one: Encoding, alone: Encoding | None) -> _Row:
        problem = one.problem or (alone.problem if alone is not None else "")
        if problem:
            return cls(tcot=one.tcot, evidence=one.evidence, problem=problem)
        return cls(one.vector, None if alone is None else alone.vector, one.tcot, one.evidence)


def _column(vectors: Sequence[torch.Tensor | None], dim: int) -> pa.FixedSizeListArray:
    values = np.full((len(vectors), dim), np.nan, np.float32)
    for number, one in enumerate(vectors):
        if one is not None:
            values[number] = one.numpy()
    missing = pa.array([one is None for one in vectors])
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), dim, mask=missing)


def _decode(row: Row) -> tuple[Row, Ask | str]:
    """The row, and it decoded or why not."""
    try:
        return row, row.ask()
    except ROW_ERRORS as error:
        return row, str(error)
