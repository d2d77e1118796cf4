# SPDX-License-Identifier: Apache-2.0
"""What this package keeps beside verl's checkpoints, and which checkpoints stay.

    global_step_N/run.json         what gave the rewards: compared when the run is resumed
    global_step_N/training.json    about the Reasoner, for the model card of `embedrl export`; its scores come with the
                                   validation of that very step
    global_step_N/embedder/...     a co-trained Embedder with a training.json of its own
    best/global_step_N, best/score.json    the checkpoint with the best validation

The Embedder, the evidence it sees, how prompts are written, the judge and the reward function have no state that a
checkpoint would restore, and resuming with another one would change the reward in silence: so `run.json` is checked.
(Which data, in which order, is in the data loader's own state.)
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from embedrl_verl import rewards
from embedrl_verl.config import EmbedRLConfig
from embedrl_verl.config.schema import EmbedderConfig, MediaConfig, Requests
from embedrl_verl.data.files import sha256_of, write_atomically
from embedrl_verl.data.model_files import model_digest
from embedrl_verl.errors import ConfigError
from embedrl_verl.export.checkpoint import complete_steps, last_complete_step
from embedrl_verl.export.record import OF_EMBEDDER, RECORD_FILE, DataSource, TrainingRecord, read_record, write_record
from embedrl_verl.rewards.load import helpers_in, source_of

RECORD = "run.json"
# Keys that change where and how fast something runs, not what it answers; `path` and the Embedder's sections are
# recorded in other words. A new key counts until it stands here.
_FREE = {
    "embedder": (
        *("strategy", "offload", "max_tokens_per_gpu", "attn_implementation", "nnodes", "n_gpus_per_node", "path"),
        *("tensor_model_parallel_size", "pipeline_model_parallel_size", "train", "backend", "server", "sentence"),
    ),
    "judge": (*(field.name for field in dataclasses.fields(Requests)), "max_unknown_share"),
    "reward": ("max_failed_share", "poll_interval", "raw_embeddings"),
}
# What verl's managers would remove; the small files of a step stay, as they do there.
_WEIGHTS = ("actor", "embedder")
BEST, SCORE, METRIC = "best", "score.json", "hit@1"

# ---------------------------------------------------------------------- run.json: what gave the rewards


def run_record(config: Any, embedrl: EmbedRLConfig) -> dict[str, dict[str, Any]]:
    """The record of a run, section by section, in JSON's types; made once, of what the run has loaded."""
    named, data, rollout = config.reward.custom_reward_function, config.data, config.actor_rollout_ref.rollout
    prompts = {key: data[key] for key in ("max_prompt_length", "max_response_length", "filter_overlong_prompts")}
    record = {
        "embedrl.embedder": _embedder(embedrl.embedder),
        "embedrl.evidence": dataclasses.asdict(embedrl.evidence),
        "data.embedrl": dataclasses.asdict(MediaConfig.from_config(data)) | prompts,
        "embedrl.judge": _judge(config, embedrl),
        "embedrl.reward": _bound(embedrl.reward, "reward"),
        "actor_rollout_ref.rollout": {key: rollout[key] for key in ("n", "temperature", "top_p")},
        "reward.custom_reward_function": {
            "function": named.name,
            "code": _code(str(named.path)),
            "package": _package_code(),
            "reward_kwargs": OmegaConf.to_container(named.reward_kwargs, resolve=True) if named.reward_kwargs else {},
        },
    }
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(record))  # tuples are lists, as they will be read
    return plain


def check_run_record(step_folder: str, record: Mapping[str, Any]) -> None:
    """Refuse to resume with anything that would give other rewards than so far."""
    file = Path(step_folder) / RECORD
    if not file.is_file():
        raise ConfigError(
            f"{file} is missing: the checkpoint was not written by an EG-RL trainer of this version. Start a new run "
            "folder (trainer.default_local_dir)"
        )
    saved = json.loads(file.read_text())
    changed = []
    for section in sorted({*saved, *record}):
        before, now = dict(saved.get(section, {})), dict(record.get(section, {}))
        digests = before.get("weights"), now.get("weights")
        if None in digests:  # not here then or now: the path is all that is known
            before.pop("weights", None), now.pop("weights", None)
        elif digests[0] == digests[1]:  # the same files, wherever they are
            before.pop("path", None), now.pop("path", None)
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                changed.append(f"{section}.{key} was {before.get(key)!r} and is {now.get(key)!r}")
    if changed:
        raise ConfigError(
            f"the run at {step_folder} cannot be resumed with other rewards: {'; '.join(changed)}. Resume with the "
            f"same settings, or start a new run folder (trainer.default_local_dir); if you mean it, edit {file}"
        )


def _embedder(config: EmbedderConfig) -> dict[str, Any]:
    settings = _bound(config, "embedder")
    if config.backend == "sentence_transformers":  # its own prompts; the other backends give the same vectors
        settings["prompts"] = [config.sentence.query_prompt, config.sentence.target_prompt]
    if config.backend == "server":  # text of longer rows is cut
        settings["server.max_model_len"] = config.server.max_model_len
    train = config.train
    trained = {"average": train.ema_decay > 0, "lora": [train.lora_rank, train.lora_alpha]} if train.enable else None
    return {"path": config.path, "weights": model_digest(str(config.path)), "trained": trained, **settings}


def _judge(config: Any, embedrl: EmbedRLConfig) -> dict[str, Any]:
    """Empty without a judge."""
    served = config.reward.reward_model
    if not served.enable and not embedrl.judge.urls:
        return {}
    path = str(served.model_path) if served.enable else None
    return {"path": path, "weights": path and model_digest(path), **_bound(embedrl.judge, "judge")}


def _bound(section: Any, name: str) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(section).items() if key not in _FREE[name]}


def _code(path: str) -> str:
    """sha256 of the file that the run's reward function, which is loaded, is in, and of what it imported from beside
    it."""
    source = source_of(path)
    if isinstance(source, str):
        module = importlib.util.find_spec(source)
        assert module is not None and module.origin is not None, source
        source = Path(module.origin)
    beside = () if path.startswith("pkg://") else helpers_in(source.resolve().parent).items()
    return " ".join([sha256_of(source), *(f"{name} {sha256_of(file)}" for name, file in beside)])


def _package_code() -> str:
    """sha256 of this package's reward maths, which ready-made functions and many own ones call."""
    digest = hashlib.sha256()
    for file in sorted(Path(rewards.__file__).parent.rglob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------- training.json: for the model cards


def write_records(trainer: Any, step_folder: str) -> None:
    """Write all records of a checkpoint of an EG-RL trainer (see the module)."""
    folder, config, embedrl = Path(step_folder), trainer.config, trainer.embedrl
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RECORD, json.dumps(trainer.run_record, indent=2) + "\n")
    counts = sorted(Counter(trainer.train_dataset.pair_sources).items())
    common = {"step": trainer.global_steps, "data": tuple(DataSource(*one) for one in counts)}
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    media = dataclasses.asdict(MediaConfig.from_config(config.data)) | {"family": trainer.train_dataset.family}
    settings = {
        "embedder": embedrl.embedder.path,
        "embedder_trained": embedrl.embedder.train.enable,
        "reward_function": Path(str(config.reward.custom_reward_function.path)).name,
        "pairs_per_step": config.data.train_batch_size // 2,
        "rollouts": rollout.n,
        "temperature": rollout.temperature,
        "lr": actor.optim.lr,
        "kl_loss_coef": actor.kl_loss_coef,
        "clip_ratio": actor.clip_ratio,
        "max_prompt_length": config.data.max_prompt_length,
        "max_response_length": config.data.max_response_length,
        "seed": config.data.get("seed") or 0,
        **{name: value for name, value in media.items() if name != "pairs_together"},
        "evidence": dataclasses.asdict(embedrl.evidence),
    }
    base = str(config.actor_rollout_ref.model.path)
    record = TrainingRecord(stage="egrl", base_model=base, settings=settings, **common)
    write_record(folder, record)
    training = trainer.embedder_training
    if training is None:
        return
    hidden = ("enable", "anchor_files", "lora_adapter_path", "gradient_checkpointing", "max_tokens_per_gpu")
    kept = {name: value for name, value in dataclasses.asdict(embedrl.embedder.train).items() if name not in hidden}
    # With an average, Hit@1 of the probe set is the average's; the checkpoint's weights are the trained ones.
    known = training.last_hit1 is not None and not training.averaged
    probe = {"hit@1 (anchors)": training.last_hit1} if known else {}
    kept |= {name: getattr(embedrl.embedder, name) for name in OF_EMBEDDER}
    base, settings = str(embedrl.embedder.path), {"inside": "EG-RL", **kept}
    record = TrainingRecord(stage="embedder", base_model=base, settings=settings, scores=probe, **common)
    write_record(folder / "embedder", record)


def record_scores(step_folder: str, scores: Mapping[str, float]) -> None:
    """Put the scores of the validation of a step into its `training.json`, if the step has a checkpoint: verl saves
    before it validates."""
    folder = Path(step_folder)
    if (folder / RECORD_FILE).is_file() and (record := read_record(folder)) is not None:
        write_record(folder, record.model_copy(update={"scores": dict(scores)}))


# ---------------------------------------------------------------------- which checkpoints stay


def prune_to(keep: int | None, checkpoints: str | Path) -> list[Path]:
    """Remove the weights of a run's steps but the `keep` newest ones (`trainer.max_actor_ckpt_to_keep`).

    verl's managers forget at every start what they saved before. Only complete steps with this package's record are
    looked at. Links stay.

    Args:
        keep: None, 0 or less = all.
    """
    if keep is None or keep < 1:
        return []
    own = [
        [part for name in _WEIGHTS if (part := folder / name).is_dir() and not part.is_symlink()]
        for folder in complete_steps(Path(checkpoints)).values()
        if (folder / RECORD).is_file()
    ]
    removed = [part for weights in list(filter(None, own))[:-keep] for part in weights]
    for part in removed:
        shutil.rmtree(part)
    return removed


def keep_if_best(checkpoints: str | Path, step: int, hit1: float) -> bool:
    """Keep the checkpoint of a step in `best/`, if it is complete and none before scored as high.

    A process that is killed at any point leaves the old best or the new one; verl's own folders are only read, and
    files are hard links where the file system has them.

    Args:
        hit1: mean over data sources, in [0, 1].
    """
    root = Path(checkpoints)
    best, new, old, folder = root / BEST, root / ".best.new", root / ".best.old", root / f"global_step_{step}"
    if old.is_dir() and not best.exists():  # killed between the two renames
        old.rename(best)
    score = best / SCORE
    reached = float(json.loads(score.read_text())[METRIC]) if score.is_file() else -1.0
    if last_complete_step(root) != step or hit1 <= reached:
        return False
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(folder, new / folder.name, copy_function=_link_or_copy)
    (new / SCORE).write_text(json.dumps({"step": step, METRIC: hit1}))
    if best.exists():
        best.rename(old)
    new.rename(best)
    shutil.rmtree(old, ignore_errors=True)
    return True


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # no hard links here
        shutil.copy2(source, target)
