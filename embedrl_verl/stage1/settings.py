# SPDX-License-Identifier: Apache-2.0
"""The configuration of stage 1, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from embedrl_verl.config.rules import missing_files
from embedrl_verl.config.schema import ContrastiveConfig, EmbedderConfig, EvidenceConfig, MediaConfig, Stage1DataConfig
from embedrl_verl.data.run_files import root_of_files
from embedrl_verl.errors import ConfigError
from embedrl_verl.families import FAMILIES


@dataclass(frozen=True)
class Stage1Config:
    """The whole configuration. `media` is `data.embedrl`, of the model that wrote the T-CoTs."""

    data: Stage1DataConfig
    media: MediaConfig
    embedder: EmbedderConfig
    evidence: EvidenceConfig
    contrastive: ContrastiveConfig

    def missing_files(self) -> list[str]:
        """Files and folders that are named and not there, each with its key."""
        named = {"data.train_files": self.data.train_files, "data.val_files": self.data.val_files}
        return missing_files(named, self.data.media_root)


def load_stage1_config(config: Any) -> Stage1Config:
    """Check a composed hydra configuration; ConfigError names the first key that is unknown or has a bad value."""
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict), type(plain)
    unknown = sorted(set(map(str, plain)) - {"data", "embedrl", "contrastive"})
    if unknown:
        raise ConfigError(f"unknown section {', '.join(unknown)}; known are data, embedrl and contrastive")
    data, sections = dict(plain["data"]), dict(plain["embedrl"])
    media = MediaConfig(**data.pop("embedrl"))
    for name in ("train_files", "val_files"):
        if isinstance(data.get(name), str):
            data[name] = [data[name]]
    data["media_root"] = root_of_files([*data["train_files"], *data["val_files"]], data["media_root"])
    embedder, evidence = sections.pop("embedder"), sections.pop("evidence")
    if sections:
        raise ConfigError(f"embedrl has no key {', '.join(sorted(sections))}; its keys are embedder, evidence")
    checked = Stage1Config(
        Stage1DataConfig(**data),
        media,
        EmbedderConfig(**embedder),
        EvidenceConfig(**evidence),
        ContrastiveConfig(**plain["contrastive"]),
    )
    train = checked.embedder.train
    rules = (
        (
            media.family != "auto",
            f"data.embedrl.family must name the family of the model that wrote the T-CoTs ({', '.join(FAMILIES)}): "
            "it decides the units of their boxes; got auto",
        ),
        (
            checked.embedder.strategy != "megatron",
            "embedrl.embedder.strategy must be fsdp2 or fsdp in stage 1; got megatron",
        ),
        (train.enable, "embedrl.embedder.train.enable must be True in stage 1; got False"),
        (not train.ema_decay, "embedrl.embedder.train.ema_decay is for co-training; it must be 0 in stage 1"),
    )
    for holds, message in rules:
        if not holds:
            raise ConfigError(message)
    return checked
