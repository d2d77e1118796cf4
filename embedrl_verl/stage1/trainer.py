# SPDX-License-Identifier: Apache-2.0
"""The course of stage 1 on one rank: batches in, two-pass updates, validation, checkpoints, resume."""

from __future__ import annotations

import itertools
import math
import resource
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader
from verl.utils.device import get_device_name
from verl.utils.distributed import initialize_global_process_group

from embedrl_verl.embedder.processor import processor_for
from embedrl_verl.embedder.two_pass import NoNegativesError
from embedrl_verl.embedder.worker import EmbedderWorker, worker_config
from embedrl_verl.errors import ConfigError, EmbedderError
from embedrl_verl.evaluation.validation import RetrievalValidation, ValidationRow, card_scores
from embedrl_verl.export.checkpoint import writing
from embedrl_verl.export.record import DataSource, TrainingRecord, read_record, write_record
from embedrl_verl.progress import Waiting, repeated
from embedrl_verl.stage1.rows import EncodedPair, PairRows, count_by_source, read_training_pairs, rows_of_pairs
from embedrl_verl.stage1.run_folder import RunFolder
from embedrl_verl.stage1.sampler import Batch, plan_batches
from embedrl_verl.stage1.settings import Stage1Config
from embedrl_verl.stage1.step import embed_local, gather, two_pass_step

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
    """Stage 1 of this rank. All ranks build one with the same configuration and call `fit`."""

    def __init__(self, config: Stage1Config, *, rank: int, world_size: int, local_world_size: int) -> None:
        self.config, self.rank, self.world_size = config, rank, world_size
        run = config.contrastive
        assert run.out is not None  # ContrastiveConfig refuses a missing folder
        self.folder = RunFolder(run.out)
        self.waiting = Waiting("contrastive", "the first batch")
        self._print("reading the data, loading the model")
        self.step = self.folder.last_step()
        if run.batch_pairs < 2 * world_size:
            raise ConfigError(
                f"contrastive.batch_pairs must give every device two pairs; got {run.batch_pairs} for {world_size}"
            )
        if self.step and not run.resume:
            raise ConfigError(
                f"{run.out} holds a run's checkpoints and contrastive.resume is False; choose another folder"
            )
        pairs = read_training_pairs(config.data.train_files, tcot=config.data.tcot)
        plan = plan_batches(config, pairs)
        self.pairs_of_source = count_by_source(pairs)
        self.total_steps = run.total_steps or plan.steps(run.epochs)
        if self.step:
            self._check_same_run()
        settings: dict[str, Any] = {
            "processor": processor_for(config.embedder, max_frames=config.media.max_frames),
            "media": config.media,
            "evidence": config.evidence,
            "media_root": config.data.media_root,
            "tcot": config.data.tcot,
        }
        self.train_rows = PairRows(pairs, **settings)
        self.val_rows: PairRows | None = None
        if config.data.val_files:
            held_out = read_training_pairs(config.data.val_files, tcot=config.data.tcot)
            self.val_rows = PairRows(held_out, **settings, negatives=False)
        # The loader's processes are forked before this one holds a model and a process group.
        left = self.total_steps - self.step
        self.batches = self._load(list(itertools.islice(plan.from_step(self.step), left)))
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
            self.worker.load_checkpoint(str(self.folder.step_folder(self.step) / "embedder"))

    def _load(self, batches: list[Batch]) -> Iterator[tuple[Batch, list[EncodedPair]]]:
        """Batches with this rank's pairs encoded."""
        # Each tensor that a loader process hands over takes a file descriptor.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        loader = DataLoader(
            self.train_rows,
            batch_sampler=[[(int(batch.pairs[i]), batch.raw) for i in self._own_places(batch)] for batch in batches],
            num_workers=self.config.contrastive.num_workers,
            collate_fn=list,
        )
        return zip(batches, iter(loader), strict=True)

    def _own_places(self, batch: Batch) -> range:
        """Places of the batch that this rank embeds: every world_size-th, so that sources and lengths are spread."""
        return range(self.rank, len(batch.pairs), self.world_size)

    # ------------------------------------------------------------------ the run

    def fit(self) -> None:
        """Train to the last update. Rank 0 prints and writes."""
        with repeated(self.waiting.look) if self.rank == 0 else nullcontext():
            self._fit()

    def _fit(self) -> None:
        run = self.config.contrastive
        if self.rank == 0:
            self.folder.out.mkdir(parents=True, exist_ok=True)
            self.folder.forget_after(self.step)
        self._print(
            f"{sum(self.pairs_of_source.values())} pairs of {len(self.pairs_of_source)} sources, {self.total_steps} "
            f"updates of {run.batch_pairs} pairs on {self.world_size} device(s)"
            + (f", going on after update {self.step}" if self.step else "")
        )
        empty, scores = 0, {}
        waiting = time.perf_counter()
        for batch, pairs in self.batches:
            started = time.perf_counter()
            self.step += 1
            self.waiting.wait_for(f"update {self.step}")
            metrics: dict[str, float] = {"wait_s": started - waiting, "raw": float(batch.raw)}
            try:
                rows = rows_of_pairs(pairs, self._own_places(batch))
                metrics |= two_pass_step(self.worker, rows, self.config.embedder.train)
                empty = 0
            except NoNegativesError as error:
                empty += 1
                metrics["skipped"] = 1.0
                if empty >= run.max_empty_batches:
                    raise EmbedderError(
                        f"{empty} batches in a row without negatives (contrastive.max_empty_batches): {error}"
                    ) from error
                sources = sorted({self.train_rows.source(int(index)) for index in batch.pairs})
                self._print(f"update {self.step} skipped, sources {', '.join(sources)}: {error}")
            metrics["step_s"] = time.perf_counter() - started
            self._log(metrics)
            last = self.step == self.total_steps
            if "loss" in metrics and (last or self.step == 1 or self.step % run.log_freq == 0):
                self._print(
                    f"update {self.step}/{self.total_steps}, loss {metrics['loss']:.4f}, Hit@1 in the batch "
                    f"{metrics['hit@1']:.3f}, lr {metrics['lr']:.2e}, {metrics['step_s']:.2f} s"
                )
            if self.val_rows is not None and (last or (run.test_freq and self.step % run.test_freq == 0)):
                scores = self.validate(self.val_rows)
                self._log(scores)
                shown = ", ".join(f"{name} {value:.3f}" for name, value in scores.items() if "/all/" in name)
                self._print(f"update {self.step}, validation: {shown}")
            if last or (run.save_freq and self.step % run.save_freq == 0):
                self.save(scores)
            waiting = time.perf_counter()

    def _log(self, metrics: dict[str, float]) -> None:
        if self.rank == 0:
            self.folder.log(self.step, metrics)

    def _print(self, text: str) -> None:
        if self.rank == 0:
            self.waiting.say(text)

    # ------------------------------------------------------------------ validation and checkpoints

    def validate(self, rows: PairRows) -> dict[str, float]:
        """Hit@1 and NDCG@5 by source; `raw/...` beside when raw batches are trained too."""
        self.waiting.wait_for(f"update {self.step}, validation")
        scores = self._score(rows, raw=False)
        if self.config.data.tcot and self.config.contrastive.raw_share:
            scores |= {f"raw/{name}": value for name, value in self._score(rows, raw=True).items()}
        return scores

    def _score(self, rows: PairRows, *, raw: bool) -> dict[str, float]:
        own = range(self.rank, len(rows), self.world_size)
        found: list[ValidationRow] = []
        # Every rank makes as many calls as the one with most pairs; FSDP's collectives need all of them.
        for start in range(0, math.ceil(len(rows) / self.world_size), VALIDATION_PAIRS):
            mine = own[start : start + VALIDATION_PAIRS]
            pairs = [rows[index, raw] for index in mine or [0]]
            vectors = embed_local(self.worker, [pair.query for pair in pairs] + [pair.target for pair in pairs])
            for side, of_side in enumerate(vectors.split(len(pairs))):
                for index, pair, vector in zip(mine, pairs, of_side, strict=False):
                    found.append(ValidationRow(rows.source(index), side, 0, pair.contents[0], vector))
        validation = RetrievalValidation(NDCG_K)
        for part in gather(found):
            validation.add(part)
        return validation.metrics()

    def save(self, scores: dict[str, float]) -> None:
        """Write a checkpoint; the tracker file last."""
        folder = self.folder.step_folder(self.step)
        self.waiting.wait_for(f"update {self.step}, checkpoint")
        dist.barrier()
        with writing(folder) if self.rank == 0 else nullcontext():
            self.worker.save_checkpoint(str(folder / "embedder"), None, self.step, None)
            if self.rank == 0:
                write_record(folder, self.record(scores))
                self.folder.complete(self.step, self.config.contrastive.keep_checkpoints)
        self._print(f"checkpoint {folder}")
        dist.barrier()

    def record(self, scores: dict[str, float]) -> TrainingRecord:
        """What the model card says of the run, and a resumed run compares: everything that decides an update."""
        config = self.config
        # Later sections win: `seed` is that of `contrastive`.
        values = asdict(config.embedder.train) | asdict(config.embedder) | asdict(config.contrastive)
        settings = {
            "tcot": config.data.tcot,
            "total_steps": self.total_steps,
            **{name: values[name] for name in SETTINGS},
            **{f"evidence_{name}": value for name, value in asdict(config.evidence).items()},
            "tcot_family": config.media.family,
            "max_frames": config.media.max_frames,
            "seed": values["seed"],
        }
        return TrainingRecord(
            stage="contrastive",
            step=self.step,
            base_model=config.embedder.path,
            data=tuple(DataSource(source, pairs) for source, pairs in self.pairs_of_source.items()),
            settings={name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
            scores=card_scores(scores),
        )

    def _check_same_run(self) -> None:
        """Refuse to go on with settings or data that would make other updates."""
        saved, now = read_record(self.folder.step_folder(self.step)), self.record({})
        assert saved is not None  # written before the tracker
        other = [name for name in now.settings if saved.settings.get(name) != now.settings[name]]
        other += ["pairs of each source"] * (saved.data != now.data)
        if other:
            raise ConfigError(
                f"{self.folder.out} was begun with other settings ({', '.join(other)}); go on with the same, or choose "
                "another contrastive.out"
            )
