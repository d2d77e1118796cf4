# SPDX-License-Identifier: Apache-2.0
"""`embedrl export CHECKPOINT --out DIR`: a checkpoint of a training run as a Hugging Face folder.

CHECKPOINT is what verl writes (`global_step_N/actor`, or `global_step_N` itself). DIR is complete or not there at all.
"""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `export` to `embedrl`; `run` carries it out."""
    export = subparsers.add_parser("export", help="turn a checkpoint into a Hugging Face folder that others can load")
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="folder that verl wrote: global_step_N or one in it")
    export.add_argument("--out", required=True, metavar="DIR", help="folder to write; must not exist or be empty")
    export.add_argument(
        "--kind", choices=("auto", "embedder", "reasoner"), default="auto", help="what the model is (auto: if it shows)"
    )
    export.add_argument(
        "--base-model",
        metavar="NAME_OR_PATH",
        help="model that training began with: for the card, and the weights under an adapter saved alone",
    )
    export.add_argument("--profile", default="auto", help="prompt of an Embedder (auto: embed_rl if it has <emb>)")
    export.add_argument("--keep-adapter", action="store_true", help="also write the LoRA adapter, as peft does")
    export.add_argument("--force", action="store_true", help="replace DIR if it holds a model")


def run(args: argparse.Namespace) -> int:
    """Export and say what was written. Returns 0.

    Raises:
        ConfigError, EmbedderError, ResourceError: as `export_checkpoint`.
    """
    from embedrl_verl.export.folder import export_checkpoint

    written = export_checkpoint(
        args.checkpoint,
        args.out,
        kind=None if args.kind == "auto" else args.kind,
        base_model=args.base_model,
        profile=args.profile,
        force=args.force,
        keep_adapter=args.keep_adapter,
    )
    print(
        f"wrote the {written.kind} to {written.folder}: {written.weights} weights, {written.parameters:,} parameters, "
        f"{written.dtype}"
    )
    return 0
