# SPDX-License-Identifier: Apache-2.0
"""The configuration of stage 1, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from embedrl_verl.config.schema import EmbedderConfig, EvidenceConfig, build_section
from embedrl_verl.data.settings import DataSettings
from embedrl_verl.errors import ConfigError


@dataclass(frozen=True)
class ContrastiveConfig:
    """The section `contrastive`: batches and the course of the run.

    Attributes:
        batch_pairs: pairs of one update, over all devices.
        sub_batch_pairs: pairs of one source that stand together in a batch; divides `batch_pairs`.
        max_video_sub_batches: most sub-batches of video sources in one batch.
        source_weights: source -> weight; a source is drawn weight x its pairs times an epoch. 1 where not named.
        raw_share: share of the batches that are embedded without T-CoT and evidence.
        epochs: passes over the data; total_steps: updates, instead of epochs.
        test_freq, save_freq: updates between two validations and checkpoints; 0 = only at the end.
        keep_checkpoints: how many stay.
        log_freq: updates between two lines in the terminal; the file has all of them.
        num_workers: processes of each device that decode and encode.
        resume: go on from the last checkpoint in `out`, if there is one.
        max_empty_batches: batches in a row without any negative (all targets the same) before the run stops.
    """

    out: str | None = None
    batch_pairs: int = 512
    sub_batch_pairs: int = 256
    max_video_sub_batches: int = 1
    source_weights: dict[str, float] = field(default_factory=dict)
    raw_share: float = 0.0
    epochs: int = 2
    total_steps: int | None = None
    test_freq: int = 0
    save_freq: int = 500
    keep_checkpoints: int = 2
    log_freq: int = 10
    num_workers: int = 4
    seed: int = 0
    resume: bool = True
    max_empty_batches: int = 10

    def __post_init__(self) -> None:
        def require(condition: bool, key: str, rule: str) -> None:
            if not condition:
                raise ConfigError(f"contrastive.{key} must be {rule}; got {getattr(self, key)!r}")

        require(bool(self.out), "out", "a folder to write to")
        for name in (
            "sub_batch_pairs",
            "max_video_sub_batches",
            "epochs",
            "keep_checkpoints",
            "log_freq",
            "max_empty_batches",
        ):
            require(getattr(self, name) >= 1, name, "1 or more")
        for name in ("test_freq", "save_freq", "num_workers", "seed"):
            require(getattr(self, name) >= 0, name, "0 or more")
        require(self.batch_pairs >= 2, "batch_pairs", "2 or more: a pair alone has no negatives")
        require(
            self.batch_pairs % self.sub_batch_pairs == 0,
            "batch_pairs",
            f"a multiple of sub_batch_pairs ({self.sub_batch_pairs})",
        )
        require(0 <= self.raw_share <= 1, "raw_share", "between 0 and 1")
        require(self.total_steps is None or self.total_steps >= 1, "total_steps", "null or 1 or more")
        require(all(weight > 0 for weight in self.source_weights.values()), "source_weights", "positive")


@dataclass(frozen=True)
class DataConfig:
    """The section `data`.

    Attributes:
        train_files, val_files: parquet files of pair records.
        media_root: folder that media paths are relative to.
        tcot: embed the T-CoTs of the records and the evidence they point at; False = the input alone.
        embedrl: see `DataSettings`; `family` and the limits are those of the model that wrote the T-CoTs.
    """

    train_files: tuple[str, ...]
    val_files: tuple[str, ...] = ()
    media_root: str | None = None
    tcot: bool = True

    def __post_init__(self) -> None:
        if not self.train_files:
            raise ConfigError("data.train_files must name at least one parquet file of pair records; got []")

    def missing_files(self) -> list[str]:
        """What is named and not there, each with its key."""
        named = [(name, file) for name in ("train_files", "val_files") for file in getattr(self, name)]
        missing = [
            f"data.{name}: no such file or data set folder: {file}"
            for name, file in named
            if not Path(file).expanduser().exists()
        ]
        if self.media_root and not Path(self.media_root).expanduser().is_dir():
            missing.append(f"data.media_root: no such folder: {self.media_root}")
        return missing


@dataclass(frozen=True)
class Stage1Config:
    """The whole configuration."""

    data: DataConfig
    media: DataSettings
    embedder: EmbedderConfig
    evidence: EvidenceConfig
    contrastive: ContrastiveConfig


def load_stage1_config(config: Any) -> Stage1Config:
    """Check a composed hydra configuration.

    Raises:
        ConfigError: the first key that is unknown or has a bad value.
    """
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict), type(plain)
    unknown = sorted(set(map(str, plain)) - {"data", "embedrl", "contrastive"})
    if unknown:
        raise ConfigError(f"unknown section {', '.join(unknown)}; known are data, embedrl and contrastive")
    data = dict(plain["data"])
    media = DataSettings.from_config({"embedrl": data.pop("embedrl", None)})
    if media.family == "auto":
        raise ConfigError(
            "data.embedrl.family must name the family of the model that wrote the T-CoTs ({', '.join(FAMILIES)}): it "
            "decides the units of their boxes; got auto"
        )
    for name in ("train_files", "val_files"):
        if isinstance(data.get(name), str):
            data[name] = [data[name]]
    sections = dict(plain["embedrl"])
    embedder = build_section(EmbedderConfig, sections.pop("embedder", {}), "embedrl.embedder")
    evidence = build_section(EvidenceConfig, sections.pop("evidence", {}), "embedrl.evidence")
    if sections:
        raise ConfigError(f"embedrl has no key {', '.join(sorted(sections))}; its keys are embedder, evidence")
    if embedder.strategy == "megatron":
        raise ConfigError("embedrl.embedder.strategy must be fsdp2 or fsdp in stage 1; got megatron")
    if not embedder.train.enable:
        raise ConfigError("embedrl.embedder.train.enable must be True in stage 1; got False")
    if embedder.train.ema_decay:
        raise ConfigError("embedrl.embedder.train.ema_decay is for co-training; it must be 0 in stage 1")
    return Stage1Config(
        data=build_section(DataConfig, data, "data"),
        media=media,
        embedder=embedder,
        evidence=evidence,
        contrastive=build_section(ContrastiveConfig, plain["contrastive"], "contrastive"),
    )
