# SPDX-License-Identifier: Apache-2.0
"""The section `embedrl` of a run's configuration as frozen, checked dataclasses.

verl leaves custom top-level sections untyped, so a misspelt key would be ignored there. Here it is an error, and every
value is checked before any process starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from embedrl_verl.errors import ConfigError

_T = TypeVar("_T")


def _require(condition: bool, key: str, rule: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"embedrl.{key} must be {rule}; got {value!r}")


@dataclass(frozen=True)
class EmbedderTrainConfig:
    """How the Embedder is trained: in stage 1, and in EG-RL if `enable` is set (method section 5)."""

    enable: bool = False
    every: int = 1
    rollouts: str = "best"
    lr: float = 1e-5
    lr_scheduler: str = "constant"
    min_lr_ratio: float = 0.0
    warmup_steps: int = 10
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    temperature: float = 0.02
    symmetric: bool = True
    matryoshka_dims: tuple[int, ...] = ()
    lora_rank: int = 0
    lora_alpha: int = 0
    lora_target_modules: str = "all-linear"
    lora_exclude_modules: str = ".*visual.*"
    lora_adapter_path: str | None = None
    gradient_checkpointing: bool = True
    max_tokens_per_gpu: int = 16384
    ema_decay: float = 0.0
    anchor_files: tuple[str, ...] = ()
    anchor_pairs: int = 64
    max_anchor_drop: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        def require(condition: bool, key: str, rule: str) -> None:
            _require(condition, f"embedder.train.{key}", rule, getattr(self, key))

        for name in ("every", "anchor_pairs", "max_tokens_per_gpu"):
            require(getattr(self, name) >= 1, name, "1 or more")
        for name in ("lr", "temperature", "clip_grad"):
            require(getattr(self, name) > 0, name, "positive")
        for name in ("warmup_steps", "weight_decay", "lora_rank", "lora_alpha", "seed"):
            require(getattr(self, name) >= 0, name, "0 or more")
        for name in ("ema_decay", "max_anchor_drop", "min_lr_ratio"):
            require(0 <= getattr(self, name) <= 1, name, "between 0 and 1")
        require(self.ema_decay < 1, "ema_decay", "below 1 (0 = off)")
        require(self.rollouts in ("best", "random", "all"), "rollouts", "best, random or all")
        require(self.lr_scheduler in ("constant", "cosine"), "lr_scheduler", "constant or cosine")
        require(all(dim >= 1 for dim in self.matryoshka_dims), "matryoshka_dims", "a list of positive numbers")
        require(not self.lora_rank or self.lora_alpha > 0, "lora_alpha", "positive with a lora_rank")
        require(not (self.lora_adapter_path and not self.lora_rank), "lora_rank", "the adapter's rank, with a path")


@dataclass(frozen=True)
class EmbedderServerConfig:
    """Stock vLLM pooling servers: those at `urls`, or without any `servers` that the run starts in a pool of their own.

    `limit` counts requests in flight over all servers and agent-loop workers; `deadline_s` bounds a row, with retries.
    """

    urls: tuple[str, ...] = ()
    api_key_env: str | None = None
    servers: int = 1
    n_gpus_per_server: int = 1
    max_model_len: int = 32768
    gpu_memory_utilization: float = 0.9
    startup_s: float = 900.0
    extra_args: tuple[str, ...] = ()
    limit: int = 256
    timeout_s: float = 120.0
    retries: int = 3
    backoff_s: float = 0.5
    deadline_s: float = 600.0

    def __post_init__(self) -> None:
        def require(condition: bool, key: str, rule: str) -> None:
            _require(condition, f"embedder.server.{key}", rule, getattr(self, key))

        for name in ("servers", "max_model_len", "limit"):
            require(getattr(self, name) >= 1, name, "1 or more")
        for name in ("n_gpus_per_server", "retries", "backoff_s"):
            require(getattr(self, name) >= 0, name, "0 or more")
        for name in ("startup_s", "timeout_s", "deadline_s"):
            require(getattr(self, name) > 0, name, "a positive number of seconds")
        require(0 < self.gpu_memory_utilization <= 1, "gpu_memory_utilization", "above 0 and at most 1")
        require(all(one.startswith("-") for one in self.extra_args), "extra_args", "a list of --option=value")


@dataclass(frozen=True)
class SentenceConfig:
    """A SentenceTransformer as Embedder, on `n_gpus` of its own.

    `query_prompt` and `target_prompt` name prompts of the model; None: its own for queries and documents, if it has
    them; "": none.
    """

    n_gpus: int = 1
    batch_size: int = 32
    query_prompt: str | None = None
    target_prompt: str | None = None

    def __post_init__(self) -> None:
        _require(self.n_gpus in (0, 1), "embedder.sentence.n_gpus", "0 or 1", self.n_gpus)
        _require(self.batch_size >= 1, "embedder.sentence.batch_size", "1 or more", self.batch_size)


BACKENDS = ("worker", "server", "sentence_transformers")


@dataclass(frozen=True)
class EmbedderConfig:
    """Which Embedder scores the T-CoTs, and how it runs. Token counts are visual tokens unless the name says text.

    `nnodes` x `n_gpus_per_node` devices of its own; 0 = on the actor's (backend worker).
    """

    path: str | None = None
    profile: str = "auto"
    backend: str = "worker"
    strategy: str = "fsdp2"
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    dtype: str = "bfloat16"
    attn_implementation: str = "torch_varlen"
    offload: bool = True
    max_tokens_per_gpu: int = 16384
    max_text_tokens: int = 480
    image_min_tokens: int = 128
    image_max_tokens: int = 768
    frame_min_tokens: int = 128
    frame_max_tokens: int = 300
    nnodes: int = 1
    n_gpus_per_node: int = 0
    server: EmbedderServerConfig = field(default_factory=EmbedderServerConfig)
    sentence: SentenceConfig = field(default_factory=SentenceConfig)
    train: EmbedderTrainConfig = field(default_factory=EmbedderTrainConfig)

    def __post_init__(self) -> None:
        _require(bool(self.path), "embedder.path", "a Hugging Face folder or hub id (set EMBEDDER_PATH)", self.path)
        _require(self.backend in BACKENDS, "embedder.backend", f"one of {', '.join(BACKENDS)}", self.backend)
        _require(
            self.backend == "worker" or not self.train.enable,
            "embedder.backend",
            "worker with train.enable=True: servers and sentence-transformers models do not get trained weights",
            self.backend,
        )
        strategies = ("fsdp2", "fsdp", "megatron")
        _require(self.strategy in strategies, "embedder.strategy", f"one of {', '.join(strategies)}", self.strategy)
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            value = getattr(self, name)
            _require(value >= 1, f"embedder.{name}", "1 or more", value)
            _require(
                value == 1 or self.strategy == "megatron", f"embedder.{name}", "1 without strategy=megatron", value
            )
        _require(
            self.dtype == "bfloat16" or self.strategy != "megatron",
            "embedder.dtype",
            "bfloat16 with strategy=megatron (verl's engine has no other)",
            self.dtype,
        )
        _require(self.dtype in ("bfloat16", "float32"), "embedder.dtype", "bfloat16 or float32", self.dtype)
        for name in ("max_tokens_per_gpu", "max_text_tokens", "image_min_tokens", "frame_min_tokens"):
            _require(getattr(self, name) > 0, f"embedder.{name}", "positive", getattr(self, name))
        _require(self.nnodes >= 1, "embedder.nnodes", "1 or more", self.nnodes)
        _require(self.n_gpus_per_node >= 0, "embedder.n_gpus_per_node", "0 or more", self.n_gpus_per_node)
        for kind in ("image", "frame"):
            low, high = getattr(self, f"{kind}_min_tokens"), getattr(self, f"{kind}_max_tokens")
            _require(low <= high, f"embedder.{kind}_max_tokens", f"at least {kind}_min_tokens ({low})", high)


@dataclass(frozen=True)
class EvidenceConfig:
    """What may be cut from the original media (pixels of the original; method section 2)."""

    max_items: int = 8
    min_side: int = 10
    max_aspect: float = 50.0

    def __post_init__(self) -> None:
        _require(self.max_items >= 0, "evidence.max_items", "0 or more", self.max_items)
        _require(self.min_side >= 1, "evidence.min_side", "1 or more pixels", self.min_side)
        _require(self.max_aspect >= 1, "evidence.max_aspect", "1 or more", self.max_aspect)


@dataclass(frozen=True)
class RewardStageConfig:
    """How the reward stage treats failures, how often it looks at the rollout queue (seconds), and whether each
    prompt's input is also embedded without a T-CoT."""

    max_failed_share: float = 0.1
    poll_interval: float = 0.5
    raw_embeddings: bool = False

    def __post_init__(self) -> None:
        share = self.max_failed_share
        _require(0 <= share < 1, "reward.max_failed_share", "at least 0 and below 1", share)
        _require(0 < self.poll_interval <= 60, "reward.poll_interval", "in (0, 60] seconds", self.poll_interval)


@dataclass(frozen=True)
class JudgeConfig:
    """The listwise judge of the process reward (method section 4, paper eq. 4). It runs where `urls` name servers or
    `reward.reward_model.enable` lets verl start them.
    """

    urls: tuple[str, ...] = ()
    model: str | None = None
    api_key_env: str | None = None
    style: str = "paper"
    images: bool = False
    hard_pairs: int = 4
    shared_lists: bool = True
    constrained: bool = True
    max_tokens: int = 8
    temperature: float = 0.0
    limit: int = 256
    timeout_s: float = 60.0
    retries: int = 3
    backoff_s: float = 0.5
    deadline_s: float = 300.0
    max_unknown_share: float = 0.5
    extra_body: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hard_pairs", "max_tokens", "limit"):
            _require(getattr(self, name) >= 1, f"judge.{name}", "1 or more", getattr(self, name))
        for name in ("temperature", "retries", "backoff_s", "seed"):
            _require(getattr(self, name) >= 0, f"judge.{name}", "0 or more", getattr(self, name))
        for name in ("timeout_s", "deadline_s"):
            _require(getattr(self, name) > 0, f"judge.{name}", "a positive number of seconds", getattr(self, name))
        share = self.max_unknown_share
        _require(0 <= share <= 1, "judge.max_unknown_share", "between 0 and 1", share)


@dataclass(frozen=True)
class RolloutConfig:
    """`request_seeds`: each training rollout is sampled with a seed of its own, made of data.seed, step, pair, side and
    rollout, so that a run that is broken off and resumed goes on with the rollouts it would have had.
    `min_probs_correlation`: below it for two steps a synchronous run stops (`trainer.egrl.PolicyWatch`)."""

    request_seeds: bool = False
    min_probs_correlation: float = 0.9

    def __post_init__(self) -> None:
        value = self.min_probs_correlation
        _require(0 <= value < 1, "rollout.min_probs_correlation", "at least 0 and below 1", value)


@dataclass(frozen=True)
class ValidationConfig:
    """Retrieval metrics of a validation pass: Hit@1 and NDCG@ndcg_k, and whether the best checkpoint is kept."""

    ndcg_k: int = 5
    keep_best: bool = True

    def __post_init__(self) -> None:
        _require(self.ndcg_k >= 1, "validation.ndcg_k", "1 or more", self.ndcg_k)


@dataclass(frozen=True)
class EmbedRLConfig:
    """The whole section `embedrl`."""

    embedder: EmbedderConfig
    evidence: EvidenceConfig = field(default_factory=EvidenceConfig)
    reward: RewardStageConfig = field(default_factory=RewardStageConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


def build_section(cls: type[_T], section: Mapping[str, Any], path: str) -> _T:
    """A frozen dataclass from the plain mapping of a section; sections may hold sections.

    Raises:
        ConfigError: an unknown key, a wrong type, or what the dataclass itself refuses; the message names the key.
    """
    hints = get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(section) - known)
    if unknown:
        raise ConfigError(f"{path} has no key {', '.join(unknown)}; its keys are {', '.join(sorted(known))}")
    values: dict[str, Any] = {}
    for name, value in section.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{path}.{name} must be a section with keys; got {value!r}")
            values[name] = build_section(hint, value, f"{path}.{name}")  # type: ignore[arg-type]
            continue
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if get_origin(hint) is tuple:
            inner = get_args(hint)[0]
            if not isinstance(value, (list, tuple)) or not all(type(one) is inner for one in value):
                raise ConfigError(f"{path}.{name} must be a list of {inner.__name__}; got {value!r}")
            values[name] = tuple(value)
            continue
        if get_origin(hint) is dict:
            inner = get_args(hint)[1]
            if inner is Any and isinstance(value, Mapping):
                values[name] = dict(value)
                continue
            if not isinstance(value, Mapping) or not all(type(one) in (inner, int) for one in value.values()):
                raise ConfigError(f"{path}.{name} must be a section of {inner.__name__} values; got {value!r}")
            values[name] = {str(key): inner(one) for key, one in value.items()}
            continue
        allowed = hint if isinstance(hint, type) else get_args(hint)
        if not isinstance(value, allowed) or (isinstance(value, bool) and hint is not bool):
            raise ConfigError(f"{path}.{name} must be of type {hint}; got {value!r}")
        values[name] = value
    return cls(**values)


def parse_embedrl_section(section: Mapping[str, Any]) -> EmbedRLConfig:
    """Check the plain mapping of the section `embedrl` and return it typed.

    Raises:
        ConfigError: an unknown key, a wrong type or a value outside its range; the message names the key.
    """
    if "embedder" not in section:
        raise ConfigError("embedrl.embedder is missing; set at least embedrl.embedder.path")
    return build_section(EmbedRLConfig, section, "embedrl")
