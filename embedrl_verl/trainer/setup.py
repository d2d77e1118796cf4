# SPDX-License-Identifier: Apache-2.0
"""What an EG-RL run starts beside verl's own processes: the Embedder, the judge, the pair sampler, the records.

`egrl` has the step. Both are mixins before one of verl's trainer classes, which call them by verl's own hooks.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader
from verl import DataProto
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
from verl.experimental.reward_loop.reward_manager.registry import register
from verl.single_controller.ray import RayResourcePool
from verl.trainer.ppo.reward import load_reward_manager
from verl.utils.dataset.rl_dataset import collate_fn

import embedrl_verl.config
from embedrl_verl.config import EmbedRLConfig, load_embedrl_config, rules
from embedrl_verl.config.compose import bound_served_lengths
from embedrl_verl.config.schema import MediaConfig
from embedrl_verl.data.dataset import TCoTDataset, media_root_of
from embedrl_verl.data.run_files import fill_media_root
from embedrl_verl.data.sampler import PairBatchSampler
from embedrl_verl.embedder.client import EmbedderClient
from embedrl_verl.embedder.processor import processor_for
from embedrl_verl.embedder.streaming import QueuedVectors, start_streamed_embedder
from embedrl_verl.embedder.worker import start_embedder_worker_group
from embedrl_verl.errors import ConfigError
from embedrl_verl.export.checkpoint import remove_half_written
from embedrl_verl.families import resolve_family
from embedrl_verl.judge.stage import JudgeStage
from embedrl_verl.platforms.trainer import WorkerClassesMixin
from embedrl_verl.progress import metrics_path, note_stage, prints_shown
from embedrl_verl.rewards import RewardBatch
from embedrl_verl.rewards.dump import note_pairs
from embedrl_verl.rewards.load import allow_helpers
from embedrl_verl.rewards.score import call_reward_function
from embedrl_verl.stage1.rows import PairRows, read_training_pairs
from embedrl_verl.trainer.checkpoint import check_run_record, run_record
from embedrl_verl.trainer.cotrain import EmbedderTraining, ProbeSet, refuse_trained_checkpoint

AGENT_LOOPS = Path(embedrl_verl.config.__file__).with_name("agent_loops.yaml")


@register("embedder_guided")
class EmbedderGuidedRewardManager(RewardManagerBase):  # type: ignore[misc]
    """verl's place for the user's reward function. verl asks a manager about one row at a time, but a retrieval reward
    exists only within a batch: the trainer calls `score_batch` once a step.
    """

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **_router: Any) -> None:
        mode = str(config.trainer.v1.trainer_mode)
        if not mode.startswith("egrl_"):
            raise ConfigError(
                "reward.reward_manager.name=embedder_guided rewards whole batches and needs an EG-RL trainer; "
                f"got trainer.v1.trainer_mode={mode}. Set trainer.v1.trainer_mode=egrl_sync"
            )
        super().__init__(config, tokenizer, compute_score)

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """Never called by EG-RL's trainers."""
        raise ConfigError("embedder_guided rewards whole batches, not single rows; use trainer.v1.trainer_mode=egrl_*")

    def score_batch(self, batch: RewardBatch) -> dict[str, Tensor]:
        """What the user's function gives for the batch, checked (see `rewards.score.call_reward_function`)."""
        named = self.config.reward.custom_reward_function
        with prints_shown(self.config):
            return call_reward_function(self.compute_score, batch, f"{named.path}:{named.name}")


class EGRLSetup(WorkerClassesMixin):
    """Starts a run. `parent_mode` is the mode name of the verl class that follows in the MRO."""

    parent_mode: str
    # Set by verl's trainer.
    config: Any
    tokenizer: Any
    processor: Any
    global_steps: int
    total_training_steps: int
    steps_per_epoch: int
    parameter_sync_step: int
    local_trigger_step: int
    resource_pool_manager: Any
    reward_loop_manager: Any
    train_dataset: Any
    val_dataset: Any
    train_dataloader: Any

    def __init__(self, config: Any) -> None:
        rules.check_run_config(config)
        bound_served_lengths(config)
        fill_media_root(config)
        allow_helpers(str(config.reward.custom_reward_function.path))
        self.embedrl: EmbedRLConfig = load_embedrl_config(config)
        mode = config.trainer.v1.trainer_mode
        # verl compares the mode with its own literals while it builds itself.
        config.trainer.v1.trainer_mode = self.parent_mode
        super().__init__(config=config)  # type: ignore[call-arg]  # verl's trainer follows in the MRO
        config.trainer.v1.trainer_mode = mode
        agent = config.actor_rollout_ref.rollout.agent
        if agent.agent_loop_config_path is None:
            agent.agent_loop_config_path = str(AGENT_LOOPS)
        # Ranks of the Embedder that still load their weights, while verl makes the agent loops; `fit` waits for them.
        self._embedder_loads: list[ray.ObjectRef] = []
        self.embedder: EmbedderClient | QueuedVectors
        self.embedder_training: EmbedderTraining | None = None
        self.judge: JudgeStage | None = None

    @property
    def prompts_a_batch(self) -> int:
        """What is rewarded at once: a step's prompts, or one of the mini-batches that verl may make of a step."""
        return int(self.config.data.train_batch_size) // self.parameter_sync_step

    @property
    def prompts_a_fetch(self) -> int:
        """Prompts that are taken from the data loader at once."""
        return self.prompts_a_batch

    def note_stage(self, what: str) -> None:
        """Let the process that started the run say what it waits for."""
        note_stage(metrics_path(self.config), what)

    def _setup(self) -> None:
        self.note_stage("reading the data")
        streamed = start_streamed_embedder(self.config, self.embedrl.embedder)
        super()._setup()  # type: ignore[misc]
        self.note_stage("loading the Embedder")
        if rules.has_judge(self.config):
            self.judge = self._start_judge()
        # Without handles of per-row reward workers verl asks the trainer for the rewards of a batch.
        self.reward_loop_manager = SimpleNamespace(reward_loop_worker_handles=None)
        manager = load_reward_manager(self.config, self.tokenizer)
        assert isinstance(manager, EmbedderGuidedRewardManager), type(manager)
        self.reward_manager = manager
        if streamed is None:
            where = self._start_embedder()
        else:
            self.embedder, where = streamed.ready([self.train_dataset, self.val_dataset]), streamed.where
        # Made once, whatever is edited later; it reads every weight of the Embedder, while its workers load it.
        self.run_record = run_record(self.config, self.embedrl)
        if self.global_steps > 0:
            self._resume_from(self._resumed_folder())
        trained = "co-trained" if self.embedder_training else "frozen"
        judge = "none" if self.judge is None else ", ".join(self.judge.urls)
        function = self.config.reward.custom_reward_function.path
        embedder = f"Embedder {self.embedrl.embedder.path} ({trained}) on {where}"
        print(f"EG-RL: {embedder}, reward function {function}, judge: {judge}", flush=True)

    def _start_embedder(self) -> str:
        """The Embedder's worker group; returns where it is."""
        train = self.embedrl.embedder.train
        updates = max(1, self.total_training_steps // train.every) * self.parameter_sync_step
        group, self._embedder_loads = start_embedder_worker_group(
            self.config, self.embedrl.embedder, self._embedder_pool(), total_steps=updates
        )
        self.embedder = client = EmbedderClient(group)
        if train.enable:
            self.embedder_training = EmbedderTraining(train, client, self._probe_set())
        return f"{group.world_size} device(s)"

    def _embedder_pool(self) -> Any:
        """The actor's devices, or a pool of the Embedder's own."""
        own = self.embedrl.embedder
        if not own.n_gpus_per_node:
            return self.resource_pool_manager.resource_pool_dict["global_pool"]
        wanted, free = own.nnodes * own.n_gpus_per_node, int(ray.available_resources().get("GPU", 0))
        if free < wanted:
            raise ConfigError(
                f"the Embedder asks for {wanted} devices of its own (embedrl.embedder.nnodes x n_gpus_per_node), but "
                f"beside the actor's (trainer.nnodes x trainer.n_gpus_per_node) the cluster has {free} left"
            )
        nodes = [own.n_gpus_per_node] * own.nnodes
        return RayResourcePool(process_on_nodes=nodes, max_colocate_count=1, name_prefix="embedder_pool")

    def _probe_set(self) -> ProbeSet:
        """The held-out pairs that watch over co-training."""
        train, media = self.embedrl.embedder.train, MediaConfig.from_config(self.config.data)
        files = list(train.anchor_files) or self.config.data.val_files
        rows = PairRows(
            read_training_pairs([files] if isinstance(files, str) else list(files), tcot=False),
            processor_for(self.embedrl.embedder, max_frames=media.max_frames),
            media=replace(media, family=resolve_family(media.family, self.processor)),
            evidence=self.embedrl.evidence,
            media_root=media_root_of(self.config.data),
            tcot=True,
            negatives=False,
        )
        return ProbeSet(rows, train.anchor_pairs)

    def _start_judge(self) -> JudgeStage:
        model = self.config.reward.reward_model
        return JudgeStage(
            self.embedrl.judge,
            self.reward_loop_manager.reward_model_manager,
            shares_devices=not model.enable_resource_pool,
            media_root=media_root_of(self.config.data),
            max_frames=MediaConfig.from_config(self.config.data).max_frames,
        )

    def _load_checkpoint(self) -> None:
        for folder in remove_half_written(Path(self.config.trainer.default_local_dir)):
            print(f"EG-RL: removed {folder}, which an earlier run was ended in the middle of", flush=True)
        super()._load_checkpoint()  # type: ignore[misc]

    def _resume_from(self, folder: str) -> None:
        rules.check_resumed_step(Path(folder), self.global_steps, self.total_training_steps)
        check_run_record(folder, self.run_record)
        if self.embedder_training is None:
            refuse_trained_checkpoint(folder)
        else:
            ray.get(self._embedder_loads)
            self.embedder_training.load(folder)

    def _resumed_folder(self) -> str:
        run = self.config.trainer
        named = run.resume_mode == "resume_path"
        return str(run.resume_from_path) if named else f"{run.default_local_dir}/global_step_{self.global_steps}"

    def get_reward_handles(self) -> None:
        """No per-row reward workers: the reward needs the whole batch."""
        return None

    def fit(self, agent_loop_manager: Any) -> None:
        """verl's training loop, when the Embedder holds its weights."""
        if folder := self.config.trainer.get("rollout_data_dir"):
            data, media = self.config.data, MediaConfig.from_config(self.config.data)
            note_pairs(
                Path(folder),
                {
                    "train_files": rules.files_of(self.config, "data.train_files"),
                    "val_files": rules.files_of(self.config, "data.val_files"),
                    "media_root": media_root_of(data),
                    "embedrl": asdict(media) | {"family": self.train_dataset.family},
                },
            )
        ray.get(self._embedder_loads)
        super().fit(agent_loop_manager)  # type: ignore[misc]

    def _init_dataloader(self) -> None:
        """verl's data loader with batches of complete pairs of one data source."""
        super()._init_dataloader()  # type: ignore[misc]
        if not isinstance(self.train_dataset, TCoTDataset):
            raise TypeError(f"data.custom_cls must be TCoTDataset or a subclass; got {type(self.train_dataset)}")
        for dataset in (self.train_dataset, self.val_dataset):
            rules.refuse_videos_that_megatron_misplaces(self.config, dataset)
        sampler = PairBatchSampler(
            self.train_dataset,
            batch_size=self.prompts_a_batch,
            seed=self.config.data.get("seed") or 0,
            pairs_together=MediaConfig.from_config(self.config.data).pairs_together,
            shuffle=bool(self.config.data.shuffle),
        )
        self.train_dataloader = StatefulDataLoader(
            dataset=self.train_dataset,
            batch_size=self.prompts_a_fetch,
            num_workers=self.config.data["dataloader_num_workers"],
            drop_last=True,
            collate_fn=collate_fn,
            sampler=sampler,
        )
        # Blocks hold one data source each, so an epoch can be shorter than rows // batch_size.
        self.steps_per_epoch = len(sampler) // self.config.data.train_batch_size
        self.total_training_steps = rules.last_step(self.config.trainer, self.steps_per_epoch)
        if self.config.trainer.total_training_steps is None:
            updates = self.total_training_steps * self.parameter_sync_step
            self.config.actor_rollout_ref.actor.optim.total_training_steps = updates
        self.note_stage("loading the Reasoner and starting vLLM")
