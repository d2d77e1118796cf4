# SPDX-License-Identifier: Apache-2.0
"""What a run and its plan check alike before anything is started: the settings, the reward function, models that are
here. A mistake would otherwise show minutes after the start.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from embedrl_verl.config import EmbedRLConfig
from embedrl_verl.config.rules import check_family, check_files, check_run_config, has_judge
from embedrl_verl.config.schema import EmbedderConfig
from embedrl_verl.data.run_files import check_pair_files, fill_media_root
from embedrl_verl.embedder.profiles import fitting_profile, resolve_profile
from embedrl_verl.embedder.sentence import check_sentence_model, has_profile
from embedrl_verl.errors import ConfigError
from embedrl_verl.judge.judge import check_judge
from embedrl_verl.platforms.needs import check_needs
from embedrl_verl.progress import loggers
from embedrl_verl.rewards import RewardBatch
from embedrl_verl.rewards.load import load_reward_function
from embedrl_verl.rewards.score import call_reward_function, refuse_all_unknown
from embedrl_verl.tcot import parse_tcot

PROBE = '<thinking>{"text_keywords": ["probe"]}</thinking><rethink>ok</rethink><answer>probe</answer>'


def preflight(config: Any, *, starts: bool) -> EmbedRLConfig:
    """Check a composed configuration and return its section `embedrl`; a `data.media_root` that is not set becomes that
    of the data cards.

    Args:
        starts: a run follows: packages and files must be here, an Embedder of the hub is looked at. A plan may be made
            on another machine; files that are here are looked at for it too.
    """
    embedrl = check_run_config(config)
    fill_media_root(config)
    if starts:
        check_needs(config)
        check_files(config)
    check_pair_files(config)
    _check_with_verl(config)
    _check_model_folders(config)
    check_family(config, reasoner_type(config))
    check_reward_function(config, judge=has_judge(config), raw=embedrl.reward.raw_embeddings)
    if starts or Path(embedrl.embedder.path).expanduser().is_dir():
        check_embedder(embedrl.embedder)
    elif embedrl.embedder.profile != "auto":
        resolve_profile(embedrl.embedder.path, embedrl.embedder.profile)
    if has_judge(config):
        check_judge(embedrl.judge)
    return embedrl


def _check_model_folders(config: Any) -> None:
    """Refuse what is here and is no model; a plan may name others."""
    judge = ["reward.reward_model.model_path"] if config.reward.reward_model.enable else []
    for key in ("actor_rollout_ref.model.path", *judge):
        path = Path(str(OmegaConf.select(config, key))).expanduser()
        if path.exists() and not (path / "config.json").is_file():
            raise ConfigError(f"{key} must be a folder of a Hugging Face model; there is no config.json in {path}")


def reasoner_type(config: Any) -> str | None:
    """Model type of the Reasoner's local folder; None without one (a hub id says nothing here)."""
    file = Path(str(config.actor_rollout_ref.model.path)).expanduser() / "config.json"
    return json.loads(file.read_text()).get("model_type") if file.is_file() else None


def _check_with_verl(config: Any) -> None:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config
    from verl.utils.tracking import Tracking

    if unknown := sorted(set(loggers(config)) - set(Tracking.supported_backend)):
        known = ", ".join(sorted(Tracking.supported_backend))
        raise ConfigError(f"trainer.logger (LOGGER of the recipes) must name some of {known}; got {', '.join(unknown)}")
    try:
        validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
        OmegaConf.to_container(config, resolve=True)
    except (AssertionError, ValueError, HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"verl's validator refuses the configuration: {error}") from error


def check_reward_function(config: Any, *, judge: bool = False, raw: bool = False) -> None:
    """Load the reward function and call it on a made-up batch, which has a `judge` and `raw` vectors as the run has."""
    named = config.reward.custom_reward_function
    function, where = load_reward_function(f"{named.path}:{named.name}")
    parts = call_reward_function(
        partial(function, **(named.reward_kwargs or {})), probe_batch(judge=judge, raw=raw), where
    )
    refuse_all_unknown(parts["score"], where, "the rows of a made-up batch")


def probe_batch(*, judge: bool = False, raw: bool = False) -> RewardBatch:
    """2 pairs x 2 sides x 2 rollouts, well-formed. The judge is right in every other row, the first is unknown."""
    pair, side, rollout = torch.cartesian_prod(*[torch.arange(2)] * 3).T
    draws = torch.randn(2, len(pair), 8, generator=torch.Generator().manual_seed(0))
    vectors = torch.nn.functional.normalize(draws, dim=2)
    return RewardBatch.build(
        side=side,
        pair=pair,
        rollout=rollout,
        content=pair,
        tcots=[parse_tcot(PROBE)] * len(pair),
        required=["text_keywords"] * len(pair),
        embeddings=vectors[0],
        lengths=20 + rollout,
        raw_embeddings=vectors[1, 2 * pair + side] if raw else None,
        judge=_probe_judge if judge else None,
    )


async def _probe_judge(batch: RewardBatch) -> Tensor:
    picks = (torch.arange(len(batch)) % 2).float()
    picks[0] = torch.nan
    return picks


def check_embedder(config: EmbedderConfig) -> None:
    """Read the Embedder's configuration and tokenizer, not its weights."""
    if config.backend == "sentence_transformers":
        check_sentence_model(config.path)
        if not has_profile(config):
            return
    fitting_profile(config.path, config.profile)
