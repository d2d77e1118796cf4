# SPDX-License-Identifier: Apache-2.0
"""The stock vLLM server that gives the Embedder's vectors: its arguments and its chat template.

Nothing of this package makes vectors in it. They are equal by the prompt as a chat template, last-token pooling at
length 1, and image limits so wide that fitted media pass unchanged.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedrl_verl.config.schema import EmbedderConfig
from embedrl_verl.embedder.messages import embedding_template
from embedrl_verl.embedder.processor import EmbedProcessor
from embedrl_verl.families import facts_of

MODULE = "vllm.entrypoints.openai.api_server"
"""What `vllm serve` runs. The command itself asks for the metadata of the distribution `vllm`, which the CPU build
does not have."""
PLAIN_INPUT = "embedrl_verl.embedder.served.plain_input.PlainInput"


def server_arguments(
    config: EmbedderConfig, processor: EmbedProcessor, *, on_cpu: bool, plain_input: bool = False
) -> list[str]:
    """Arguments of each server of the section `embedrl.embedder`; `processor` is its checkpoint's.

    With `plain_input` it gives bare texts their prompt, for those who ask it from elsewhere; a run sends chat requests.
    """
    server = config.server
    pairs: list[tuple[str, Any]] = [
        ("--model", config.path),
        ("--runner", "pooling"),
        ("--convert", "embed"),
        ("--pooler-config", json.dumps({"pooling_type": "LAST", "use_activation": True})),
        ("--dtype", config.dtype),
        ("--max-model-len", longest_prompt(config, processor)),
        ("--chat-template-content-format", "openai"),
        ("--mm-processor-kwargs", json.dumps({"size": media_size(processor)})),
    ]
    if plain_input:
        pairs.append(("--middleware", PLAIN_INPUT))
    if not on_cpu:
        pairs += [
            ("--tensor-parallel-size", max(server.n_gpus_per_server, 1)),
            ("--gpu-memory-utilization", server.gpu_memory_utilization),
        ]
    flags = ["--disable-uvicorn-access-log", *(["--enforce-eager"] if on_cpu else [])]
    return [*(str(word) for pair in pairs for word in pair), *flags, *server.extra_args]


def server_command(
    arguments: Sequence[str], template: Path, *, host: str, port: int, python: str = sys.executable
) -> list[str]:
    """The whole command line; `extra_args` come last and win.

    Args:
        template: file that holds `prompt_template`.
        python: `forkserver.python()` where the server may be forked.
    """
    place = ["--chat-template", str(template), "--host", host, "--port", str(port)]
    return [python, "-m", MODULE, *place, *arguments]


def prompt_template(processor: EmbedProcessor) -> str:
    """The chat template with which the server comes to the processor's prompts."""
    return embedding_template(processor.profile, processor.limits, processor.family)


def longest_prompt(config: EmbedderConfig, processor: EmbedProcessor) -> int:
    """Longest prompt that servers must take and rows may have, in tokens."""
    return min(processor.max_length, config.server.max_model_len)


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

    vLLM has one pair of limits for images and videos. Qwen3-VL counts the pixels of a whole clip (of an even number of
    frames), the other families those of a frame.
    """
    limits = processor.limits
    frames = limits.max_frames + limits.max_frames % 2 if facts_of(processor.family).limits_whole_clip else 1
    most = max(limits.most_tokens(is_frame=False), limits.most_tokens(is_frame=True) * frames)
    return {"shortest_edge": limits.token_side**2, "longest_edge": most * limits.token_side**2}
