# SPDX-License-Identifier: Apache-2.0
"""Loads a Reasoner and an Embedder with the settings of a run, which hydra overrides give in its words.

What no override names is taken from the Reasoner's own `training.json` (checkpoints and exports have one), so that it
is asked as it was trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from embedrl_verl.config import EmbedRLConfig, load_embedrl_config
from embedrl_verl.config.compose import compose
from embedrl_verl.config.rules import no_such_model
from embedrl_verl.config.schema import EvidenceConfig, MediaConfig
from embedrl_verl.data.media import MediaLimits
from embedrl_verl.embedder import Embedder
from embedrl_verl.embedder.loading import family_of_config, load_config, load_generation_model
from embedrl_verl.embedder.processor import DTYPES, processor_for
from embedrl_verl.errors import ConfigError, EmbedderError
from embedrl_verl.export.record import OF_EMBEDDER, TrainingRecord, prompt_settings, read_record
from embedrl_verl.families import token_side
from embedrl_verl.model.embedders import Embeds, LocalEmbedder, SentenceEmbedder, ServerEmbedder
from embedrl_verl.model.reasoner import Reasoner
from embedrl_verl.model.remote import BackendReasoner, engine_reasoner, server_reasoner

Engine = Literal["transformers", "vllm"]
ASKED = ("data.embedrl.", "data.max_response_length", "embedrl.evidence.")
"""Settings that a Reasoner's record stands for where no override gives them."""


@dataclass(frozen=True)
class Settings:
    """`embedrl`: the section; `data`: the section as plain values; `given`: names of `data.embedrl` and
    `embedrl.evidence` (and `max_response_length`) that an override gives; `device` to compute on."""

    embedrl: EmbedRLConfig
    data: Mapping[str, Any]
    given: frozenset[str]
    device: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.embedrl.embedder.dtype]

    def asked(self, path: str) -> tuple[MediaConfig, int]:
        """How the Reasoner of a folder is asked, and its longest answer in tokens: by overrides, else as its record
        says, else by the defaults."""
        known = prompt_settings(_record_of(path).settings, "auto")
        whole = {**self.data["embedrl"], "max_response_length": self.data["max_response_length"]}
        chosen = {name: whole[name] if name in self.given else value for name, value in known.items()}
        length = chosen.pop("max_response_length")
        return MediaConfig.from_config({"embedrl": chosen}), length

    def evidence(self, reasoner: str | None) -> EvidenceConfig:
        """What may be cut for the T-CoTs of a Reasoner's folder: by overrides, else as its record says, else by the
        defaults."""
        recorded = (_record_of(reasoner).settings.get("evidence") if reasoner else None) or {}
        if not isinstance(recorded, Mapping):
            raise ConfigError(f"training.json of {reasoner}: evidence must be an object; got {recorded!r:.200}")
        return replace(self.embedrl.evidence, **{key: one for key, one in recorded.items() if key not in self.given})

    def max_frames(self, reasoners: Sequence[str]) -> int:
        """Frames that are drawn from a clip, for these Reasoners (folders or hub ids) and the Embedder alike."""
        asked = {self.asked(path)[0].max_frames for path in reasoners} or {int(self.data["embedrl"]["max_frames"])}
        if len(asked) > 1:
            raise ConfigError(
                f"the Reasoners were trained with {' and '.join(map(str, sorted(asked)))} frames of a clip, and all "
                "are compared on the same; say how many: data.embedrl.max_frames=8"
            )
        return asked.pop()


def read_settings(embedder: str, overrides: Sequence[str] = (), device: str = "auto") -> Settings:
    """Settings from hydra overrides as for a run; what they do not name of `OF_EMBEDDER` is as the Embedder's record
    says. `device`: auto is a GPU if there is one."""
    from omegaconf import OmegaConf

    if fault := no_such_model(embedder):
        raise EmbedderError(f"the Embedder cannot be loaded: {fault}")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    on_cpu = device == "cpu" and not any(one.startswith("platform=") for one in overrides)
    recorded = _record_of(embedder).settings
    trained = [f"embedrl.embedder.{name}={recorded[name]}" for name in OF_EMBEDDER if name in recorded]
    path = f"embedrl.embedder.path={json.dumps(embedder)}"
    config = compose([*(["platform=cpu"] if on_cpu else []), *trained, *overrides, path])
    data = OmegaConf.to_container(config.data, resolve=True)
    assert isinstance(data, dict)
    given = {key.rpartition(".")[2] for key in _keys(overrides) if key.startswith(ASKED)}
    plain = {str(key): value for key, value in data.items()}
    return Settings(load_embedrl_config(config), plain, frozenset(given), device)


def _keys(overrides: Sequence[str]) -> Iterator[str]:
    """What overrides give, to the last name: also "embedrl.evidence={max_items: 0}"."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for one in OverridesParser.create().parse_overrides(list(overrides)):
        key, value = one.key_or_group, one.value()
        yield from (f"{key}.{name}" for name in value) if isinstance(value, dict) else (key,)


def load_embedder(settings: Settings, max_frames: int) -> Embeds:
    """The Embedder that the section names, by the backend that it names, prompted and limited as in a run with it."""
    config = settings.embedrl.embedder
    if config.backend == "sentence_transformers":
        return SentenceEmbedder(config, max_frames, settings.device)
    processor = processor_for(config, max_frames=max_frames)
    if config.backend == "server":
        if not config.server.urls:
            raise ConfigError("embedrl.embedder.server.urls must name servers (embedrl serve-embedder starts one)")
        return ServerEmbedder(config, processor)
    model = load_generation_model(config.path, dtype=settings.dtype)
    return LocalEmbedder(Embedder(model.to(settings.device).eval(), processor))


def _record_of(path: str) -> TrainingRecord:
    """What a model's folder says of its training; nothing of a hub id."""
    return (read_record(Path(path)) if Path(path).is_dir() else None) or TrainingRecord()


def check_reasoner(path: str) -> None:
    """Refuse what is no folder or hub id of a model, without its weights."""
    if fault := no_such_model(path):
        raise ConfigError(f"the Reasoner: {fault}")
    try:
        load_config(path)
    except EmbedderError as error:
        raise ConfigError(f"{path} must be a Reasoner's folder or hub id; {error.__cause__ or error}") from error


def folder_of(reasoner: str, prompts_like: str | None) -> str:
    """Folder or hub id of what is asked; of a server `prompts_like`."""
    folder = prompts_like if _is_url(reasoner) else reasoner
    if folder is None:
        raise ConfigError(
            f"{reasoner} is a server: name the folder or hub id of the model that it serves too "
            "(prompts_like=), which says how it is asked; `embedrl eval` takes folders and hub ids"
        )
    return folder


def _is_url(reasoner: str) -> bool:
    return reasoner.startswith(("http://", "https://"))


def load_reasoner(
    name: str, settings: Settings, *, engine: Engine = "transformers", prompts_like: str | None = None
) -> Reasoner | BackendReasoner:
    """A Reasoner by its name.

    Args:
        name: folder or hub id; or the URL of an OpenAI-style server, several separated by commas.
        engine: what runs a folder: transformers, or vLLM in this process.
        prompts_like: of a server: the folder of the model that it serves, for its family and how it is asked.
    """
    folder, is_url = folder_of(name, prompts_like), _is_url(name)
    media, length = settings.asked(folder)
    if not is_url and engine == "transformers":
        return Reasoner(folder, media, max_new_tokens=length, dtype=settings.dtype, device=settings.device)
    family = family_of_config(load_config(folder))
    limits = MediaLimits.of(media, token_side(family), media.max_frames)
    if is_url:
        return server_reasoner(name.split(","), family, media, limits, length)
    return engine_reasoner(folder, family, media, limits, length)
