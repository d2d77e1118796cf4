# SPDX-License-Identifier: Apache-2.0
"""Any sentence-transformers model as frozen Embedder (backend `sentence_transformers`), in a Ray actor of its own.

A model with a profile (`<emb>` in its tokenizer, or `embedrl.embedder.profile`) is given the complete messages of
`build_messages`: the same vectors as the other backends, but for videos in Qwen2.5-VL, where transformers counts
positions otherwise. Any other gets plain input (a text, or messages with media, in the same order) and its own prompts
for queries and documents. A model that takes text only has no vector for a row with media: a run whose data have any is
refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from jinja2 import TemplateError
from PIL import Image

from embedrl_verl.config.schema import EmbedderConfig
from embedrl_verl.data.media import MediaLimits, fit_image
from embedrl_verl.embedder.batching import NOT_FINITE, unit
from embedrl_verl.embedder.gather import Gatherer
from embedrl_verl.embedder.messages import EmbedInput, build_messages
from embedrl_verl.embedder.processor import DTYPES, cut_text, processor_for
from embedrl_verl.embedder.profiles import EMB_TOKEN, EmbedderProfile, load_tokenizer, resolve_profile, token_id
from embedrl_verl.embedder.served.command import media_size
from embedrl_verl.errors import ConfigError, EmbedderError, ResourceError

logger = logging.getLogger(__name__)
ACTOR = "embedrl_sentence_embedder"
PLAIN = EmbedderProfile(name="plain")
FOREIGN_TOKEN_SIDE = 28
"""Pixels of a visual token's side where the limits of the section are applied to a model of another family."""
_ENCODE_ERRORS = (ValueError, TypeError, RuntimeError, KeyError, IndexError, OSError, TemplateError)


@dataclass(frozen=True, eq=False)
class SentenceRow:
    """A row on its way: `messages` are complete, or `inputs` (media fitted) are still to be put in the model's form.

    `processing` are sentence-transformers' processing_kwargs of complete messages: fitted media stay as they are, and
    videos have their frame rate.
    """

    side: str
    messages: list[dict[str, Any]] | None = None
    inputs: EmbedInput | None = None
    processing: dict[str, Any] | None = None

    @property
    def has_video(self) -> bool:
        """Whether the messages hold one."""
        return any(part["type"] == "video" for message in self.messages or [] for part in message["content"])


def has_profile(config: EmbedderConfig) -> bool:
    """Whether the model is prompted by a profile of this package."""
    if config.profile != "auto":
        return bool(resolve_profile(str(config.path), config.profile))
    try:
        tokenizer = load_tokenizer(str(config.path))
    except EmbedderError:  # models of other libraries keep it elsewhere, and have no <emb>
        return False
    return token_id(tokenizer, EMB_TOKEN) is not None


def check_sentence_model(path: str) -> None:
    """Refuse what sentence-transformers would wrap into a model of its own making (mean pooling over anything)."""
    try:
        from sentence_transformers.util import is_sentence_transformer_model
    except ImportError as error:
        raise ConfigError(
            "embedrl.embedder.backend=sentence_transformers needs the package sentence-transformers; install it"
        ) from error
    try:
        found = is_sentence_transformer_model(path)
    except OSError as error:
        raise ConfigError(f"embedrl.embedder.path={path} cannot be read: {error}") from error
    if not found:
        raise ConfigError(
            f"embedrl.embedder.path={path} is not a sentence-transformers model: it has no modules.json. Use "
            "embedrl.embedder.backend=worker, or `embedrl export`, which writes one"
        )


def refuse_media(dataset: Any, modalities: Sequence[str], *, images: bool, videos: bool, path: str) -> None:
    """Refuse a `TCoTDataset` with media that the model does not take beside text; `modalities`: what it takes."""
    for index in range(len(dataset)):
        row = dataset[index]
        item = row["embedrl_item"]
        kind = "images" if item["images"] and not images else "a video" if item["video"] and not videos else None
        if kind:
            raise ConfigError(
                f"the sentence-transformers model {path} takes {', '.join(modalities)}, and {row['embedrl_row']} "
                f"({row['embedrl_side']}) has {kind}. Use a model that reads them, or data of text only"
            )


class SentenceModel:
    """The model of the section `embedrl.embedder` on a torch device, and how a row is put to it."""

    def __init__(self, config: EmbedderConfig, device: str) -> None:
        check_sentence_model(str(config.path))
        from sentence_transformers import SentenceTransformer

        options: dict[str, Any] = {"trust_remote_code": False, "model_kwargs": {"dtype": DTYPES[config.dtype]}}
        try:
            self.model = SentenceTransformer(str(config.path), device=device, **options)
        except _ENCODE_ERRORS as error:
            raise EmbedderError(
                f"{config.path}: not a sentence-transformers model that can be loaded: {error}"
            ) from error
        self._batch_size, self._max_text_tokens = config.sentence.batch_size, config.max_text_tokens
        self._prompts = {"query": config.sentence.query_prompt, "target": config.sentence.target_prompt}
        for side, name in self._prompts.items():
            if name and name not in self.model.prompts:
                raise ConfigError(
                    f"embedrl.embedder.sentence.{side}_prompt must be one of the model's prompts "
                    f"({', '.join(self.model.prompts) or 'it has none'}), '' or null; got {name!r}"
                )

    @property
    def modalities(self) -> list[str]:
        """What the model takes, as sentence-transformers names it."""
        return [str(one) for one in self.model.modalities]

    def takes(self, *kinds: str) -> bool:
        """Whether one input can hold text and these kinds ("image", "video")."""
        return not kinds or bool(self.model.supports(("text", *kinds)))

    def embed(self, rows: Sequence[SentenceRow]) -> list[torch.Tensor | EmbedderError]:
        """A float32 vector (D,) of length 1 for each row, or why there is none."""
        results: dict[int, torch.Tensor | EmbedderError] = {}
        groups: dict[Any, list[int]] = defaultdict(list)
        inputs: dict[int, Any] = {}
        for i, row in enumerate(rows):
            try:
                inputs[i] = self._input_of(row)
            except EmbedderError as error:
                results[i] = error
                continue
            # Metadata of videos is given for a whole call, so a row with one is a call of its own.
            groups[(row.side, i if row.has_video else None)].append(i)
        for members in groups.values():
            vectors = self._encode([inputs[i] for i in members], rows[members[0]])
            results.update(zip(members, vectors, strict=True))
        return [results[i] for i in range(len(rows))]

    def _input_of(self, row: SentenceRow) -> Any:
        """What `encode` is given; EmbedderError for media that the model does not take, or a too long T-CoT."""
        if row.messages is not None:
            return row.messages
        assert row.inputs is not None
        item = row.inputs.item
        kinds = ["image"] * bool(item.images or row.inputs.evidence) + ["video"] * bool(item.frames)
        if not self.takes(*kinds):
            raise EmbedderError(
                f"the sentence-transformers model takes {', '.join(self.modalities)}; the row has {kinds}"
            )
        messages = self._fitting_messages(row.inputs)
        if kinds:
            content = [{k: v for k, v in part.items() if k != "times"} for part in messages[0]["content"]]
            return [dict(messages[0], content=content)]
        # A bare string could be taken for the address of a picture.
        return {"text": _text_of(messages)}

    def _fitting_messages(self, inputs: EmbedInput) -> list[dict[str, Any]]:
        """The item's text is within `max_text_tokens`, and short enough for the T-CoT to be read too."""
        tokenizer, limit = self.model.tokenizer, self.model.max_seq_length

        def count(text: str, **options: Any) -> int:
            return len(tokenizer(text, **options)["input_ids"])

        def messages_with(text: str) -> list[dict[str, Any]]:
            item = replace(inputs.item, text=text)
            return build_messages(item, inputs.tcot, inputs.evidence, profile=PLAIN)

        text = cut_text(tokenizer, inputs.item.text, self._max_text_tokens)
        messages = messages_with(text)
        if limit is None:
            return messages
        longest_prompt = max((count(prompt) for prompt in self.model.prompts.values() if prompt), default=0)
        excess = count(_text_of(messages), truncation=False) + longest_prompt - limit
        if excess <= 0:
            return messages
        kept = max(count(text, add_special_tokens=False) - excess - 1, 0)
        messages = messages_with(cut_text(tokenizer, text, kept))
        if count(_text_of(messages), truncation=False) + longest_prompt > limit:
            raise EmbedderError(f"instruction and T-CoT are longer than the {limit} tokens that the model reads")
        return messages

    def _encode(self, inputs: list[Any], first: SentenceRow) -> list[torch.Tensor | EmbedderError]:
        """Of inputs of one side; `first` is the row of the first one."""
        options: dict[str, Any] = {}
        name = self._prompts[first.side]
        if first.messages is not None or name == "":
            options["prompt"] = ""
        elif name is not None:
            options["prompt_name"] = name
        if first.processing is not None:
            options["processing_kwargs"] = first.processing
        encode = self.model.encode_query if first.side == "query" else self.model.encode_document
        try:
            vectors = encode(
                inputs, batch_size=self._batch_size, convert_to_tensor=True, show_progress_bar=False, **options
            )
        except _ENCODE_ERRORS as error:
            if len(inputs) == 1:
                logger.warning("a row has no vector: %s", error)
                return [EmbedderError(f"the sentence-transformers model: {type(error).__name__}")]
            return [self._encode([one], first)[0] for one in inputs]  # one bad row must not take the others along
        return [one if one.isfinite().all() else EmbedderError(NOT_FINITE) for one in unit(vectors.cpu())]


def _text_of(messages: Sequence[dict[str, Any]]) -> str:
    return "\n".join(part["text"] for message in messages for part in message["content"] if part["type"] == "text")


class _SentenceActor:
    """Embeds rows that arrive one by one, at most `batch_size` at a time, while rollouts still run."""

    def __init__(self, config: EmbedderConfig) -> None:
        on_gpu = config.sentence.n_gpus > 0 and torch.cuda.is_available()
        self._model = SentenceModel(config, "cuda" if on_gpu else "cpu")
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._embed: Gatherer[SentenceRow, torch.Tensor] = Gatherer(self._batch, most=config.sentence.batch_size)

    async def takes(self) -> tuple[list[str], bool, bool]:
        """What the model takes, and whether text with images, and with a video."""
        return self._model.modalities, self._model.takes("image"), self._model.takes("video")

    async def embed(self, row: SentenceRow) -> tuple[Any, str | None]:
        """The row's vector as numpy float32 (D,), or None and why."""
        try:
            return (await self._embed(row)).numpy(), None
        except EmbedderError as error:
            return None, str(error)

    async def _batch(self, rows: list[SentenceRow]) -> list[torch.Tensor | EmbedderError]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._model.embed, rows)


def start_sentence_actor(config: EmbedderConfig) -> Any:
    """The run's actor, loading its model; it ends with the process that started it."""
    wanted, free = config.sentence.n_gpus, ray.available_resources().get("GPU", 0.0)
    if free < wanted:
        raise ResourceError(
            f"the sentence-transformers model asks for {wanted} GPU (embedrl.embedder.sentence.n_gpus); the cluster "
            f"has {free:g} left; set it to 0, or add a GPU"
        )
    return (
        ray.remote(_SentenceActor)
        .options(name=ACTOR, num_cpus=1, num_gpus=wanted, max_concurrency=4096, max_restarts=3, max_task_retries=3)
        .remote(config)
    )


class SentenceClient:
    """The agent loop's side: fits a row's media, and asks the actor of the run."""

    def __init__(self, config: EmbedderConfig, *, max_frames: int) -> None:
        self._processor = processor_for(config, max_frames=max_frames) if has_profile(config) else None
        self._limits = MediaLimits.of(config, FOREIGN_TOKEN_SIDE, max_frames)
        self._actor: Any = None

    def prepare(self, inputs: EmbedInput, side: str) -> SentenceRow:
        """The row as the actor takes it; blocks."""
        if self._processor is None:
            return SentenceRow(side, inputs=_fitted(inputs, self._limits))
        prepared, _, _ = self._processor.fit(inputs)
        messages = [
            dict(message, content=[_frames_as_images(part) for part in message["content"]])
            for message in prepared.messages
        ]
        messages[0]["fitted"] = True  # the exported template need not fear that its end is cut off
        size = {"size": media_size(self._processor)}
        video = dict(size, do_sample_frames=False)
        if prepared.videos:
            video["video_metadata"] = [times.metadata() for _, times in prepared.videos]
        return SentenceRow(side, messages=messages, processing={"image": size, "video": video})

    async def embed(self, row: SentenceRow) -> torch.Tensor:
        """float32 (D,), length 1; EmbedderError if the model has none for the row, or its process has ended."""
        if self._actor is None:
            self._actor = ray.get_actor(ACTOR)
        try:
            vector, reason = await self._actor.embed.remote(row)
        except ray.exceptions.RayError as error:
            logger.warning("a row has no vector: %s", error)
            raise EmbedderError(f"the sentence-transformers process: {type(error).__name__}") from error
        if vector is None:
            raise EmbedderError(reason)
        return torch.tensor(vector)


def _fitted(inputs: EmbedInput, limits: MediaLimits) -> EmbedInput:
    item = replace(
        inputs.item,
        images=tuple(fit_image(image, limits) for image in inputs.item.images),
        frames=tuple(fit_image(frame, limits, is_frame=True) for frame in inputs.item.frames),
    )
    return replace(inputs, item=item, evidence=tuple(fit_image(image, limits) for image in inputs.evidence))


def _frames_as_images(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "video":
        return part
    return dict(part, video=[Image.fromarray(frame) for frame in part["video"]])
