# SPDX-License-Identifier: Apache-2.0
"""The stock vLLM server that gives the Embedder's vectors: its arguments and its chat template.

Nothing of this package makes vectors in it. They are equal by the prompt as a chat template, last-token pooling at
length 1, and image limits so wide that fitted media pass unchanged.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedrl_verl.config.schema import EmbedderConfig
from embedrl_verl.embedder.processor import EmbedProcessor
from embedrl_verl.embedder.template import embedding_template
from embedrl_verl.families import facts_of

MODULE = "vllm.entrypoints.openai.api_server"
"""What `vllm serve` runs. The command itself asks for the metadata of the distribution `vllm`, which the CPU build
does not have."""
PLAIN_INPUT = "embedrl_verl.embedder.served.plain_input.PlainInput"


@dataclass(frozen=True)
class ServerOptions:
    """What one server is given.

    Attributes:
        path: the Embedder's folder or hub id.
        template: text of the chat template.
        media_size: limits of images and clips in pixels.
        dtype: "bfloat16" or "float32".
        max_model_len: longest prompt in tokens.
        on_cpu: no GPU: eager, and nothing said of its memory.
        gpus: tensor-parallel size.
        gpu_memory_utilization: share of a GPU's memory.
        extra_args: more arguments; they come last and win.
    """

    path: str
    template: str
    media_size: Mapping[str, int]
    dtype: str
    max_model_len: int
    on_cpu: bool
    gpus: int = 1
    gpu_memory_utilization: float = 0.9
    extra_args: tuple[str, ...] = ()


def server_options(config: EmbedderConfig, processor: EmbedProcessor, *, on_cpu: bool) -> ServerOptions:
    """What each server of the section `embedrl.embedder` is given; `processor` is its checkpoint's."""
    server = config.server
    return ServerOptions(
        path=str(config.path),
        template=embedding_template(processor.profile, processor.limits, processor.family),
        media_size=media_size(processor),
        dtype=config.dtype,
        max_model_len=longest_prompt(config, processor),
        on_cpu=on_cpu,
        gpus=server.n_gpus_per_server,
        gpu_memory_utilization=server.gpu_memory_utilization,
        extra_args=server.extra_args,
    )


def longest_prompt(config: EmbedderConfig, processor: EmbedProcessor) -> int:
    """Longest prompt that servers must take and rows may have, in tokens."""
    return min(processor.max_length, config.server.max_model_len)


def server_arguments(
    options: ServerOptions, template: Path, *, host: str, port: int, plain_input: bool = False
) -> list[str]:
    """Arguments of vLLM's OpenAI server; `template` is the file that holds `options.template`.

    With `plain_input` it gives bare texts their prompt, for those who ask it from elsewhere; a run sends chat requests.
    """
    pooler = {"pooling_type": "LAST", "use_activation": True}
    pairs: list[tuple[str, Any]] = [
        ("--model", options.path),
        ("--runner", "pooling"),
        ("--convert", "embed"),
        ("--pooler-config", json.dumps(pooler)),
        ("--dtype", options.dtype),
        ("--max-model-len", options.max_model_len),
        ("--chat-template", template),
        ("--chat-template-content-format", "openai"),
        ("--mm-processor-kwargs", json.dumps({"size": dict(options.media_size)})),
        ("--host", host),
        ("--port", port),
    ]
    if plain_input:
        pairs.append(("--middleware", PLAIN_INPUT))
    if not options.on_cpu:
        pairs += [
            ("--tensor-parallel-size", max(options.gpus, 1)),
            ("--gpu-memory-utilization", options.gpu_memory_utilization),
        ]
    flags = ["--disable-uvicorn-access-log", *(["--enforce-eager"] if options.on_cpu else [])]
    return [*(str(word) for pair in pairs for word in pair), *flags, *options.extra_args]


def server_command(arguments: Sequence[str], python: str = sys.executable) -> list[str]:
    """The whole command line; `forkserver.python()` as `python` where the server may be forked."""
    return [python, "-m", MODULE, *arguments]


def shell_line(command: Sequence[str]) -> str:
    """The command as a shell takes it, one option a line."""
    lines, words = [], list(command)
    while words:
        taken = [words.pop(0)]
        while words and not words[0].startswith("--"):
            taken.append(words.pop(0))
        lines.append(shlex.join(taken))
    return " \\\n    ".join(lines)


def media_size(processor: EmbedProcessor) -> dict[str, int]:
    """Limits in pixels within which every fitted image and clip lies, so that the server resizes nothing.

    vLLM has one pair of limits for images and videos. Qwen3-VL counts the pixels of a whole clip, the other families
    those of a frame.
    """
    limits = processor.limits
    frames = _even(limits.max_frames) if facts_of(processor.family).limits_whole_clip else 1
    most = max(limits.most_tokens(is_frame=False), limits.most_tokens(is_frame=True) * frames)
    return {"shortest_edge": limits.token_side**2, "longest_edge": most * limits.token_side**2}


def _even(frames: int) -> int:
    return frames + frames % 2
