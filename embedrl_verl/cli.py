# SPDX-License-Identifier: Apache-2.0
"""`embedrl`: the command line. Each command is imported when it is called, so `embedrl --help` answers at once.

Exit codes: 0 done, 2 usage or configuration, 3 data, 4 anything else that this package refuses.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from embedrl_verl import __version__
from embedrl_verl.errors import EmbedRLError

Command = Callable[[argparse.Namespace], int]


def _doctor(arguments: argparse.Namespace) -> int:
    from embedrl_verl.doctor import run

    return run(arguments)


def _data(arguments: argparse.Namespace) -> int:
    from embedrl_verl.cli_data import run

    return run(arguments)


def _export(arguments: argparse.Namespace) -> int:
    from embedrl_verl.cli_export import run

    return run(arguments)


def _reward(arguments: argparse.Namespace) -> int:
    from embedrl_verl.cli_reward import run

    return run(arguments)


def _serve_embedder(arguments: argparse.Namespace) -> int:
    from embedrl_verl.cli_serve import run

    return run(arguments)


def _add_emb(arguments: argparse.Namespace) -> int:
    from embedrl_verl.embedder.add_token import add_emb_token

    number = add_emb_token(arguments.checkpoint, arguments.out)
    print(f"wrote {arguments.out}; <emb> is token {number}")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from embedrl_verl.config.compose import compose
    from embedrl_verl.plan import print_plan

    print_plan(compose(arguments.overrides, arguments.config_name))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `command` of the parsed arguments is the function to call."""
    from embedrl_verl.cli_data import add_parser as add_data_parser
    from embedrl_verl.cli_export import add_parser as add_export_parser
    from embedrl_verl.cli_reward import add_parser as add_reward_parser
    from embedrl_verl.cli_serve import add_parser as add_serve_parser

    parser = argparse.ArgumentParser(
        prog="embedrl", description="Embedder-guided RL for multimodal embeddings, on stock verl."
    )
    parser.add_argument("--version", action="version", version=f"embedrl-verl {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="versions, plugin, platform, devices; what a recipe would use")
    doctor.set_defaults(command=_doctor)
    plan = commands.add_parser("plan", help="check a run's configuration and print its plan; starts nothing")
    plan.add_argument("--config-name", default="egrl_trainer", help="file in embedrl_verl/config (egrl_trainer)")
    plan.add_argument("overrides", nargs="*", help="hydra overrides, as for python -m embedrl_verl.train")
    plan.set_defaults(command=_plan)
    add_emb = commands.add_parser("add-emb", help="give a Qwen-VL checkpoint the token <emb>, to train it as Embedder")
    add_emb.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or hub id")
    add_emb.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    add_emb.set_defaults(command=_add_emb)
    add_data_parser(commands)
    commands.choices["data"].set_defaults(command=_data)
    add_export_parser(commands)
    commands.choices["export"].set_defaults(command=_export)
    add_serve_parser(commands)
    commands.choices["serve-embedder"].set_defaults(command=_serve_embedder)
    add_reward_parser(commands)
    commands.choices["reward"].set_defaults(command=_reward)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors of this package become one line on standard error and their exit code."""
    arguments = build_parser().parse_args(argv)
    command: Command = arguments.command
    try:
        return command(arguments)
    except EmbedRLError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
