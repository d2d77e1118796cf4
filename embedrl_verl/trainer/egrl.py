# SPDX-License-Identifier: Apache-2.0
"""Trainer mode `egrl_sync`: verl's synchronous trainer with EG-RL's stages.

What differs from `sync`:

1. batches hold complete pairs of one data source (own sampler in verl's dataloader);
2. an Embedder worker group lives beside the actor's, on the same devices or its own;
3. the reward stage scores the whole batch at once (training and validation);
4. validation adds Hit@1 and NDCG over the whole set;
5. the Embedder can be co-trained on the batch, right after the rewards (`embedrl.embedder.train`);
6. checkpoints say what gave the rewards (Embedder, evidence, prompts, reward function) and hold a trained Embedder;
   resuming with anything else is refused.

Everything else (rollout, log-probs, GRPO, the update) is verl's.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader
from transfer_queue import KVBatchMeta
from verl.single_controller.ray import RayResourcePool
from verl.trainer.ppo.reward import load_reward_manager
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer
from verl.utils.dataset.rl_dataset import collate_fn

import embedrl_verl.config
from embedrl_verl.config import EmbedRLConfig, load_embedrl_config
from embedrl_verl.config.served_length import bound_served_lengths
from embedrl_verl.data.dataset import TCoTDataset, media_root_of
from embedrl_verl.data.disk import TRACKER
from embedrl_verl.data.sampler import PairBatchSampler
from embedrl_verl.data.settings import DataSettings, resolve_family
from embedrl_verl.embedder.client import EmbedderClient
from embedrl_verl.embedder.launch import start_streamed_embedder
from embedrl_verl.embedder.settings import processor_for
from embedrl_verl.embedder.streaming import QueuedVectors
from embedrl_verl.embedder.worker import start_embedder_worker_group
from embedrl_verl.errors import ConfigError
from embedrl_verl.evaluation.validation import RetrievalValidation, ValidationRow, card_scores, left_out_metrics, roster
from embedrl_verl.platforms import plugin
from embedrl_verl.platforms.trainer import WorkerClassesMixin
from embedrl_verl.rewards import RewardBatch
from embedrl_verl.rewards.dump import dump_name
from embedrl_verl.stage1.rows import PairRows, read_training_pairs
from embedrl_verl.trainer import checks
from embedrl_verl.trainer.anchors import AnchorSet
from embedrl_verl.trainer.batch_reward import (
    ScoredRows,
    check_scores,
    clear_embed_rows,
    read_rows,
    score_rows,
    write_scores,
)
from embedrl_verl.trainer.best import keep_if_best
from embedrl_verl.trainer.checkpoint import check_run_record, run_record, write_run_record
from embedrl_verl.trainer.cotrain import EmbedderTraining, refuse_trained_checkpoint
from embedrl_verl.trainer.judging import JudgeStage
from embedrl_verl.trainer.retention import prune_checkpoints
from embedrl_verl.trainer.reward_manager import EmbedderGuidedRewardManager
from embedrl_verl.trainer.same_policy import PolicyWatch
from embedrl_verl.trainer.training_record import (
    sources_of,
    write_embedder_record_for_export,
    write_reasoner_record,
)

logger = logging.getLogger(__name__)

AGENT_LOOPS = Path(embedrl_verl.config.__file__).with_name("agent_loops.yaml")


class _BatchRewardOnly:
    """verl's reward loop manager without its per-row workers: verl then calls the trainer's reward stage."""

    reward_loop_worker_handles = None

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class EGRLMixin(WorkerClassesMixin):
    """The stages of EG-RL, put before one of verl's trainer classes. `parent_mode` is that class's own mode name."""

    parent_mode: str
    embedrl: EmbedRLConfig
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
        checks.check_run_config(config)
        bound_served_lengths(config)
        self.embedrl = load_embedrl_config(config)
        mode = config.trainer.v1.trainer_mode
        # verl compares the mode with its own literals while it builds itself.
        config.trainer.v1.trainer_mode = self.parent_mode
        super().__init__(config=config)  # type: ignore[call-arg]  # verl's trainer follows in the MRO
        config.trainer.v1.trainer_mode = mode
        agent = config.actor_rollout_ref.rollout.agent
        if agent.agent_loop_config_path is None:
            agent.agent_loop_config_path = str(AGENT_LOOPS)
        self._validation = RetrievalValidation(self.embedrl.validation.ndcg_k)
        least = self.embedrl.rollout.min_probs_correlation
        self._policy_watch = PolicyWatch(least, synchronous=self.parent_mode == "sync")
        self._dump_parts: dict[str, dict[str, Any]] = {}
        self._last_scores: dict[str, float] = {}

    # ------------------------------------------------------------------ set-up

    def _setup(self) -> None:
        streamed = start_streamed_embedder(self.config, self.embedrl.embedder)
        super()._setup()  # type: ignore[misc]
        self.judge = self._judge_stage() if checks.has_judge(self.config) else None
        self.reward_loop_manager = _BatchRewardOnly(self.reward_loop_manager)
        manager = load_reward_manager(self.config, self.tokenizer)
        assert isinstance(manager, EmbedderGuidedRewardManager), type(manager)
        self.reward_manager = manager
        train = self.embedrl.embedder.train
        self.embedder: EmbedderClient | QueuedVectors
        self.embedder_training = None
        # It loads while the agent loops start, which verl makes after this method; `fit` waits for it.
        self._embedder_loads: list[ray.ObjectRef] = []
        if streamed is None:
            group, self._embedder_loads = start_embedder_worker_group(
                self.config,
                self.embedrl.embedder,
                self._embedder_pool(),
                total_steps=max(1, self.total_training_steps // train.every) * self.parameter_sync_step,
            )
            self.embedder = client = EmbedderClient(group)
            self.embedder_training = EmbedderTraining(train, client, self._anchors()) if train.enable else None
            where = f"{group.world_size} device(s)"
        else:
            self.embedder, where = streamed.ready([self.train_dataset, self.val_dataset]), streamed.where
        # Made once, whatever is edited later; it reads every weight of the Embedder, while its workers load it.
        self._run_record = run_record(self.config, self.embedrl)
        if self.global_steps > 0:
            folder = self._step_folder(self.global_steps)
            checks.check_resumed_step(Path(folder), self.global_steps, self.total_training_steps)
            check_run_record(folder, self._run_record)
            if self.embedder_training is not None:
                ray.get(self._embedder_loads)
                self.embedder_training.load(folder)
            else:
                refuse_trained_checkpoint(folder)
        logger.warning(
            "EG-RL: Embedder %s (%s) on %s, reward function %s, judge: %s",
            self.embedrl.embedder.path,
            "co-trained" if train.enable else "frozen",
            where,
            self.config.reward.custom_reward_function.path,
            "none" if self.judge is None else ", ".join(self.judge.urls),
        )

    def fit(self, agent_loop_manager: Any) -> None:
        """verl's training loop, when the Embedder holds its weights."""
        ray.get(self._embedder_loads)
        super().fit(agent_loop_manager)  # type: ignore[misc]

    def _judge_stage(self) -> JudgeStage:
        model = self.config.reward.reward_model
        return JudgeStage(
            self.embedrl.judge,
            self.reward_loop_manager.reward_model_manager,
            shares_devices=not model.enable_resource_pool,
            media_root=media_root_of(self.config.data),
            max_frames=DataSettings.from_config(self.config.data).max_frames,
        )

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
        return RayResourcePool(
            process_on_nodes=[own.n_gpus_per_node] * own.nnodes, max_colocate_count=1, name_prefix="embedder_pool"
        )

    def _anchors(self) -> AnchorSet:
        """The pairs that watch over co-training."""
        train, media = self.embedrl.embedder.train, DataSettings.from_config(self.config.data)
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
        return AnchorSet(rows, train.anchor_pairs)

    def get_reward_handles(self) -> None:
        """No per-row reward workers: the reward needs the whole batch."""
        return None

    @property
    def _prompts_a_batch(self) -> int:
        """What is rewarded at once: a step's prompts, or one of the mini-batches that verl may make of a step."""
        return int(self.config.data.train_batch_size) // self.parameter_sync_step

    @property
    def prompts_a_fetch(self) -> int:
        """Prompts that are taken from the data loader at once."""
        return self._prompts_a_batch

    def _init_dataloader(self) -> None:
        super()._init_dataloader()  # type: ignore[misc]
        if not isinstance(self.train_dataset, TCoTDataset):
            raise TypeError(f"data.custom_cls must be TCoTDataset or a subclass; got {type(self.train_dataset)}")
        for dataset in (self.train_dataset, self.val_dataset):
            checks.refuse_videos_that_megatron_misplaces(self.config, dataset)
        batch_size = self.config.data.train_batch_size
        sampler = PairBatchSampler(
            self.train_dataset,
            batch_size=self._prompts_a_batch,
            seed=self.config.data.get("seed") or 0,
            pairs_together=DataSettings.from_config(self.config.data).pairs_together,
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
        self.steps_per_epoch = len(sampler) // batch_size
        run = self.config.trainer
        self.total_training_steps = checks.last_step(run, self.steps_per_epoch)
        if run.total_training_steps is None:
            updates = self.total_training_steps * self.parameter_sync_step
            self.config.actor_rollout_ref.actor.optim.total_training_steps = updates

    # ------------------------------------------------------------------ the reward stage

    def _compute_reward_colocate(self, batch: KVBatchMeta, metrics: dict[str, float] | None = None) -> KVBatchMeta:
        start = time.perf_counter()
        training = batch.partition_id == "train"
        rows = read_rows(batch.keys, batch.partition_id)
        expected = len(rows)
        if training:
            expected = self._prompts_a_batch * self.config.actor_rollout_ref.rollout.n
        averaged = self.embedder_training is not None and self.embedder_training.averaged
        scored = score_rows(
            rows,
            partial(self.embedder.embed_rows, averaged=averaged),
            self._score_batch,
            max_failed_share=self.embedrl.reward.max_failed_share,
            expected_rows=expected,
            judge=None if self.judge is None else self.judge.of(rows, batch.partition_id, self.global_steps),
            raw=self.embedrl.reward.raw_embeddings,
        )
        if self.judge is not None and self.judge.judgement is not None:
            scored.metrics.update(self.judge.judgement.metrics())
            self.judge.judgement = None
        function = self.config.reward.custom_reward_function
        if training:
            check_scores(scored, f"{function.path}:{function.name}")
        rollouts = int(self.config.actor_rollout_ref.rollout.n)
        write_scores(scored, batch.partition_id, training=training, groups=rollouts > 1)
        if metrics is not None:
            metrics.update(scored.metrics)
            metrics["timing_s/reward_stage"] = time.perf_counter() - start
            metrics["embedrl/total_steps"] = float(self.total_training_steps)
            by_source = self.parent_mode != "separate_async"
            metrics.update(left_out_metrics(self.train_dataset, self.val_dataset, by_source=by_source))
        if training and self.embedder_training is not None:
            trained = self._train_embedder(self.embedder_training, scored)
            if metrics is not None:
                metrics.update(trained)
        clear_embed_rows({row.uid for row in rows})
        self._remember(scored, training)
        if training and self.config.trainer.get("rollout_data_dir"):
            part = self.local_trigger_step if self.parameter_sync_step > 1 else None
            path = Path(self.config.trainer.rollout_data_dir) / dump_name(self.global_steps, part)
            scored.write_dump(path, function)
        # Sorted rows: the same rollouts give the same mini-batches, whatever the order of arrival.
        position = {key: i for i, key in enumerate(batch.keys)}
        batch.reorder([position[row.key] for row in rows])
        return batch

    def _score_batch(self, batch: RewardBatch) -> dict[str, Tensor]:
        if self.judge is None:
            return self.reward_manager.score_batch(batch)
        with self.judge.awake():
            return self.reward_manager.score_batch(batch)

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, float]) -> KVBatchMeta:
        batch = super()._compute_old_log_prob(batch, metrics=metrics)  # type: ignore[misc]
        self._policy_watch.check(metrics, self.global_steps)
        return batch

    def _train_embedder(self, training: EmbedderTraining, scored: ScoredRows) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if training.is_due(self.global_steps):
            start = time.perf_counter()
            metrics = training.step(scored, self.global_steps)
            metrics["timing_s/embedder_train"] = time.perf_counter() - start
        metrics["embedder/active"] = float(training.state.stopped_at is None)
        return metrics

    def _remember(self, scored: ScoredRows, training: bool) -> None:
        if training and self.local_trigger_step == 0:
            self._dump_parts = {}
        if self.config.trainer.get("rollout_data_dir") or self.config.trainer.get("validation_data_dir"):
            self._dump_parts.update({row.key: scored.describe(i) for i, row in enumerate(scored.rows)})
        if not training:
            self._validation.add(
                [
                    ValidationRow(
                        row.source,
                        row.side,
                        row.session,
                        row.content,
                        None if i in scored.failures else scored.embeddings[i],
                        row.pair_id,
                    )
                    for i, row in enumerate(scored.rows)
                ]
            )

    # ------------------------------------------------------------------ validation, dumps, checkpoints

    def _validate(self) -> dict[str, float]:
        metrics = dict(super()._validate())  # type: ignore[misc]
        expected = roster(self.val_dataset, int(self.config.actor_rollout_ref.rollout.val_kwargs.n))
        retrieval = self._validation.metrics(expected)
        failed = sum(value for name, value in retrieval.items() if name.endswith("/failed_rows"))
        if failed:
            logger.warning(
                "EG-RL: %d of %d rows of the validation have no vector (their rollout or their embedding has failed); "
                "they count as not retrieved (val-aux/<source>/failed_rows)",
                failed,
                len(expected),
            )
        self._last_scores = card_scores(retrieval)
        metrics.update(retrieval)
        metrics.update(left_out_metrics(self.train_dataset, self.val_dataset, by_source=True))
        if self.embedrl.validation.keep_best and "val-core/all/hit@1" in retrieval:
            folder = self.config.trainer.default_local_dir
            if keep_if_best(folder, self.global_steps, retrieval["val-core/all/hit@1"]):
                logger.warning(
                    "EG-RL: step %d has the best validation so far, kept in %s/best", self.global_steps, folder
                )
        return metrics

    def _val_metrics_update(
        self,
        data_sources: Any,
        sample_uids: Any,
        reward_extra_infos_dict: dict[str, list[Any]],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, float]:
        """verl's means over the rows that have a reward: an unknown one is no reward of 0."""
        rewards = reward_extra_infos_dict["reward"]
        known = reward_extra_infos_dict.get("score", [None] * len(rewards))  # absent where no row has one
        reward_extra_infos_dict["reward"] = [
            None if score is None else reward for reward, score in zip(rewards, known, strict=True)
        ]
        metrics: dict[str, float] = super()._val_metrics_update(  # type: ignore[misc]
            data_sources, sample_uids, reward_extra_infos_dict, *args, **kwargs
        )
        return metrics

    def _dump_generations(
        self, inputs: Any, outputs: Any, gts: Any, scores: Any, reward_extra_infos_dict: Any, dump_path: Any
    ) -> None:
        """verl's dump with the T-CoT's parts beside each text; rows that verl added as padding are left out."""
        keys = reward_extra_infos_dict["uid"]
        kept = [i for i, key in enumerate(keys) if key in self._dump_parts]
        extra = {name: [values[i] for i in kept] for name, values in reward_extra_infos_dict.items()}
        parts = [self._dump_parts[keys[i]] for i in kept]
        if parts:
            extra.update({name: [part[name] for part in parts] for name in parts[0]})
            # An unknown reward is null in the dump, not the stand-in that keeps the group's advantages unmoved.
            scores = {i: part["reward"]["score"] for i, part in zip(kept, parts, strict=True)}
        super()._dump_generations(  # type: ignore[misc]
            inputs=[inputs[i] for i in kept],
            outputs=[outputs[i] for i in kept],
            gts=[gts[i] for i in kept],
            scores=[scores[i] for i in kept],
            reward_extra_infos_dict=extra,
            dump_path=dump_path,
        )

    def _step_folder(self, step: int) -> str:
        if self.config.trainer.resume_mode == "resume_path":
            return str(self.config.trainer.resume_from_path)
        return f"{self.config.trainer.default_local_dir}/global_step_{step}"

    def _save_checkpoint(self) -> None:
        folder = f"{self.config.trainer.default_local_dir}/global_step_{self.global_steps}"
        # Before verl's part, whose tracker file comes last: a checkpoint that the tracker names is complete.
        write_run_record(folder, self._run_record)
        data = sources_of(self.train_dataset.pair_sources)
        write_reasoner_record(folder, self.global_steps, self.config, self.embedrl, data, self._last_scores)
        training = self.embedder_training
        if training is not None:
            training.save(folder, self.global_steps, self.config.trainer.get("max_actor_ckpt_to_keep"))
            # With an average, Hit@1 of the anchors is the average's; the checkpoint's weights are the trained ones.
            known = training.last_hit1 is not None and not training.averaged
            scores = {"hit@1 (anchors)": training.last_hit1} if known else {}
            write_embedder_record_for_export(f"{folder}/embedder", self.global_steps, self.embedrl, data, scores)
        super()._save_checkpoint()  # type: ignore[misc]
        root = Path(self.config.trainer.default_local_dir)
        tracker = root / TRACKER
        if tracker.is_file():
            keep = self.config.trainer.get("max_actor_ckpt_to_keep")
            prune_checkpoints(root, int(tracker.read_text()), None if keep is None else int(keep))


@register_trainer("egrl_sync")
class EGRLTrainerSync(EGRLMixin, PPOTrainerSync):  # type: ignore[misc]
    """EG-RL, synchronous: rollout, reward and update of one batch follow one another on the same devices."""

    parent_mode = "sync"


plugin.add_trainers(__name__)
