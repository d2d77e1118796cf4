# SPDX-License-Identifier: Apache-2.0
"""Co-training: the Embedder takes contrastive steps on the T-CoTs whose rewards it has just given.

An update comes right after the rewards, while the rows still lie in the queue: their vectors are pass 1 of the
two-pass step (unless a moving average gave the rewards), and the rewards say which rollouts are the best. The actor's
update does not depend on the Embedder, so the order of the two does not matter.

Rewards come from the Embedder that is being trained, so they can rise while it gets worse: both sides may agree on
something that only they understand. A held-out probe set, which nobody trains on, watches: co-training stops for good
when its Hit@1 falls. Its pairs are read as they are in the file (with their T-CoT if they are annotated, else the input
alone), so that Hit@1 compares Embedders and nothing else.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from embedrl_verl.config.schema import EmbedderTrainConfig
from embedrl_verl.data.files import write_atomically
from embedrl_verl.data.video import even_indices
from embedrl_verl.embedder.client import EmbedderClient
from embedrl_verl.embedder.info_nce import ContrastiveLayout
from embedrl_verl.embedder.processor import Encoded
from embedrl_verl.embedder.two_pass import NoNegativesError, NoPairsError, contrastive_gradients
from embedrl_verl.errors import ConfigError, EmbedderError
from embedrl_verl.evaluation.validation import RetrievalValidation, ValidationRow
from embedrl_verl.stage1.rows import PairRows
from embedrl_verl.trainer.reward_stage import EMBED_PARTITION, Row, ScoredRows

logger = logging.getLogger(__name__)

STATE = "cotraining.json"


class ProbeSet:
    """At most `count` encoded held-out pairs, drawn evenly from all of `embedrl.embedder.train.anchor_files`."""

    def __init__(self, rows: PairRows, count: int) -> None:
        indices = even_indices(len(rows), min(count, len(rows)))
        self._pairs = [rows[index, False] for index in indices]
        self._sources = [rows.source(index) for index in indices]

    def __len__(self) -> int:
        return len(self._pairs)

    def hit1(self, embed: Callable[[Sequence[Encoded]], torch.Tensor]) -> float:
        """Hit@1 over the pairs of each source, mean over sources.

        Args:
            embed: rows -> float32 (n, D); a failed row is NaN and not retrieved.
        """
        vectors = embed([pair.query for pair in self._pairs] + [pair.target for pair in self._pairs])
        known = vectors.isfinite().all(dim=1)
        if not known.any():
            raise EmbedderError(f"none of the {len(vectors)} rows of the {len(self)} probe pairs has a finite vector")
        validation = RetrievalValidation(ndcg_k=1)
        for side, start in enumerate((0, len(self._pairs))):
            validation.add(
                [
                    ValidationRow(source, side, 0, pair.contents[0], vectors[start + i] if known[start + i] else None)
                    for i, (source, pair) in enumerate(zip(self._sources, self._pairs, strict=True))
                ]
            )
        return validation.metrics()["val-core/all/hit@1"]


@dataclass
class CotrainingState:
    """What a resumed run has to know. `baseline`: Hit@1 of the probe set before the first update."""

    updates: int = 0
    skipped: int = 0
    baseline: float | None = None
    stopped_at: int | None = None


def chosen_rows(
    rows: Sequence[Row], scores: torch.Tensor, usable: Sequence[bool], how: str, seed: list[int]
) -> list[int]:
    """Indices of the rows to train on, in order.

    Args:
        rows: of a batch; scores: float (N,), NaN = unknown; usable: has a vector.
        how: "best" (highest score of its prompt; unknown scores are below all others), "random" (one of its prompt) or
            "all".
        seed: of the random choice.
    """
    by_prompt: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if usable[i]:
            by_prompt[row.pair_id, row.side].append(i)
    if how == "all":
        return sorted(i for group in by_prompt.values() for i in group)
    if how == "random":
        rng = np.random.default_rng(seed)
        return sorted(int(rng.choice(group)) for _, group in sorted(by_prompt.items()))
    known = scores.nan_to_num(nan=float("-inf")).tolist()
    return sorted(max(group, key=lambda i: (known[i], -i)) for group in by_prompt.values())


def layout_of(rows: Sequence[Row]) -> tuple[list[int], list[int], ContrastiveLayout]:
    """Positions of the queries and of the targets among `rows`, and which of them belong together."""
    numbers = {pair: number for number, pair in enumerate(sorted({row.pair_id for row in rows}))}
    sides = [[i for i, row in enumerate(rows) if row.side == side] for side in (0, 1)]
    pair = torch.tensor([numbers[row.pair_id] for row in rows], dtype=torch.int64)
    content = torch.tensor([row.content for row in rows], dtype=torch.int64)
    query, target = sides
    return query, target, ContrastiveLayout(pair[query], pair[target], content[query], content[target])


class EmbedderTraining:
    """Takes the updates, watches the probe set and stops when its Hit@1 falls."""

    def __init__(self, config: EmbedderTrainConfig, client: EmbedderClient, probes: ProbeSet) -> None:
        self._config, self._client, self._probes = config, client, probes
        self.state = CotrainingState()
        self.last_hit1: float | None = None
        """Hit@1 of the probe set after the last update of this process; None before it."""

    @property
    def averaged(self) -> bool:
        """Whether rewards come from the moving average of the weights."""
        return self._config.ema_decay > 0

    def is_due(self, step: int) -> bool:
        """Whether this step trains the Embedder."""
        return self.state.stopped_at is None and step % self._config.every == 0

    def step(self, scored: ScoredRows, step: int) -> dict[str, float]:
        """One update on the rows of a batch, which still lie in the queue.

        Returns:
            Metrics `embedder/...`: loss, Hit@1 in the batch and of the probe set, rows, gradient norm, learning rate.
        """
        state = self.state
        if state.baseline is None:
            state.baseline = self._probe_hit1()
        usable = [i not in scored.vectors.failures for i in range(len(scored.rows))]
        picked = chosen_rows(
            scored.rows, scored.parts["score"], usable, self._config.rollouts, [self._config.seed, step]
        )
        rows = [scored.rows[i] for i in picked]
        keys = [row.key for row in rows]
        vectors = scored.vectors.embeddings[picked]
        if self.averaged:  # the rewards' vectors are those of other weights
            vectors = self._client.embed_rows(keys, EMBED_PARTITION).vectors
            finite = vectors.isfinite().all(dim=1)
            rows = [row for row, known in zip(rows, finite.tolist(), strict=True) if known]
            keys, vectors = [row.key for row in rows], vectors[finite]
        query, target, layout = layout_of(rows)
        metrics = {"embedder/rows": float(len(rows)), "embedder/baseline_anchor_hit@1": state.baseline}
        try:
            gradients = contrastive_gradients(vectors[query], vectors[target], layout, **self._config.loss_options())
        except (NoNegativesError, NoPairsError) as error:
            state.skipped += 1
            logger.warning("step %d: the Embedder was not trained: %s", step, error)
            return {**metrics, "embedder/skipped_updates": float(state.skipped)}
        gradient = torch.zeros(len(rows), vectors.shape[1])
        gradient[query], gradient[target] = gradients.query, gradients.target
        trained = self._client.train_rows(keys, gradient, EMBED_PARTITION)
        state.updates += 1
        metrics |= {f"embedder/{name}": value for name, value in {**gradients.metrics, **trained}.items()}
        metrics["embedder/updates"] = float(state.updates)
        metrics["embedder/skipped_updates"] = float(state.skipped)
        metrics["embedder/anchor_hit@1"] = hit1 = self.last_hit1 = self._probe_hit1()
        self._watch(hit1, step)
        return metrics

    def _probe_hit1(self) -> float:
        return self._probes.hit1(lambda rows: self._client.embed(rows, averaged=self.averaged).vectors)

    def _watch(self, hit1: float, step: int) -> None:
        baseline = self.state.baseline
        assert baseline is not None
        if baseline - hit1 <= self._config.max_anchor_drop:
            return
        self.state.stopped_at = step
        logger.warning(
            "co-training of the Embedder stops at step %d: Hit@1 of its %d probe pairs fell from %.3f to %.3f, more "
            "than embedrl.embedder.train.max_anchor_drop=%g. The Embedder stays as it is now, RL goes on. To keep it "
            "nearer to its start: lower lr, train less often (every), or let an average give the rewards (ema_decay)",
            step,
            len(self._probes),
            baseline,
            hit1,
            self._config.max_anchor_drop,
        )

    # ------------------------------------------------------------------ checkpoints

    def save(self, step_folder: str, step: int, keep: int | None) -> None:
        """Write the Embedder and this state into a checkpoint folder, before verl's tracker file names it."""
        self._client.save(f"{step_folder}/embedder", step, keep)
        Path(step_folder).mkdir(parents=True, exist_ok=True)  # the client's ranks may be on another node
        write_atomically(Path(step_folder) / STATE, json.dumps(asdict(self.state), indent=1) + "\n")

    def load(self, step_folder: str) -> None:
        """Go on from a checkpoint folder."""
        file = Path(step_folder) / STATE
        if not file.is_file():
            raise ConfigError(
                f"{file} is missing: the run was begun with a frozen Embedder. Resume with "
                "embedrl.embedder.train.enable=False, or start a new run folder"
            )
        self._client.load(f"{step_folder}/embedder")
        self.state = CotrainingState(**json.loads(file.read_text()))


def refuse_trained_checkpoint(step_folder: str) -> None:
    """A run with a frozen Embedder must not go on from a checkpoint whose Embedder was trained."""
    if (Path(step_folder) / STATE).is_file():
        raise ConfigError(
            f"the Embedder of {step_folder} was co-trained; resume with embedrl.embedder.train.enable=True, or export "
            "it (embedrl export), point embedrl.embedder.path at the result and start a new run folder"
        )
