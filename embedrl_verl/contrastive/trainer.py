# SPDX-License-Identifier: Apache-2.0
"""The course of stage 1 on one rank: batches in, two-pass updates, validation, checkpoints, resume."""

from __future__ import annotations

import itertools
import math
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader
from verl.utils.device import get_device_name
from verl.utils.distributed import initialize_global_process_group

from embedrl_verl.contrastive.plan import plan_of
from embedrl_verl.contrastive.rows import (
    EncodedPair,
    PairRows,
    describe_pairs,
    read_training_pairs,
    rows_of_pairs,
)
from embedrl_verl.contrastive.run_folder import RunFolder
from embedrl_verl.contrastive.sampler import Batch
from embedrl_verl.contrastive.settings import Stage1Config
from embedrl_verl.contrastive.step import embed_local, gather, two_pass_step
from embedrl_verl.embedder.settings import processor_for
from embedrl_verl.embedder.two_pass import NoNegativesError
from embedrl_verl.embedder.worker import EmbedderWorker, worker_config
from embedrl_verl.errors import ConfigError, EmbedderError
from embedrl_verl.evaluation.validation import RetrievalValidation, ValidationRow, card_scores

NDCG_K = 5
VALIDATION_PAIRS = 64
"""Pairs that a rank encodes at a time for validation."""
SETTINGS = (
    *("batch_pairs", "sub_batch_pairs", "max_video_sub_batches", "source_weights", "raw_share"),
    *("profile", "dtype", "max_text_tokens", "image_min_tokens", "image_max_tokens"),
    *("frame_min_tokens", "frame_max_tokens"),
    *("lr", "lr_scheduler", "min_lr_ratio", "warmup_steps", "weight_decay", "clip_grad", "temperature", "symmetric"),
    *("matryoshka_dims", "lora_rank", "lora_alpha", "lora_target_modules", "lora_exclude_modules"),
)
"""Keys that decide what an update does; a run goes on only with the same values."""


class ContrastiveTrainer:
    """Stage 1 of this rank. All ranks build one with the same configuration and call `fit`.

    Raises:
        ConfigError, DataError, EmbedderError: settings, data and checkpoint are checked before weights are loaded.
    """

    def __init__(self, config: Stage1Config, *, rank: int, world_size: int, local_world_size: int) -> None:
        self.config, self.rank, self.world_size = config, rank, world_size
        run = config.contrastive
        assert run.out is not None  # ContrastiveConfig refuses a missing folder
        self.folder = RunFolder(run.out)
        if run.batch_pairs < 2 * world_size:
            raise ConfigError(
                f"contrastive.batch_pairs must give every device two pairs; got {run.batch_pairs} for {world_size}"
            )
        if not run.resume and self.folder.last_step():
            raise ConfigError(
                f"{run.out} holds a run's checkpoints and contrastive.resume is False; choose another folder"
            )
        processor = processor_for(config.embedder, max_frames=config.media.max_frames)
        dataset = partial(
            PairRows,
            processor=processor,
            media=config.media,
            evidence=config.evidence,
            media_root=config.data.media_root,
            tcot=config.data.tcot,
        )
        pairs = read_training_pairs(config.data.train_files, tcot=config.data.tcot)
        self.train_pairs = describe_pairs(pairs)
        self.plan = plan_of(config, pairs)
        self.total_steps = run.total_steps or self.plan.steps(run.epochs)
        self.train_rows = dataset(pairs)
        self.val_rows: PairRows | None = None
        if config.data.val_files:
            self.val_rows = dataset(read_training_pairs(config.data.val_files, tcot=config.data.tcot), negatives=False)
        self.step = self.folder.last_step()
        self._check_same_run()
        # The loader's processes are forked before this one holds a model and a process group.
        self.batches = self._batches()
        if get_device_name() != "cpu":
            initialize_global_process_group()  # also chooses this rank's GPU; on a CPU the worker makes the group
        self.worker = EmbedderWorker(
            worker_config(config.embedder, ranks_per_node=local_world_size, total_steps=self.total_steps)
        )
        if len(set(steps := gather(self.step))) > 1:
            raise ConfigError(
                f"{run.out} must be one folder for all nodes (a shared disk); the last checkpoint by rank is {steps}"
            )
        self.worker.reset()
        if self.step:
            self.worker.load_checkpoint(self.folder.embedder(self.step))

    # ------------------------------------------------------------------ batches

    def _own_places(self, batch: Batch) -> range:
        """Places of the batch that this rank embeds: every world_size-th, so that sources and lengths are spread."""
        return range(self.rank, len(batch.pairs), self.world_size)

    def _batches(self) -> Iterator[tuple[Batch, list[EncodedPair]]]:
        """The batches that are still to come, with this rank's pairs encoded."""
        # Each tensor that a loader process hands over takes a file descriptor.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        left = self.total_steps - self.step
        plan = list(itertools.islice(self.plan.from_step(self.step), left))
        keys = [[(int(batch.pairs[place]), batch.raw) for place in self._own_places(batch)] for batch in plan]
        loader = DataLoader(
            self.train_rows,
            batch_sampler=keys,
            num_workers=self.config.contrastive.num_workers,
            collate_fn=list,
        )
        return zip(plan, iter(loader), strict=True)

    # ------------------------------------------------------------------ the run

    def fit(self) -> None:
        """Train to the last update. Rank 0 prints and writes.

        Raises:
            EmbedderError: a vector, loss or gradient that is not finite, or too many batches without negatives.
        """
        run = self.config.contrastive
        if self.rank == 0:
            self.folder.out.mkdir(parents=True, exist_ok=True)
            self.folder.forget_after(self.step)
            print(
                f"contrastive: {sum(self.train_pairs.values())} pairs of {len(self.train_pairs)} sources, "
                f"{self.total_steps} updates of {run.batch_pairs} pairs on {self.world_size} device(s)"
                + (f", going on after update {self.step}" if self.step else ""),
                flush=True,
            )
        empty, scores = 0, {}
        waiting = time.perf_counter()
        for batch, pairs in self.batches:
            started = time.perf_counter()
            metrics: dict[str, float] = {"wait_s": started - waiting, "raw": float(batch.raw)}
            self.step += 1
            try:
                rows = rows_of_pairs(pairs, list(self._own_places(batch)))
                metrics |= two_pass_step(self.worker, rows, self.config.embedder.train)
                empty = 0
            except NoNegativesError as error:
                empty += 1
                metrics["skipped"] = 1.0
                self._skipped(batch, empty, error)
            metrics["step_s"] = time.perf_counter() - started
            self._log(metrics)
            last = self.step == self.total_steps
            if self.val_rows is not None and (last or (run.test_freq and self.step % run.test_freq == 0)):
                scores = self.validate()
                self._log(scores, validation=True)
            if last or (run.save_freq and self.step % run.save_freq == 0):
                self.save(scores)
            waiting = time.perf_counter()

    def _skipped(self, batch: Batch, count: int, error: NoNegativesError) -> None:
        if count >= self.config.contrastive.max_empty_batches:
            raise EmbedderError(f"{count} batches in a row without negatives (contrastive.max_empty_batches): {error}")
        if self.rank == 0:
            sources = sorted({self.train_rows.source(int(index)) for index in batch.pairs})
            print(f"contrastive: update {self.step} skipped, sources {', '.join(sources)}: {error}", flush=True)

    def _log(self, metrics: dict[str, float], *, validation: bool = False) -> None:
        if self.rank:
            return
        self.folder.log(self.step, metrics)
        run = self.config.contrastive
        if validation:
            shown = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if "/all/" in name)
            print(f"contrastive: update {self.step}, validation: {shown}", flush=True)
        elif "loss" in metrics and (self.step % run.log_freq == 0 or self.step in (1, self.total_steps)):
            print(
                f"contrastive: update {self.step}/{self.total_steps}, loss {metrics['loss']:.4f}, "
                f"Hit@1 in the batch {metrics['hit@1']:.3f}, lr {metrics['lr']:.2e}, {metrics['step_s']:.2f} s",
                flush=True,
            )

    # ------------------------------------------------------------------ validation and checkpoints

    def validate(self) -> dict[str, float]:
        """Hit@1 and NDCG@5 of the validation pairs by source; `raw/...` beside when raw batches are trained too."""
        views = {"": self.config.data.tcot}
        if self.config.data.tcot and self.config.contrastive.raw_share:
            views["raw/"] = False
        result: dict[str, float] = {}
        for prefix, tcot in views.items():
            result |= {prefix + name: value for name, value in self._score(tcot).items()}
        return result

    def _score(self, tcot: bool) -> dict[str, float]:
        rows = self.val_rows
        assert rows is not None
        own = range(self.rank, len(rows), self.world_size)
        found: list[ValidationRow] = []
        # Every rank makes as many calls as the one with most pairs; FSDP's collectives need all of them.
        chunks = math.ceil(len(rows) / (self.world_size * VALIDATION_PAIRS))
        for number in range(chunks):
            mine = list(own[number * VALIDATION_PAIRS : (number + 1) * VALIDATION_PAIRS])
            pairs = [rows[i, not tcot] for i in mine or [0]]
            vectors = embed_local(self.worker, [p.query for p in pairs] + [p.target for p in pairs])
            for place, index in enumerate(mine):
                for side in (0, 1):
                    vector = vectors[place + side * len(pairs)]
                    known = vector if bool(vector.isfinite().all()) else None
                    found.append(ValidationRow(rows.source(index), side, 0, pairs[place].contents[0], known))
        validation = RetrievalValidation(NDCG_K)
        for part in gather(found):
            validation.add(part)
        return validation.metrics()

    def save(self, scores: dict[str, float]) -> None:
        """Write a checkpoint; the tracker file last."""
        dist.barrier()
        self.worker.save_checkpoint(self.folder.embedder(self.step), None, self.step, None)
        if self.rank == 0:
            self.folder.write_training(self.step, self.describe(scores))
            self.folder.complete(self.step, self.config.contrastive.keep_checkpoints)
            print(f"contrastive: checkpoint {self.folder.step_folder(self.step)}", flush=True)
        dist.barrier()

    def describe(self, scores: dict[str, float]) -> dict[str, Any]:
        """`training.json`: what the model card says of the run."""
        config = self.config
        return {
            "stage": "contrastive",
            "step": self.step,
            "base_model": config.embedder.path,
            "data": [{"source": source, "pairs": pairs} for source, pairs in self.train_pairs.items()],
            "settings": self._settings(),
            "scores": card_scores(scores),
        }

    def _settings(self) -> dict[str, Any]:
        """Everything that decides what an update does."""
        config = self.config
        values = asdict(config.contrastive) | asdict(config.embedder) | asdict(config.embedder.train)
        kept = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {
            "tcot": config.data.tcot,
            "total_steps": self.total_steps,
            **{name: kept[name] for name in SETTINGS},
            **{f"evidence_{name}": value for name, value in asdict(config.evidence).items()},
            "tcot_family": config.media.family,
            "max_frames": config.media.max_frames,
            "seed": config.contrastive.seed,
        }

    def _check_same_run(self) -> None:
        """Refuse to go on with settings or data that would make other updates."""
        if not self.step:
            return
        saved = self.folder.read_training(self.step)
        now = self.describe({})
        for part in ("data", "settings"):
            if saved[part] != now[part]:
                differ = (
                    [name for name in now[part] if saved[part].get(name) != now[part][name]]
                    if part == "settings"
                    else ["the pairs of each source"]
                )
                raise ConfigError(
                    f"{self.folder.out} was begun with other {part} ({', '.join(differ)}); go on with the same, or "
                    "choose another contrastive.out"
                )
