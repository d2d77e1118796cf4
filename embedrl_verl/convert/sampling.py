# SPDX-License-Identifier: Apache-2.0
"""Which rows of a source are used: caps, evenly spaced or random draws, and the published tables as presets.

`sampling.yaml` beside this file has the numbers: `paper_caps` (caps and weights of Embed-RL's contrastive stage),
`vlm2vec_v2`, and `rl_13` (its RL stage; `embedrl data split` draws it after the filter).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, TypeAlias

import numpy as np
import yaml

from embedrl_verl.errors import ConfigError

METHODS = ("even", "random")
Rows: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"


@dataclass(frozen=True)
class Preset:
    """A published table; the comments of `sampling.yaml` say what the fields and the entries of `sources` mean."""

    origin: str
    note: str
    sources: Mapping[str, Mapping[str, Any]]
    by_draw: bool = False

    @property
    def caps(self) -> dict[str, int]:
        return {name: entry["rows"] for name, entry in self.sources.items() if "rows" in entry}

    @property
    def weights(self) -> dict[str, float]:
        """As published, without the sources that are left out of contrastive training."""
        of = self.sources.items()
        return {name: entry["weight"] for name, entry in of if "weight" in entry and not entry.get("left_out")}

    def source_weights(self, pairs: Mapping[str, int]) -> dict[str, float]:
        """Weights as `contrastive.source_weights` means them (drawn weight x pairs times an epoch), of the sources that
        have pairs."""
        weights = {name: weight for name, weight in self.weights.items() if pairs.get(name)}
        if not self.by_draw or not weights:
            return weights
        of_a_pair = {name: weight / pairs[name] for name, weight in weights.items()}
        largest = max(of_a_pair.values())  # becomes 1: no pair comes twice in an epoch
        return {name: float(f"{weight / largest:.6g}") for name, weight in of_a_pair.items()}


@dataclass(frozen=True)
class Sampling:
    """How rows are drawn: `caps` by data source, `default_cap` of those that are not named (None: all rows),
    evenly spaced (position i is floor(i x total / cap)) or at random by `seed` and the source's name."""

    caps: Mapping[str, int] = field(default_factory=dict)
    default_cap: int | None = None
    method: str = "even"
    seed: int = 0
    preset: str = ""

    def __post_init__(self) -> None:
        for name, cap in [*self.caps.items(), ("", self.default_cap)]:
            if cap is not None and cap < 1:
                raise ConfigError(f"a cap must be at least 1 row; got {cap}{f' for {name}' if name else ''}")

    def cap(self, source: str) -> int | None:
        """Rows used at most of a source; None = all."""
        return self.caps.get(source, self.default_cap)

    def choose(self, source: str, total: int) -> Rows | None:
        """Ascending positions, of 0..total-1, that are used; None = all of them."""
        cap = self.cap(source)
        if cap is None or cap >= total:
            return None
        if self.method == "even":
            return np.arange(cap, dtype=np.int64) * total // cap
        digest = hashlib.sha256(f"{self.seed}\0{source}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        return np.sort(rng.choice(total, size=cap, replace=False, shuffle=False)).astype(np.int64)


@cache
def presets() -> dict[str, Preset]:
    """All published tables by name."""
    text = (resources.files("embedrl_verl.convert") / "sampling.yaml").read_text(encoding="utf-8")
    return {name: Preset(**table) for name, table in yaml.safe_load(text).items()}


def preset(name: str) -> Preset:
    if name not in presets():
        raise ConfigError(f"unknown preset {name!r}; known are {', '.join(presets())}")
    return presets()[name]


def sampling_from_options(caps: Iterable[str], preset_name: str, method: str = "even", seed: int = 0) -> Sampling:
    """From `--cap 50000`, `--cap SOURCE=1000`, `--preset NAME`; a cap wins over the preset's."""
    by_source: dict[str, int] = {}
    for text in caps:
        source, _, number = text.rpartition("=")
        if not number.isdecimal():
            raise ConfigError(f"--cap takes ROWS or SOURCE=ROWS; got {text!r}")
        by_source[source] = int(number)
    default = by_source.pop("", None)
    return Sampling((preset(preset_name).caps if preset_name else {}) | by_source, default, method, seed, preset_name)
