# SPDX-License-Identifier: Apache-2.0
"""A Reasoner in this process, by transformers: prompts exactly as in training, token rows, and greedy T-CoTs.

Prompts are those that the RL data set and its agent loop make (a test compares them id by id).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from embedrl_verl.config.schema import MediaConfig
from embedrl_verl.data.media import MediaLimits
from embedrl_verl.data.prompts import load_prompt_media
from embedrl_verl.data.video import FrameTimes
from embedrl_verl.embedder.batching import pad_rows
from embedrl_verl.embedder.expand import PromptExpander
from embedrl_verl.embedder.positions import time_steps_a_second
from embedrl_verl.embedder.processor import Encoded
from embedrl_verl.errors import ConfigError, EmbedderError
from embedrl_verl.export.record import TrainingRecord, write_record
from embedrl_verl.families import family_of, token_side
from embedrl_verl.model.tcots import FAILURES, Ask, Written
from embedrl_verl.tcot import build_prompt

BATCH_SIZE = 32


class Reasoner:
    """A complete Qwen-VL folder of any family with its processor.

    Args:
        path: Hugging Face folder or hub id.
        media: how it is asked (`data.embedrl`); its family must be auto or the model's own.
        max_new_tokens: longest T-CoT (`data.max_response_length`).
        batch_size: prompts that are answered at once.
        dtype, device: of the model.
    """

    def __init__(
        self,
        path: str | Path,
        media: MediaConfig,
        *,
        max_new_tokens: int,
        batch_size: int = BATCH_SIZE,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        try:
            model, report = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, output_loading_info=True)
            self.processor: Any = AutoProcessor.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} must be a Reasoner's folder or hub id; it cannot be loaded: {error}") from error
        if missing := report["missing_keys"]:
            raise ConfigError(f"{path} must hold a complete checkpoint; {len(missing)} weights are missing")
        self.model: PreTrainedModel = model.to(device).eval()
        self.family = family_of(self.model.config.model_type)
        if media.family not in ("auto", self.family):
            raise ConfigError(f"data.embedrl.family must be auto or {self.family}, of {path}; got {media.family}")
        self.media, self.max_new_tokens, self.batch_size = media, max_new_tokens, batch_size
        self._lock = threading.Lock()  # `write` may be called by several threads; one computes
        self.limits = MediaLimits.of(media, token_side(self.family), media.max_frames)
        self._expander = PromptExpander(self.processor, self.family, time_steps_a_second(self.model.config))

    def save(self, path: str | Path) -> None:
        """Write model, processor and how it is asked as one folder."""
        self.model.save_pretrained(path)
        self.processor.save_pretrained(path)
        settings = asdict(self.media) | {"family": self.family, "max_response_length": self.max_new_tokens}
        write_record(Path(path), TrainingRecord(stage="cold start", settings=settings))

    def encode(self, ask: Ask, response: str = "") -> Encoded:
        """Token row of a prompt, followed by `response`."""
        return self._encode(ask, response)[0]

    def _encode(self, ask: Ask, response: str = "") -> tuple[Encoded, tuple[tuple[int, int], ...]]:
        """The row, and (width, height) of the images as the Reasoner sees them."""
        style, few_shot = self.media.prompt_style, self.media.few_shot
        messages = build_prompt(*ask, family=self.family, style=style, few_shot=few_shot)
        images, videos = load_prompt_media(messages, self.limits, None)
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) + response
        clips = [
            (frames_TCHW.permute(0, 2, 3, 1).contiguous().numpy(), FrameTimes.of(metadata))
            for frames_TCHW, metadata in videos or ()
        ]
        tokens, positions = self._expander.tokens(text, images or (), clips)
        row = Encoded(tokens, positions, self._expander.pixels(images or (), clips))
        return row, tuple(image.size for image in images or ())

    def write(self, asks: Sequence[Ask]) -> list[Written]:
        """Greedy T-CoTs of inputs, in their order; a `Written` with a problem for an input that cannot be read."""
        found: dict[int, Written] = {}
        rows: dict[int, tuple[Encoded, tuple[tuple[int, int], ...]]] = {}
        for number, ask in enumerate(asks):
            try:
                rows[number] = self._encode(ask)
                self._check_length(rows[number][0])
            except FAILURES as error:
                rows.pop(number, None)
                found[number] = Written(None, problem=str(error))
        order = list(rows)
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            with self._lock:
                written = self._answer([rows[one][0] for one in chunk])
            for number, (text, length) in zip(chunk, written, strict=True):
                found[number] = Written(text, rows[number][1], tokens=length)
        return [found[number] for number in range(len(asks))]

    def _check_length(self, row: Encoded) -> None:
        """EmbedderError if the model has no positions for a prompt and its answer: one text of megabytes would hold up
        all others for hours, and the answer would mean nothing."""
        most = self.model.config.get_text_config().max_position_embeddings - self.max_new_tokens
        if (length := int(row.position_ids.max()) + 1) > most:
            raise EmbedderError(f"a prompt of the Reasoner may have {most} positions; this one has {length}")

    @torch.no_grad()
    def _answer(self, rows: Sequence[Encoded]) -> list[tuple[str, int]]:
        """Greedy T-CoTs of the rows of prompts, all in one batch, and their tokens with the one that ends them."""
        config, tokenizer, device = self.model.config, self.processor.tokenizer, self.model.device
        ids = _pad_left([row.input_ids for row in rows], tokenizer.pad_token_id).to(device)
        media = {name: value.to(device) for name, value in pad_rows(rows).media.items()}
        tokens = self.model.generate(
            input_ids=ids,
            attention_mask=_pad_left([torch.ones_like(row.input_ids) for row in rows]).to(device),
            # transformers' own positions of clips are others than the rollout's
            position_ids=_pad_left([row.position_ids.T for row in rows]).permute(2, 0, 1).to(device),
            mm_token_type_ids=(ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long(),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            **media,
        )
        new = tokens[:, ids.shape[1] :]
        ends = torch.isin(new, torch.tensor(self.model.generation_config.eos_token_id, device=device))
        lengths = (ends.cumsum(1) - ends.long() == 0).sum(1)  # padding stands after the first end
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        return list(zip(texts, lengths.tolist(), strict=True))


def _pad_left(rows: Sequence[torch.Tensor], value: int = 0) -> torch.Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side="left")
