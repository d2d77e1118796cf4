# SPDX-License-Identifier: Apache-2.0
"""What decides which pairs train the Embedder (contrastive stage), which train the Reasoner (RL), and which neither.

Which pairs feed RL is contradictory in the paper: section 3.2 says those that the relevance filter drops, appendix C.3
those that it keeps. The default is the former, `mismatch`: its pairs are hard, and the Embedder that will be the reward
model has not been trained on them. Some of them are simply wrong pairs, though; `match` is the other reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from embedrl_verl.convert.sampling import Sampling, preset
from embedrl_verl.errors import ConfigError

RlFrom = Literal["mismatch", "match", "all"]
Unknown = Literal["left_out", "match"]
Disjoint = Literal["off", "media", "all"]


@dataclass(frozen=True)
class SplitSettings:
    """How pairs are split.

    Attributes:
        rl_from: verdicts of the pairs that RL may draw: "mismatch", "match", or "all" (every verdict, also "unknown").
        rl_rows: data source → pairs that RL gets, exactly. With any, or a preset, no other source gives RL pairs
            unless `rl_rows_each` is set.
        rl_rows_each: at most so many RL pairs of each source that is not named; None = all candidates, or with named
            sources none.
        rl_preset: table of `convert/sampling.yaml` that names sources and numbers, "rl_13"; `rl_rows` wins over it.
        allow_short: a named source may be missing or have fewer candidates.
        sampling: "even": of a source's n candidates in the order of the input, those at floor(i x n / k), i = 0..k-1;
            "random": by `seed` and the source's name.
        seed: of "random".
        unknown: pairs without a verdict are "left_out", or treated as "match".
        keep_rl_matches: RL pairs whose verdict is match train the Embedder as well (appendix C.3 to the letter).
        contrastive_without: sources that the contrastive set leaves out.
        disjoint_targets: leave out contrastive pairs whose target content is in the RL set: of targets with media,
            of "all" targets, or "off". Short answers ("yes") are in both sets of any source; "all" would lose
            every such pair.
    """

    rl_from: RlFrom = "mismatch"
    rl_rows: Mapping[str, int] = field(default_factory=dict)
    rl_rows_each: int | None = None
    rl_preset: str = ""
    allow_short: bool = False
    sampling: Literal["even", "random"] = "even"
    seed: int = 0
    unknown: Unknown = "left_out"
    keep_rl_matches: bool = False
    contrastive_without: tuple[str, ...] = ()
    disjoint_targets: Disjoint = "off"

    def __post_init__(self) -> None:
        for name, kind in (("rl_from", RlFrom), ("unknown", Unknown), ("disjoint_targets", Disjoint)):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(kind))}; got {getattr(self, name)!r}")
        if self.rl_rows_each is not None and self.rl_rows_each < 0:
            raise ConfigError(f"the RL pairs of a source must be at least 0; got {self.rl_rows_each}")
        for source, rows in self.rl_rows.items():
            if rows < 0:
                raise ConfigError(f"the RL pairs of {source} must be at least 0; got {rows}")
        if self.keep_rl_matches and self.disjoint_targets != "off":
            raise ConfigError("keep_rl_matches puts pairs in both sets; disjoint_targets must be off then")
        self.draw()

    def named_rows(self) -> dict[str, int]:
        """Sources of which RL gets an exact number of pairs: those of the preset and of `rl_rows`."""
        table = preset(self.rl_preset).caps if self.rl_preset else {}
        return {**table, **self.rl_rows}

    def draw(self) -> Sampling:
        """The draw of RL pairs, for the sources that give any."""
        named = {source: rows for source, rows in self.named_rows().items() if rows}
        return Sampling(named, self.rl_rows_each or None, self.sampling, self.seed, self.rl_preset)

    def gives_rl(self, source: str) -> bool:
        """True if RL may draw pairs of this source."""
        named = self.named_rows()
        if source in named:
            return named[source] > 0
        return not named if self.rl_rows_each is None else self.rl_rows_each > 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON; equal settings give equal values."""
        return {**asdict(self), "rl_rows": dict(sorted(self.rl_rows.items()))}
