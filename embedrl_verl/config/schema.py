# SPDX-License-Identifier: Apache-2.0
"""The sections `embedrl`, `data.embedrl` and stage 1's `data` and `contrastive` as frozen, checked values.

Here are types, ranges, and what excludes what within a section; an unknown key is an error. The defaults, with what
each key means, stand in egrl_trainer.yaml and embedder_trainer.yaml alone: a key that is not given is filled in from
there. Imports nothing heavy, so that every room may import it. What must fit across sections is in `rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs
from typing_extensions import Self

from embedrl_verl.errors import ConfigError
from embedrl_verl.families import FAMILIES, FAMILY_OF_MODEL_TYPE

_T = TypeVar("_T")
_S = TypeVar("_S", bound="Section")
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_checked: Callable[[type[_S]], type[_S]] = dataclass(frozen=True, kw_only=True, config=_STRICT)  # type: ignore[assignment]
_WORDS = {"tuple_type": "must be a list", "bool_type": "must be True or False", "dict_type": "must be a section"}

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
FractionBelow1 = Annotated[float, Field(ge=0, lt=1)]
# YAML and hydra give lists.
_as_tuple = BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else given)
Listed: TypeAlias = Annotated[tuple[_T, ...], _as_tuple]
Rule: TypeAlias = tuple[str, bool, str]


def _named(what: str) -> BeforeValidator:
    def check(given: object) -> object:
        if given is None or given in ("", [], ()):
            raise ValueError(f"must be {what}")
        return given

    return BeforeValidator(check)


@cache
def yaml_of(name: str) -> dict[str, Any]:
    """A file of this folder as it is written: no interpolation, no defaults list."""
    values: dict[str, Any] = yaml.safe_load(files("embedrl_verl.config").joinpath(f"{name}.yaml").read_text("utf-8"))
    return values


@_checked
class Section:
    """A section of the configuration. Called with some of its keys, it has the YAML's values for the others."""

    where: ClassVar[str]
    file: ClassVar[str]

    if TYPE_CHECKING:  # the keys are checked when it is called

        def __init__(self, **values: Any) -> None: ...

        __dataclass_fields__: ClassVar[dict[str, Any]]

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        found = yaml_of(cls.file)
        for key in cls.where.split("."):
            found = found[key]
        return {field.name: found[field.name] for field in fields(cls) if field.name in found}

    @model_validator(mode="wrap")
    @classmethod
    def _fill_in(cls, given: Any, make: Callable[[Any], Self]) -> Self:
        if isinstance(given, cls):
            return given
        if isinstance(given, Mapping):
            return cls(**given)
        if not isinstance(given, ArgsKwargs):
            raise ConfigError(f"{cls.where} must be a section with keys; got {given!r}")
        named, keys = given.kwargs or {}, [field.name for field in fields(cls)]
        unknown = [key for key in named if key not in keys]
        if unknown:
            raise ConfigError(f"{cls.where} has no key {', '.join(unknown)}; its keys are {', '.join(keys)}")
        try:
            return make(ArgsKwargs(given.args, {**cls._defaults(), **named}))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join([cls.where, *map(str, first["loc"])])
            words = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
            rule = _WORDS.get(first["type"], words)
            raise ConfigError(f"{key} {rule}; got {first['input']!r}") from None

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        for key, holds, rule in self.rules():
            if not holds:
                raise ConfigError(f"{self.where}.{key} must be {rule}; got {getattr(self, key)!r}")
        return self

    def rules(self) -> list[Rule]:
        """(key, whether its value holds beside the others, what it must be)."""
        return []


def section(where: str, file: str = "egrl_trainer") -> Callable[[type[_S]], type[_S]]:
    """A class decorator: the section at `where`, whose defaults stand in `file`."""

    def make(cls: type[_S]) -> type[_S]:
        cls.where, cls.file = where, file
        return _checked(cls)

    return make


@section("embedrl.embedder.train")
class EmbedderTrainConfig(Section):
    """How the Embedder is trained: in stage 1, and in EG-RL if `enable` is set (method section 5)."""

    enable: bool
    every: Count
    rollouts: Literal["best", "random", "all"]
    lr: Positive
    lr_scheduler: Literal["constant", "cosine"]
    min_lr_ratio: Fraction
    warmup_steps: Natural
    weight_decay: NonNegative
    clip_grad: Positive
    temperature: Positive
    symmetric: bool
    matryoshka_dims: Listed[Count]
    lora_rank: Natural
    lora_alpha: Natural
    lora_target_modules: str
    lora_exclude_modules: str
    lora_adapter_path: str | None
    gradient_checkpointing: bool
    max_tokens_per_gpu: Count
    ema_decay: FractionBelow1
    anchor_files: Listed[str]
    anchor_pairs: Count
    max_anchor_drop: Fraction
    seed: Natural

    def loss_options(self) -> dict[str, Any]:
        """What the contrastive loss takes of this section."""
        names = ("temperature", "symmetric", "matryoshka_dims")
        return {name: getattr(self, name) for name in names}

    def rules(self) -> list[Rule]:
        return [
            ("lora_alpha", self.lora_alpha > 0 or not self.lora_rank, "positive with a lora_rank"),
            ("lora_rank", self.lora_rank > 0 or not self.lora_adapter_path, "the adapter's rank, with a path"),
        ]


@_checked
class Requests(Section):
    urls: Listed[str]
    api_key_env: str | None
    limit: Count
    timeout_s: Positive
    retries: Natural
    backoff_s: NonNegative
    deadline_s: Positive


@section("embedrl.embedder.server")
class EmbedderServerConfig(Requests):
    """Stock vLLM pooling servers: those at `urls`, or without any `servers` that the run starts."""

    servers: Count
    n_gpus_per_server: Natural
    max_model_len: Count
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)]
    startup_s: Positive
    extra_args: Listed[str]

    def rules(self) -> list[Rule]:
        options = all(one.startswith("-") for one in self.extra_args)
        return [("extra_args", options, "a list of --option=value")]


@section("embedrl.embedder.sentence")
class SentenceConfig(Section):
    n_gpus: Annotated[int, Field(ge=0, le=1)]
    batch_size: Count
    query_prompt: str | None
    target_prompt: str | None


@_checked
class MediaTokens(Section):
    image_min_tokens: Count
    image_max_tokens: Count
    frame_min_tokens: Count
    frame_max_tokens: Count

    def rules(self) -> list[Rule]:
        image, frame = self.image_min_tokens, self.frame_min_tokens
        return [
            ("image_max_tokens", self.image_max_tokens >= image, f"at least image_min_tokens ({image})"),
            ("frame_max_tokens", self.frame_max_tokens >= frame, f"at least frame_min_tokens ({frame})"),
        ]


@section("embedrl.embedder")
class EmbedderConfig(MediaTokens):
    path: Annotated[str, _named("a Hugging Face folder or hub id (set EMBEDDER_PATH)")]
    profile: str
    backend: Literal["worker", "server", "sentence_transformers"]
    strategy: Literal["fsdp2", "fsdp", "megatron"]
    tensor_model_parallel_size: Count
    pipeline_model_parallel_size: Count
    dtype: Literal["bfloat16", "float32"]
    attn_implementation: str
    offload: bool
    max_tokens_per_gpu: Count
    max_text_tokens: Count
    nnodes: Count
    n_gpus_per_node: Natural
    server: EmbedderServerConfig
    sentence: SentenceConfig
    train: EmbedderTrainConfig

    def rules(self) -> list[Rule]:
        megatron = self.strategy == "megatron"
        return [
            *super().rules(),
            (
                "backend",
                self.backend == "worker" or not self.train.enable,
                "worker with train.enable=True: servers and sentence-transformers models do not get trained weights",
            ),
            *(
                (key, megatron or getattr(self, key) == 1, "1 without strategy=megatron")
                for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size")
            ),
            (
                "strategy",
                not (megatron and self.train.enable and (self.train.lora_rank or self.train.ema_decay)),
                "fsdp2 with train.lora_rank or train.ema_decay: megatron trains all weights and keeps no average",
            ),
            (
                "dtype",
                self.dtype == "bfloat16" or not megatron,
                "bfloat16 with strategy=megatron (verl's engine has no other)",
            ),
        ]


@section("embedrl.evidence")
class EvidenceConfig(Section):
    """What may be cut from the original media (pixels of the original; method section 2)."""

    max_items: Natural
    min_side: Count
    max_aspect: Annotated[float, Field(ge=1)]


@section("embedrl.reward")
class RewardStageConfig(Section):
    max_failed_share: FractionBelow1
    poll_interval: Annotated[float, Field(gt=0, le=60)]
    raw_embeddings: bool


@section("embedrl.judge")
class JudgeConfig(Requests):
    """The listwise judge of the process reward (method section 4, paper eq. 4)."""

    model: str | None
    style: Literal["paper", "compact"]
    images: bool
    hard_pairs: Count
    shared_lists: bool
    constrained: bool
    max_tokens: Count
    temperature: NonNegative
    max_unknown_share: Fraction
    extra_body: dict[str, Any]
    seed: Natural

    def rules(self) -> list[Rule]:
        ours = ("model", "messages", "max_tokens", "temperature", "structured_outputs")
        named = self.model is None or bool(self.model.strip())
        without = f"without {', '.join(ours)}, which have keys of their own or none"
        return [
            ("model", named, "a name, or null to ask the server"),
            ("extra_body", not set(self.extra_body) & set(ours), without),
        ]


@section("embedrl.rollout")
class RolloutConfig(Section):
    request_seeds: bool
    min_probs_correlation: FractionBelow1


@section("embedrl.validation")
class ValidationConfig(Section):
    ndcg_k: Count
    keep_best: bool
    case_images: Natural


@section("embedrl")
class EmbedRLConfig(Section):
    embedder: EmbedderConfig
    evidence: EvidenceConfig
    reward: RewardStageConfig
    judge: JudgeConfig
    rollout: RolloutConfig
    validation: ValidationConfig


@section("data.embedrl")
class MediaConfig(MediaTokens):
    family: str
    prompt_style: Literal["paper", "compact"]
    few_shot: bool
    max_frames: Count
    pairs_together: Count

    @classmethod
    def from_config(cls, data_config: Mapping[str, Any]) -> Self:
        """Of verl's section `data` (a dict or DictConfig); without `embedrl` the defaults."""
        return cls(**dict(data_config.get("embedrl") or {}))

    def rules(self) -> list[Rule]:
        known = self.family == "auto" or self.family in FAMILY_OF_MODEL_TYPE
        return [*super().rules(), ("family", known, f"auto or one of {', '.join(FAMILIES)}")]


@section("data", "embedder_trainer")
class Stage1DataConfig(Section):
    train_files: Annotated[Listed[str], _named("one or more parquet files of pair records")]
    val_files: Listed[str]
    media_root: str | None
    tcot: bool


@section("contrastive", "embedder_trainer")
class ContrastiveConfig(Section):
    out: Annotated[str, _named("a folder to write to")]
    batch_pairs: Annotated[int, Field(ge=2)]  # a pair alone has no negatives
    sub_batch_pairs: Count
    max_video_sub_batches: Count
    source_weights: dict[str, Positive]
    raw_share: Fraction
    epochs: Count
    total_steps: Count | None
    test_freq: Natural
    save_freq: Natural
    keep_checkpoints: Count
    log_freq: Count
    num_workers: Natural
    seed: Natural
    resume: bool
    max_empty_batches: Count

    def rules(self) -> list[Rule]:
        divides = self.batch_pairs % self.sub_batch_pairs == 0
        return [("batch_pairs", divides, f"a multiple of sub_batch_pairs ({self.sub_batch_pairs})")]


def parse_embedrl_section(section: Mapping[str, Any]) -> EmbedRLConfig:
    """The plain mapping of the section `embedrl`, checked and typed; ConfigError names the key, the rule, the value."""
    return EmbedRLConfig(**section)
