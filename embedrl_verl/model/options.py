# SPDX-License-Identifier: Apache-2.0
"""The pair that a command works with: how it is named, told from another, loaded, and where it computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from embedrl_verl.data.model_files import weight_stamps
from embedrl_verl.data.pool import RunTasks, run_tasks
from embedrl_verl.embedder.loading import load_config
from embedrl_verl.errors import ConfigError
from embedrl_verl.export.record import RECORD_FILE
from embedrl_verl.model import EmbedRLModel
from embedrl_verl.model.gate import ThinkGate
from embedrl_verl.model.loading import Engine
from embedrl_verl.model.pair import Think
from embedrl_verl.platforms.cluster import KEY_NAMES, Cluster


class Place(NamedTuple):
    """What runs tasks, and in how many processes."""

    run: RunTasks = run_tasks
    workers: int = 1


@dataclass(frozen=True)
class PairOptions:
    """Arguments of `EmbedRLModel.from_pretrained`; `overrides` are its settings."""

    embedder: str
    reasoner: str | None = None
    engine: Engine = "transformers"
    prompts_like: str | None = None
    overrides: tuple[str, ...] = ()
    device: str = "auto"

    @classmethod
    def of(cls, settings: Mapping[str, Any], **others: Any) -> PairOptions:
        """Those that `named` gave; `others` that are not None come first."""
        known = {name: settings[name] for name in ("embedder", "reasoner", "engine", "prompts_like", "overrides")}
        known |= {name: value for name, value in others.items() if value}
        return cls(**{**known, "overrides": tuple(known["overrides"])})

    def think(self, asked: Think | None) -> Think:
        """What was asked; else always with a Reasoner, never without."""
        if asked is not None and asked != "never" and self.reasoner is None:
            raise ConfigError(f"--think {asked} needs a Reasoner; name one by --reasoner, or --think never")
        return asked or ("never" if self.reasoner is None else "always")

    def named(self) -> dict[str, Any]:
        """What the vectors depend on, as JSON values."""
        return {
            "embedder": _resolved(self.embedder),
            "reasoner": self.reasoner and _resolved(self.reasoner),
            "engine": self.engine,
            "prompts_like": self.prompts_like and _resolved(self.prompts_like),
            "overrides": list(self.overrides),
        }

    def stamps(self) -> dict[str, list[str]]:
        """Sizes and times of change of both models' weights and training.json, which tell that a path holds another
        model by now."""
        return {
            name: weight_stamps(path, RECORD_FILE)
            for name, path in (("embedder", self.embedder), ("reasoner", self.reasoner))
        }

    def folders(self) -> list[str]:
        """Absolute paths of the models that are on this machine."""
        named = self.named()
        return [
            path for name in ("embedder", "reasoner", "prompts_like") if (path := named[name]) and Path(path).is_dir()
        ]

    def key_names(self) -> set[str]:
        """Environment variables that hold the keys of servers, as the settings name them."""
        words = (one.lstrip("+").partition("=") for one in self.overrides)
        return {value for key, _, value in words if key in KEY_NAMES}

    def cut_to(self) -> list[int]:
        """What the Embedder was trained to have its vectors cut to (`matryoshka_dims`); often nothing."""
        return list(getattr(load_config(self.embedder), "matryoshka_dimensions", None) or ())

    def load(self, think: Think, gate: ThinkGate | None = None) -> EmbedRLModel:
        """Both models; without thinking the Embedder alone, which draws as many frames as with the Reasoner."""
        return EmbedRLModel.from_pretrained(
            self.embedder,
            None if think == "never" else self.reasoner,
            think=think,
            gate=gate,
            engine=self.engine,
            prompts_like=self.prompts_like or (self.reasoner if think == "never" else None),
            settings=self.overrides,
            device=self.device,
        )


@contextmanager
def placed(pair: PairOptions, cluster: Cluster | None, must_see: Sequence[str]) -> Iterator[tuple[PairOptions, Place]]:
    """The pair as workers load it, and what runs them: this process, or a cluster. `must_see`: paths beside the models'
    that every node has."""
    pair = PairOptions.of(pair.named(), device=pair.device)  # workers of other nodes have another working directory
    if cluster is None:
        yield pair, Place()
        return
    from embedrl_verl.platforms.ray_tasks import joined

    seen = [Path(one) for one in (*must_see, *pair.folders())]
    with joined(cluster, pair.device, seen, pair.key_names()) as tasks:
        yield replace(pair, device=tasks.device), Place(tasks.run, tasks.workers)


def _resolved(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).is_dir() else name
