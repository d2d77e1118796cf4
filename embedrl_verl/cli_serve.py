# SPDX-License-Identifier: Apache-2.0
"""`embedrl serve-embedder PATH`: a stock vLLM server that gives an Embedder's vectors, or (`--print`) its command line.

Bare texts (`{"input": "a heron"}`) get the Embedder's prompt too, by a class of this package that vLLM loads.
Runs name it in `embedrl.embedder.server.urls`; they refuse one whose prompts or image limits are others than theirs.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `serve-embedder` to `embedrl`; `run` carries it out."""
    serve = subparsers.add_parser(
        "serve-embedder", help="serve an Embedder with stock vLLM, for embedrl.embedder.backend=server"
    )
    serve.add_argument("path", metavar="PATH", help="the Embedder: folder or hub id")
    serve.add_argument("--profile", default="auto", help="its prompt, as embedrl.embedder.profile (auto)")
    serve.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16, float32 on a CPU")
    serve.add_argument("--device", choices=("auto", "gpu", "cpu"), default="auto")
    serve.add_argument("--gpus", type=int, default=1, help="GPUs of the server (1)")
    serve.add_argument("--gpu-memory-utilization", type=float, default=0.9, metavar="SHARE", help="of a GPU (0.9)")
    serve.add_argument("--max-model-len", type=int, default=32768, metavar="TOKENS", help="longest prompt (32768)")
    serve.add_argument("--image-tokens", type=int, nargs=2, default=(128, 768), metavar=("MIN", "MAX"))
    serve.add_argument("--frame-tokens", type=int, nargs=2, default=(128, 300), metavar=("MIN", "MAX"))
    serve.add_argument("--max-frames", type=int, default=8, help="frames of a video (8)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument(
        "--template",
        type=Path,
        default=Path("embedding_template.jinja"),
        metavar="FILE",
        help="chat template, which is written (embedding_template.jinja)",
    )
    serve.add_argument("--print", action="store_true", dest="only_print", help="print the command and end")
    serve.add_argument(
        "--vllm-arg",
        action="append",
        default=[],
        metavar="ARGUMENT",
        help="one more argument of vllm serve, as --vllm-arg=--max-num-seqs=64; can be repeated",
    )


def run(args: argparse.Namespace) -> int:
    """Write the template, then print the command or become the server.

    Raises:
        ConfigError: a value that cannot work.
        EmbedderError: the checkpoint and the profile do not fit.
    """
    import torch

    from embedrl_verl.config.schema import EmbedderConfig, EmbedderServerConfig
    from embedrl_verl.embedder.served.command import prompt_template, server_arguments, server_command, shell_line
    from embedrl_verl.embedder.settings import processor_for

    on_cpu = args.device == "cpu" or (args.device == "auto" and not torch.cuda.is_available())
    config = EmbedderConfig(
        path=args.path,
        profile=args.profile,
        backend="server",
        dtype=args.dtype or ("float32" if on_cpu else "bfloat16"),
        image_min_tokens=args.image_tokens[0],
        image_max_tokens=args.image_tokens[1],
        frame_min_tokens=args.frame_tokens[0],
        frame_max_tokens=args.frame_tokens[1],
        server=EmbedderServerConfig(
            n_gpus_per_server=args.gpus,
            max_model_len=args.max_model_len,
            gpu_memory_utilization=args.gpu_memory_utilization,
            extra_args=tuple(args.vllm_arg),
        ),
    )
    processor = processor_for(config, max_frames=args.max_frames)
    args.template.write_text(prompt_template(processor), encoding="utf-8")
    command = server_command(
        server_arguments(config, processor, on_cpu=on_cpu, plain_input=True),
        args.template.resolve(),
        host=args.host,
        port=args.port,
    )
    if args.only_print:
        print(shell_line(command))
        return 0
    sys.stdout.flush()
    os.execv(command[0], command)
