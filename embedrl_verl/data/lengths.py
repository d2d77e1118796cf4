# SPDX-License-Identifier: Apache-2.0
"""Prompt length in tokens, counted with the code that the rollout runs.

verl's agent loop renders a prompt with its "continuous token" builder; this is the same builder on the same fitted
media. On the way it proves that the processor leaves fitted media as they are: if its own size limits were narrower
than ours, the model would see other pixels than those that box coordinates and token limits speak of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from PIL import Image
from verl.utils.tokenizer.chat_template import apply_chat_template
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

from embedrl_verl.data.prompts import Messages, VideoInput
from embedrl_verl.errors import ConfigError
from embedrl_verl.families import Family, resolve_family


class PromptMeter:
    """Counts prompt tokens for one tokenizer and processor. Safe to call from several threads.

    Pixels do not change a count, so prompts with the same words, sizes of media and frame times are measured once.
    """

    def __init__(self, tokenizer: Any, processor: Any, family: Family, data_config: Mapping[str, Any]) -> None:
        self.tokenizer, self.family = tokenizer, family
        self._patch = processor.image_processor.patch_size
        self._builder = create_continuous_token_builder(
            tokenizer,
            hf_model_type=family,
            chat_template_kwargs=dict(data_config.get("apply_chat_template_kwargs") or {}),
            mm_processor_kwargs=dict(data_config.get("mm_processor_kwargs") or {}),
            processor=processor,
        )
        self._counted: dict[bytes, int] = {}
        parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, processor.image_processor.to_dict()]
        parts += [processor.chat_template, processor.video_processor.to_dict()]
        parts += [data_config.get(name) for name in ("apply_chat_template_kwargs", "mm_processor_kwargs")]
        parts += [version(name) for name in ("verl", "transformers")]
        self.identity = hashlib.sha256(repr(parts).encode()).hexdigest()

    @classmethod
    def from_pretrained(cls, path: str, family: str) -> PromptMeter:
        """Load the tokenizer and the image processor of a Reasoner, no weights, for a command's `--tokenizer`.

        `family`: of the Reasoner, or "auto".
        """
        from verl.utils.tokenizer import hf_processor, hf_tokenizer  # heavy

        try:
            tokenizer, processor = hf_tokenizer(path), hf_processor(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--tokenizer {path}: cannot be loaded ({str(error).splitlines()[0]})") from error
        if processor is None:
            raise ConfigError(f"--tokenizer {path}: the folder has no image processor; name a Qwen-VL model's folder")
        return cls(tokenizer, processor, resolve_family(family, processor), {})

    def count(
        self, messages: Messages, images: Sequence[Image.Image] | None, videos: Sequence[VideoInput] | None
    ) -> int:
        """Tokens of the prompt with its media expanded, generation prompt included."""
        if not images and not videos:  # quickly measured, and seldom the same
            return self._measure(messages, (), ())
        outline = _outline(messages, images or (), videos or ())
        if outline not in self._counted:
            self._counted[outline] = self._measure(messages, images or (), videos or ())
        return self._counted[outline]

    def _measure(self, messages: Messages, images: Sequence[Image.Image], videos: Sequence[VideoInput]) -> int:
        features: dict[str, Any] = {}
        ids = self._builder.build_initial_tokens(
            messages, images=images or None, videos=videos or None, mm_inputs_out=features
        )
        self._check_sizes("image", [(image.height, image.width) for image in images], features, "image_grid_thw")
        self._check_sizes("frame", [video.shape[2:] for video, _ in videos], features, "video_grid_thw")
        return len(ids)

    def _check_sizes(self, name: str, sizes: Sequence[Sequence[int]], features: dict[str, Any], grid_name: str) -> None:
        """Compare (height, width) of what went in with the patches of what came out."""
        grids = features[grid_name].tolist() if sizes else []
        for (height, width), (_, rows, columns) in zip(sizes, grids, strict=True):
            seen_height, seen_width = rows * self._patch, columns * self._patch
            if (seen_height, seen_width) != (height, width):
                raise ConfigError(
                    f"the processor resizes a {name} from {width}x{height} to {seen_width}x{seen_height} pixels: its "
                    f"own limits are narrower than data.embedrl.{name}_min_tokens .. {name}_max_tokens; change either"
                )


def _outline(messages: Messages, images: Sequence[Image.Image], videos: Sequence[VideoInput]) -> bytes:
    """A digest of everything in a prompt but its pixels."""
    words = [
        (message["role"], content)
        if isinstance(content := message["content"], str)
        else (message["role"], [{key: part[key] for key in part if key not in ("image", "video")} for part in content])
        for message in messages
    ]
    sizes = [image.size for image in images]
    clips = [(tuple(frames.shape), metadata) for frames, metadata in videos]
    return hashlib.sha256(repr((words, sizes, clips)).encode()).digest()


def served_prompt_ids(
    messages: Messages, processor: Any, template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a prompt as vLLM has to get it: one placeholder for each image and each video.

    vLLM expands placeholders itself. verl 0.9.1 sends it the expanded prompt with runs of placeholders merged, which is
    the same thing except for videos of Qwen3-VL: there each pair of frames has a time stamp and a run of its own, vLLM
    takes the first for the whole video, and the model answers another prompt than the one that the actor is trained on.
    """
    kwargs = dict(template_kwargs or {})
    text = apply_chat_template(processor, messages, tokenize=False, add_generation_prompt=True, **kwargs)
    ids: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
