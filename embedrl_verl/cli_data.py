# SPDX-License-Identifier: Apache-2.0
"""`embedrl data COMMAND`: the data build, one module a command (`embedrl_verl.cli_data_<command>`)."""

from __future__ import annotations

import argparse
from importlib import import_module
from types import ModuleType

COMMANDS = ("annotate", "filter", "split", "content-ids", "check", "show", "stats")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `data` to `embedrl`; `run` carries it out."""
    data = subparsers.add_parser("data", help="pair records: annotate, filter, split, check and look at them")
    commands = data.add_subparsers(dest="data_command", required=True, metavar="DATA_COMMAND")
    for name in COMMANDS:
        _module(name).add_parser(commands)


def run(args: argparse.Namespace) -> int:
    """Carry out the chosen command. Returns its exit code; raises what it raises."""
    code: int = _module(args.data_command).run(args)
    return code


def _module(name: str) -> ModuleType:
    return import_module(f"embedrl_verl.cli_data_{name.replace('-', '_')}")
