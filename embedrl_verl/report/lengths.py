# SPDX-License-Identifier: Apache-2.0
"""`embedrl data stats`: lengths of records in tokens, held against the limits of an EG-RL recipe.

Three a side: the prompt with its media, counted with the code that the rollout runs (a pair over the limit is left out
of RL); the T-CoT with its end token (a longer one cannot be written by the policy); the side's own text (the Embedder's
input is cut there).
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from pandas import DataFrame
from tqdm import tqdm

from embedrl_verl.config.schema import EvidenceConfig, MediaConfig
from embedrl_verl.data.schema import SIDES, Side
from embedrl_verl.data.table import LocatedPair, PairTable, Problem
from embedrl_verl.data.threads import default_threads, in_threads
from embedrl_verl.errors import DataError, MediaError
from embedrl_verl.report.rows import choose

if TYPE_CHECKING:  # imports verl
    from embedrl_verl.data.lengths import PromptMeter

Measure: TypeAlias = Literal["prompt", "tcot", "text"]
Lengths: TypeAlias = dict[tuple[Measure, Side], int]
Tokens: TypeAlias = "dict[tuple[str, Measure, Side], array[int]]"
PERCENTILES = (50, 90, 99)
SHOWN_BAD = 20


@dataclass(frozen=True)
class RecipeLimits:
    """Sections `data.embedrl` and `embedrl.evidence`, three keys of `data`, and `embedrl.embedder.max_text_tokens`.
    Defaults are those of the configuration `egrl_trainer`."""

    data: MediaConfig = MediaConfig()  # noqa: RUF009 - immutable
    evidence: EvidenceConfig = EvidenceConfig()  # noqa: RUF009
    media_root: str | None = None
    max_prompt_length: int = 14336
    max_response_length: int = 2048
    max_text_tokens: int = 480


def recipe_limits(overrides: Sequence[str], named: Mapping[str, Any]) -> RecipeLimits:
    """Limits of a run with these hydra overrides, as a recipe takes them on its command line; [] needs no verl.
    `named` values, of fields of `RecipeLimits` and of `data.embedrl`, win over them."""
    limits = RecipeLimits()
    if overrides:
        from embedrl_verl.config import load_embedrl_config
        from embedrl_verl.config.compose import compose

        config = compose(["embedrl.embedder.path=none", *overrides])  # a required key that has no say here
        section, of_data = load_embedrl_config(config), ("media_root", "max_prompt_length", "max_response_length")
        limits = RecipeLimits(
            data=MediaConfig.from_config(config.data),
            evidence=section.evidence,
            max_text_tokens=section.embedder.max_text_tokens,
            **{name: config.data[name] for name in of_data},
        )
    own = {field.name for field in fields(RecipeLimits)} & set(named)
    data = replace(limits.data, **{name: named[name] for name in named if name not in own})
    return replace(limits, data=data, **{name: named[name] for name in own})


@dataclass(frozen=True)
class LengthMeter:
    """Counts the lengths of records. Safe to call from several threads."""

    limits: RecipeLimits
    prompts: PromptMeter

    @classmethod
    def from_pretrained(cls, path: str, limits: RecipeLimits) -> LengthMeter:
        from embedrl_verl.data.lengths import PromptMeter  # imports verl

        return cls(limits, PromptMeter.from_pretrained(path, limits.data.family))

    def limit(self, measure: Measure) -> int:
        of = self.limits
        return {"prompt": of.max_prompt_length, "tcot": of.max_response_length, "text": of.max_text_tokens}[measure]

    def measure(self, pair: LocatedPair, media_root: str | None) -> Lengths:
        """A side without T-CoT or text has no length of it. The MediaError of a medium names file, row and field."""
        from embedrl_verl.data.inspection import PairInspector  # imports torch

        prompts = PairInspector(self.limits.data, self.prompts.family, media_root, self.prompts).inspect(pair).tokens
        lengths: Lengths = {}
        for side in SIDES:
            item = pair.record.item(side)
            lengths["prompt", side] = prompts[side] or 0
            texts: dict[Measure, str] = {"tcot": item.tcot, "text": item.text}
            for name, text in texts.items():
                if text.strip():
                    ids = self.prompts.tokenizer(text, add_special_tokens=False)["input_ids"]
                    lengths[name, side] = len(ids) + (name == "tcot")  # its end token
        return lengths


def print_lengths(
    files: Sequence[str], tokenizer: str, limits: RecipeLimits, limit: int | None, seed: int | None, *, as_json: bool
) -> int:
    """Count the rows, or `limit` of them, and print. Returns 0, or 3 if a row cannot be used: it is not counted."""
    table = PairTable(files, limits.media_root)
    chosen = choose(table, len(table) if limit is None else limit, seed)
    meter = LengthMeter.from_pretrained(tokenizer, limits)

    def measure(number: int) -> tuple[str, Lengths] | str:
        pair = table[number]
        if isinstance(pair, Problem):
            return pair.message
        try:
            return pair.record.data_source, meter.measure(pair, table.media_root(number))
        except MediaError as error:
            return str(error)

    tokens: Tokens = {}
    everything: Tokens = {}
    bad: list[str] = []
    measured = in_threads(measure, chosen, default_threads())
    for found in tqdm(measured, total=len(chosen), desc="counting tokens", unit="record", disable=None):
        if isinstance(found, str):
            bad.append(found)
            continue
        for key, count in found[1].items():
            tokens.setdefault((found[0], *key), array("i")).append(count)
    for (_, name, side), counts in tokens.items():
        everything.setdefault(("all", name, side), array("i")).extend(counts)
    by_source, of_all = summaries(tokens, meter), summaries(everything, meter)
    counted, code = len(chosen) - len(bad), DataError.exit_code if bad else 0
    if as_json:
        report = {
            "files": [str(file) for file in table.files],
            "records": len(table),
            "counted": counted,
            "unusable": len(bad),
            "first_unusable": bad[:SHOWN_BAD],
            "limits": asdict(limits),
            "lengths": by_source,
            "all": of_all,
        }
        print(json.dumps(report, indent=1, ensure_ascii=False))
        return code
    if counted:
        names = {"source": "data source", "measure": "length", "share_over": "share over"}
        told = {"mean": "{:.1f}".format, "share over": "{:.2%}".format}
        print(DataFrame(by_source + of_all).rename(columns=names).to_string(index=False, formatters=told), end="\n\n")
    print(
        "lengths in tokens. prompt: with media, against data.max_prompt_length. tcot: with its end token, against\n"
        "data.max_response_length. text: of the side itself, cut by the Embedder at embedrl.embedder.max_text_tokens."
    )
    for message in bad[:SHOWN_BAD]:
        print(f"BAD {message}")
    more = f"; the first {SHOWN_BAD} are named" if len(bad) > SHOWN_BAD else ""
    print(f"{counted} of {len(table)} records counted, {len(bad)} cannot be used{more}")
    return code


def summaries(tokens: Tokens, meter: LengthMeter) -> list[dict[str, Any]]:
    """By source, length and side. Percentiles are lengths that rows have (nearest rank)."""
    found = []
    for source, name, side in sorted(tokens):
        counts, limit = np.asarray(tokens[source, name, side]), meter.limit(name)
        ranks = np.percentile(counts, PERCENTILES, method="inverted_cdf").tolist()
        summary = {"source": source, "measure": name, "side": side, "rows": len(counts), "mean": float(counts.mean())}
        summary |= {f"p{percent}": rank for percent, rank in zip(PERCENTILES, ranks, strict=True)}
        over = counts > limit
        summary |= {"max": int(counts.max()), "limit": limit, "over": int(over.sum()), "share_over": float(over.mean())}
        found.append(summary)
    return found
