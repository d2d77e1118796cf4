# SPDX-License-Identifier: Apache-2.0
"""Trainer mode `egrl_sync`: verl's synchronous trainer with EG-RL's stages. A step, in order:

    1. sample    P pairs of one data source: 2 P prompts, a query and a target each     setup.py, data/sampler.py
    2. roll out  G T-CoTs of each prompt; parse, cut evidence, prepare the Embedder     agent_loop.py
    3. embed     2 P G rows, when all are there                                         here
    4. compare   the similarity of every query row with every target row                here
    5. reward    format, process (judge) and outcome of each row, by the user's file    here
    6. write     rewards into the queue, unknown rows out of training                   here
    7. co-train  the Embedder on the batch, if it is due                                here
    8. update    log-probs, advantages (GRPO), the actor                                verl
    9. log, validate, checkpoint                                                        here

Everything that is not said to be here is verl's own.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer

from embedrl_verl.errors import EmbedRLError
from embedrl_verl.evaluation.validation import RetrievalValidation, ValidationRow, card_scores, left_out_metrics, roster
from embedrl_verl.export.checkpoint import make_way, writing
from embedrl_verl.platforms import plugin
from embedrl_verl.rewards.dump import dump_name
from embedrl_verl.trainer.case_images import CaseImages
from embedrl_verl.trainer.checkpoint import keep_if_best, prune_to, record_scores, write_records
from embedrl_verl.trainer.reward_stage import (
    ScoredRows,
    check_scores,
    clear_embed_rows,
    embed_rows,
    read_rows,
    refuse_failures,
    reward_batch,
    write_scores,
    write_validation_scores,
)
from embedrl_verl.trainer.setup import EGRLSetup

logger = logging.getLogger(__name__)

CORRELATION = "training/rollout_actor_probs_pearson_corr"
"""verl's metric: of the rollout's and the actor's probabilities of the tokens of a batch."""
WARN_BELOW = 0.99


class EGRLMixin(EGRLSetup):
    """The stages of EG-RL, put before one of verl's trainer classes."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._validation = RetrievalValidation(self.embedrl.validation.ndcg_k)
        self._watch = PolicyWatch(self.embedrl.rollout.min_probs_correlation, synchronous=self.parent_mode == "sync")
        self._cases: CaseImages | None = None
        self._dump_parts: dict[str, dict[str, Any]] = {}

    def on_step_begin(self) -> None:
        """verl's hook."""
        super().on_step_begin()  # type: ignore[misc]
        self.note_stage(f"step {self.global_steps}: rollouts")

    # ------------------------------------------------------------------ 3 to 7: the reward stage

    def _compute_reward_colocate(self, batch: KVBatchMeta, metrics: dict[str, float] | None = None) -> KVBatchMeta:
        """Stages 3 to 7 on a batch of finished rollouts, of training or of validation (which has no `metrics`)."""
        start = time.perf_counter()
        training = batch.partition_id == "train"
        self.note_stage(f"step {self.global_steps}: rewards" if training else "validation: scores")
        rows = read_rows(batch.keys, batch.partition_id)
        expected = self.prompts_a_batch * int(self.config.actor_rollout_ref.rollout.n) if training else len(rows)

        vectors = embed_rows(rows, self._embed, raw=self.embedrl.reward.raw_embeddings)
        refuse_failures(rows, vectors.failures, self.embedrl.reward.max_failed_share, expected)
        embedded = time.perf_counter()

        judge = self.judge.of(rows, batch.partition_id, self.global_steps) if self.judge else None
        compared = reward_batch(rows, vectors, judge)
        with self.judge.awake() if self.judge else nullcontext():
            parts = self.reward_manager.score_batch(compared)

        scored = ScoredRows(rows, compared, vectors, parts)
        scored.measure(expected)
        scored.metrics["timing_s/reward_embed"] = embedded - start
        scored.metrics["timing_s/reward_score"] = time.perf_counter() - embedded
        if self.judge:
            scored.metrics |= self.judge.metrics()
        if training:
            function = self.config.reward.custom_reward_function
            check_scores(scored, f"{function.path}:{function.name}")
            write_scores(scored, groups=int(self.config.actor_rollout_ref.rollout.n) > 1)
            scored.metrics["timing_s/reward_stage"] = time.perf_counter() - start
            scored.metrics |= self._train_embedder(scored)
        else:
            write_validation_scores(scored, batch.partition_id)
        clear_embed_rows({row.uid for row in rows})

        self._record(scored, training)
        if metrics is not None:
            metrics |= scored.metrics
            metrics["embedrl/total_steps"] = float(self.total_training_steps)
            by_source = self.parent_mode != "separate_async"
            metrics |= left_out_metrics(self.train_dataset, self.val_dataset, by_source=by_source)
        # Sorted rows: the same rollouts give the same mini-batches, whatever the order of arrival.
        position = {key: i for i, key in enumerate(batch.keys)}
        batch.reorder([position[row.key] for row in rows])
        return batch

    def _embed(self, keys: Sequence[str], partition_id: str) -> tuple[Tensor, Mapping[int, str]]:
        averaged = self.embedder_training is not None and self.embedder_training.averaged
        return self.embedder.embed_rows(keys, partition_id, averaged=averaged)

    def _train_embedder(self, scored: ScoredRows) -> dict[str, float]:
        training = self.embedder_training
        if training is None:
            return {}
        metrics: dict[str, float] = {}
        if training.is_due(self.global_steps):
            start = time.perf_counter()
            metrics = training.step(scored, self.global_steps)
            metrics["timing_s/embedder_train"] = time.perf_counter() - start
        return {**metrics, "embedder/active": float(training.state.stopped_at is None)}

    # ------------------------------------------------------------------ 8: the update is of the policy that sampled

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, float]) -> KVBatchMeta:
        self.note_stage(f"step {self.global_steps}: update")
        batch = super()._compute_old_log_prob(batch, metrics=metrics)  # type: ignore[misc]
        self._watch.check(metrics, self.global_steps)
        return batch

    # ------------------------------------------------------------------ 9: rollouts that are kept

    def _record(self, scored: ScoredRows, training: bool) -> None:
        """Keep what dumps and validation need of a batch."""
        folder = self.config.trainer.get("rollout_data_dir")
        if training and self.local_trigger_step == 0:
            self._dump_parts = {}
        if folder or self.config.trainer.get("validation_data_dir"):
            self._dump_parts.update({row.key: scored.describe(i) for i, row in enumerate(scored.rows)})
        if training and folder:
            part = self.local_trigger_step if self.parameter_sync_step > 1 else None
            path = Path(folder) / dump_name(self.global_steps, part)
            scored.write_dump(path, self.config.reward.custom_reward_function)
        if not training:
            self._case_images().note(scored.rows)
            known = [None if i in scored.vectors.failures else one for i, one in enumerate(scored.vectors.embeddings)]
            self._validation.add(
                [
                    ValidationRow(row.source, row.side, row.session, row.content, vector, row.pair_id)
                    for row, vector in zip(scored.rows, known, strict=True)
                ]
            )

    def _dump_generations(
        self, inputs: Any, outputs: Any, gts: Any, scores: Any, reward_extra_infos_dict: Any, dump_path: Any
    ) -> None:
        """verl's dump with the T-CoT's parts beside each text; rows that verl added as padding are left out."""
        keys = reward_extra_infos_dict["uid"]
        kept = [i for i, key in enumerate(keys) if key in self._dump_parts]
        extra = {name: [values[i] for i in kept] for name, values in reward_extra_infos_dict.items()}
        parts = [self._dump_parts[keys[i]] for i in kept]
        for name in parts[0] if parts else ():
            extra[name] = [part[name] for part in parts]
        super()._dump_generations(  # type: ignore[misc]
            inputs=[inputs[i] for i in kept],
            outputs=[outputs[i] for i in kept],
            gts=[gts[i] for i in kept],
            # An unknown reward is null in the dump, not the stand-in that keeps the group's advantages unmoved.
            scores=[part["reward"]["score"] for part in parts],
            reward_extra_infos_dict=extra,
            dump_path=dump_path,
        )

    # ------------------------------------------------------------------ 9: validation

    def _validate(self) -> dict[str, float]:
        """verl's validation, then Hit@1 and NDCG over the whole set."""
        self.note_stage("validation: rollouts")
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
        self._case_images().log(self.global_steps)
        folder = self.config.trainer.default_local_dir
        record_scores(f"{folder}/global_step_{self.global_steps}", card_scores(retrieval))
        hit1 = retrieval.get("val-core/all/hit@1")
        if self.embedrl.validation.keep_best and hit1 is not None and keep_if_best(folder, self.global_steps, hit1):
            print(f"EG-RL: step {self.global_steps} has the best validation so far, kept in {folder}/best", flush=True)
        return metrics | retrieval | left_out_metrics(self.train_dataset, self.val_dataset, by_source=True)

    def _case_images(self) -> CaseImages:
        """Made by the first validation: the data sets come after the trainer."""
        if self._cases is None:
            run, embedrl = self.config.trainer, self.embedrl
            names = (str(run.project_name), str(run.experiment_name))
            count = embedrl.validation.case_images
            self._cases = CaseImages(count, self.val_dataset, embedrl.evidence, list(run.logger), names)
        return self._cases

    def _val_metrics_update(
        self, data_sources: Any, sample_uids: Any, infos: dict[str, list[Any]], *args: Any, **kwargs: Any
    ) -> dict[str, float]:
        """verl's means over the rows that have a reward: an unknown one is no reward of 0."""
        scores = infos.get("score", [None] * len(infos["reward"]))  # absent where no row has one
        infos["reward"] = [
            None if score is None else reward for score, reward in zip(scores, infos["reward"], strict=True)
        ]
        return dict(super()._val_metrics_update(data_sources, sample_uids, infos, *args, **kwargs))  # type: ignore[misc]

    # ------------------------------------------------------------------ 9: checkpoint

    def _save_checkpoint(self) -> None:
        self.note_stage(f"step {self.global_steps}: checkpoint")
        run, training = self.config.trainer, self.embedder_training
        keep = run.get("max_actor_ckpt_to_keep")
        folder = f"{run.default_local_dir}/global_step_{self.global_steps}"
        # Before verl's part, whose tracker file comes last: a checkpoint that the tracker names is complete.
        make_way(Path(folder))
        with writing(Path(folder)):
            if training is not None:
                training.save(folder, self.global_steps, keep)
            write_records(self, folder)
            super()._save_checkpoint()  # type: ignore[misc]
        prune_to(keep, run.default_local_dir)


class PolicyWatch:
    """Warns, and stops a synchronous run, when rollouts and actor have come apart.

    One low step is warned of, since a batch of few or nearly certain tokens has a low correlation by chance; two in a
    row are no chance.

    Args:
        least: correlation below which a synchronous run stops.
        synchronous: rollouts are the actor's own; else they may be some updates old, which is only warned of.
    """

    def __init__(self, least: float, *, synchronous: bool) -> None:
        self.least, self.synchronous = least, synchronous
        self._low_before = self._warned_unwatched = False

    def check(self, metrics: Mapping[str, float], step: int) -> None:
        """Look at the metrics of a step."""
        value = float(metrics.get(CORRELATION, float("nan")))
        if math.isnan(value):
            if not self._warned_unwatched:
                logger.warning(
                    "EG-RL: step %d has no %s (log-probs of the rollout are off, or all probabilities are equal); "
                    "whether rollouts are the actor's own is not watched there",
                    step,
                    CORRELATION,
                )
            self._warned_unwatched = True
            return
        low_before, self._low_before = self._low_before, value < self.least
        if value >= max(WARN_BELOW, self.least):
            return
        message = (
            f"step {step}: the probabilities of the rollout and of the actor correlate by {value:.3f} ({CORRELATION}); "
            "1 is the same policy"
        )
        if self.synchronous and self._low_before and low_before:
            raise EmbedRLError(
                f"{message}, and below embedrl.rollout.min_probs_correlation={self.least:g} for two steps in a row the "
                "run stops: it would train on the rollouts of another policy. Look for weights that do not reach vLLM "
                "(adapters of the vision part, quantisation), other prompts or positions, another temperature, or "
                "sampling that cuts probabilities (rollout.top_k, rollout.top_p)"
            )
        logger.warning("EG-RL: %s", message)


@register_trainer("egrl_sync")
class EGRLTrainerSync(EGRLMixin, PPOTrainerSync):  # type: ignore[misc]
    """EG-RL, synchronous: rollout, reward and update of one batch follow one another on the same devices."""

    parent_mode = "sync"


plugin.add_trainers(__name__)
