# SPDX-License-Identifier: Apache-2.0
"""Any sentence-transformers model as frozen Embedder (backend `sentence_transformers`): how rows are put to it.

A model with a profile (`<emb>` in its tokenizer, or `embedrl.embedder.profile`) is given the complete messages of
`build_messages`: the same vectors as the other backends, but for videos in Qwen2.5-VL, where transformers counts
positions otherwise. Any other gets plain input (a text, or messages with media, in the same order) and its own prompts
for queries and documents. A model that takes text only has no vector for a row with media: a run whose data have any is
refused.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jinja2 import TemplateError

from embedrl_verl.config.schema import EmbedderConfig
from embedrl_verl.embedder.messages import EmbedInput, build_messages
from embedrl_verl.embedder.processor import cut_text
from embedrl_verl.embedder.profiles import EMB_TOKEN, PROFILES, EmbedderProfile, load_tokenizer, token_id
from embedrl_verl.embedder.settings import DTYPES
from embedrl_verl.errors import ConfigError, EmbedderError

logger = logging.getLogger(__name__)
PLAIN = EmbedderProfile(name="plain")
NOT_FINITE = "the sentence-transformers model gave a vector that is not finite or has no direction"
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
    """Whether the model is prompted by a profile of this package.

    Raises:
        EmbedderError: no such profile.
    """
    if config.profile != "auto":
        if config.profile not in PROFILES:
            raise EmbedderError(
                f"embedder profile must be auto or one of {', '.join(PROFILES)}; got {config.profile!r}"
            )
        return True
    try:
        tokenizer = load_tokenizer(str(config.path))
    except EmbedderError:  # models of other libraries keep it elsewhere, and have no <emb>
        return False
    return token_id(tokenizer, EMB_TOKEN) is not None


def check_sentence_model(path: str) -> None:
    """Refuse what sentence-transformers would wrap into a model of its own making (mean pooling over anything).

    Raises:
        ConfigError: sentence-transformers is not installed, or `path` holds no model of it.
    """
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


class SentenceModel:
    """The model and how a row is put to it.

    Args:
        config: the section `embedrl.embedder`.
        device: torch device.

    Raises:
        ConfigError: as `check_sentence_model`; or the model has no prompt of a name that the section gives.
        EmbedderError: the model cannot be loaded.
    """

    def __init__(self, config: EmbedderConfig, device: str) -> None:
        check_sentence_model(str(config.path))
        from sentence_transformers import SentenceTransformer

        try:
            self.model = SentenceTransformer(
                str(config.path),
                device=device,
                trust_remote_code=False,
                model_kwargs={"dtype": DTYPES[config.dtype]},
            )
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

    def embed(self, rows: Sequence[SentenceRow]) -> list[torch.Tensor | str]:
        """A float32 vector (D,) of length 1 for each row, or why there is none."""
        results: list[torch.Tensor | str] = [""] * len(rows)
        groups: dict[Any, list[int]] = defaultdict(list)
        inputs: dict[int, Any] = {}
        for i, row in enumerate(rows):
            try:
                inputs[i] = self.input_of(row)
            except EmbedderError as error:
                results[i] = str(error)
                continue
            # Metadata of videos is given for a whole call, so a row with one is a call of its own.
            groups[(row.side, i if row.has_video else None)].append(i)
        for (side, _), members in groups.items():
            vectors = self._encode([inputs[i] for i in members], side, rows[members[0]])
            for i, vector in zip(members, vectors, strict=True):
                results[i] = vector
        return results

    def input_of(self, row: SentenceRow) -> Any:
        """What `encode` is given.

        Raises:
            EmbedderError: media that the model does not take, or a T-CoT longer than the model reads.
        """
        if row.messages is not None:
            return row.messages
        assert row.inputs is not None
        item = row.inputs.item
        kinds = ["image"] * bool(item.images or row.inputs.evidence) + ["video"] * bool(item.frames)
        if not self.takes(*kinds):
            raise EmbedderError(
                f"the sentence-transformers model takes {', '.join(self.modalities)}; the row has {kinds}"
            )
        inputs = self._cut(row.inputs)
        messages = build_messages(inputs.item, inputs.tcot, inputs.evidence, profile=PLAIN)
        if kinds:
            content = [{k: v for k, v in part.items() if k != "times"} for part in messages[0]["content"]]
            return [dict(messages[0], content=content)]
        # A bare string could be taken for the address of a picture.
        return {"text": _text_of(messages)}

    def _cut(self, inputs: EmbedInput) -> EmbedInput:
        """Item text within `max_text_tokens`, and short enough for the T-CoT to be read too."""
        tokenizer, limit = self.model.tokenizer, self.model.max_seq_length
        item = replace(inputs.item, text=cut_text(tokenizer, inputs.item.text, self._max_text_tokens))
        if limit is None:
            return replace(inputs, item=item)
        longest = max(
            (len(tokenizer(prompt)["input_ids"]) for prompt in self.model.prompts.values() if prompt), default=0
        )

        def tokens(one: Any) -> int:
            text = _text_of(build_messages(one, inputs.tcot, inputs.evidence, profile=PLAIN))
            return len(tokenizer(text, truncation=False)["input_ids"]) + longest

        excess = tokens(item) - limit
        if excess > 0:
            kept = max(len(tokenizer(item.text, add_special_tokens=False)["input_ids"]) - excess - 1, 0)
            item = replace(item, text=cut_text(tokenizer, item.text, kept))
            if tokens(item) > limit:
                raise EmbedderError(f"instruction and T-CoT are longer than the {limit} tokens that the model reads")
        return replace(inputs, item=item)

    def _encode(self, inputs: list[Any], side: str, first: SentenceRow) -> list[torch.Tensor | str]:
        options: dict[str, Any] = {}
        name = self._prompts[side]
        if first.messages is not None or name == "":
            options["prompt"] = ""
        elif name is not None:
            options["prompt_name"] = name
        if first.processing is not None:
            options["processing_kwargs"] = first.processing
        encode = self.model.encode_query if side == "query" else self.model.encode_document
        try:
            vectors = encode(
                inputs, batch_size=self._batch_size, convert_to_tensor=True, show_progress_bar=False, **options
            )
        except _ENCODE_ERRORS as error:
            if len(inputs) == 1:
                logger.warning("a row has no vector: %s", error)
                return [f"the sentence-transformers model: {type(error).__name__}"]
            return [self._encode([one], side, first)[0] for one in inputs]  # one bad row must not take the others along
        return [_unit(vector) for vector in vectors.float().cpu()]


def _text_of(messages: Sequence[dict[str, Any]]) -> str:
    return "\n".join(part["text"] for message in messages for part in message["content"] if part["type"] == "text")


def _unit(vector: torch.Tensor) -> torch.Tensor | str:
    length = vector.norm().item()
    return vector / length if 0 < length < float("inf") else NOT_FINITE
