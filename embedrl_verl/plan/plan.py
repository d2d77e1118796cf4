# SPDX-License-Identifier: Apache-2.0
"""The plan of a run: what would be started, with which numbers, without starting anything.

    DRY_RUN=1 bash recipes/run_egrl_qwen2vl.sh            # a recipe's plan
    python -m embedrl_verl.plan [--config-name NAME] [hydra overrides]

The configuration is composed as a run composes it, checked by verl's own validator and by this package, and the batch
arithmetic is written out. Devices are only counted in the configuration, so a plan for 4 nodes of 8 GPUs can be made on
a laptop. Files that are not there are marked, not refused: a plan may be made on another machine than the run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedrl_verl.config import EmbedRLConfig, load_embedrl_config
from embedrl_verl.data.settings import DataSettings
from embedrl_verl.errors import ConfigError
from embedrl_verl.families import FACTS
from embedrl_verl.plan.batch import BatchPlan
from embedrl_verl.plan.lines import (
    batch_lines,
    device_lines,
    file_lines,
    is_megatron,
    needs_lines,
    training_lines,
)
from embedrl_verl.plan.memory import memory_lines
from embedrl_verl.trainer.checks_async import replica_size

MEGATRON_TYPES = tuple(kind for facts in FACTS.values() for kind in facts.megatron)


@dataclass(frozen=True)
class Plan:
    """A checked run as lines of (topic, text)."""

    batch: BatchPlan
    lines: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        width = max(len(topic) for topic, _ in self.lines) + 2
        head = "EG-RL plan (checked by verl's validator; nothing is started)"
        return "\n".join([head, *(f"  {topic.ljust(width)}{text}" for topic, text in self.lines)])


def make_plan(config: Any) -> Plan:
    """Check a composed configuration and write out what it would do.

    Raises:
        ConfigError: verl's validator or a check of this package refuses it.
    """
    from embedrl_verl.trainer.checks import check_run_config

    batch = _batch_plan(config)
    check_run_config(config)
    _check_with_verl(config)
    section = load_embedrl_config(config)
    family = _model_type(config)
    if is_megatron(config) and family not in (*MEGATRON_TYPES, None):
        raise ConfigError(
            f"verl 0.9.1's Megatron engine cannot load {family}: its weight converter has "
            f"{', '.join(MEGATRON_TYPES)}. Use the FSDP recipe of that family"
        )
    _check_what_is_here(config, section)
    lines = (
        *device_lines(config, batch, section),
        *batch_lines(config, batch),
        *training_lines(config),
        *memory_lines(config, batch, section),
        *file_lines(config, batch, section, family),
        *needs_lines(config),
    )
    return Plan(batch=batch, lines=lines)


def print_plan(config: Any) -> None:
    """Print the plan of a composed configuration to standard output. Raises ConfigError as `make_plan` does."""
    print(make_plan(config))


def _batch_plan(config: Any) -> BatchPlan:
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    if is_megatron(config):
        mesh = actor.megatron
        model_parallel = (
            mesh.tensor_model_parallel_size * mesh.pipeline_model_parallel_size * mesh.context_parallel_size
        )
    else:
        model_parallel = actor.get("ulysses_sequence_parallel_size", 1)
    return BatchPlan(
        prompts=int(config.data.train_batch_size),
        rollouts=int(rollout.n),
        mini_prompts=int(actor.ppo_mini_batch_size),
        devices=int(config.trainer.nnodes) * int(config.trainer.n_gpus_per_node),
        model_parallel=int(model_parallel),
        # Without servers on the training devices nothing has to fit there; checks_async looks at the rollout's own.
        rollout_parallel=replica_size(rollout) if config.actor_rollout_ref.hybrid_engine else 1,
    )


def _check_with_verl(config: Any) -> None:
    """verl's validator."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    try:
        validate_config(
            config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config)
        )
        OmegaConf.to_container(config, resolve=True)
    except (AssertionError, ValueError, HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"verl's validator refuses the configuration: {error}") from error


def _check_what_is_here(config: Any, section: EmbedRLConfig) -> None:
    """What the run would refuse of the reward function, and of models that lie in local folders."""
    from embedrl_verl.trainer.checks import has_judge
    from embedrl_verl.trainer.preflight import check_embedder, check_reward_function

    check_reward_function(config, judge=has_judge(config), raw=section.reward.raw_embeddings)
    if Path(str(section.embedder.path)).expanduser().is_dir():
        check_embedder(section.embedder)
    named, found = DataSettings.from_config(config.data).family, _folders_type(config)
    if named != "auto" and found is not None and found.removesuffix("_moe") != named:
        raise ConfigError(
            f"data.embedrl.family is {named}, but {config.actor_rollout_ref.model.path} is a {found}. Use the recipe "
            "of that family"
        )


def _folders_type(config: Any) -> str | None:
    """Model type of the Reasoner's local folder; None without one."""
    file = Path(str(config.actor_rollout_ref.model.path)).expanduser() / "config.json"
    return str(json.loads(file.read_text())["model_type"]) if file.is_file() else None


def _model_type(config: Any) -> str | None:
    """The Reasoner's family: as configured, else as its local folder says, else None (a hub id says nothing here)."""
    named = DataSettings.from_config(config.data).family
    return named if named != "auto" else _folders_type(config)
