# SPDX-License-Identifier: Apache-2.0
"""The command line that the scripts of `data_preprocess/` share: from a source's files to a data set folder."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import TypeVar

from embedrl_verl.convert.card import print_card
from embedrl_verl.convert.converter import Converter, Options
from embedrl_verl.convert.job import JobOptions, run_conversion
from embedrl_verl.errors import DataError, EmbedRLError

Some = TypeVar("Some", bound=Options)


def convert_main(converter: type[Converter], description: str, argv: Sequence[str] | None = None) -> int:
    """Run a script of `data_preprocess/`, with `argv` or the process's arguments. Returns the exit code (docs/data.md);
    errors become one message on standard error."""
    parser = argparse.ArgumentParser(description=description.strip().splitlines()[0], allow_abbrev=False)
    add_options(parser, JobOptions)
    add_options(parser, converter)
    arguments = parser.parse_args(argv)
    given = sys.argv if argv is None else [sys.argv[0], *argv]
    command = [sys.executable, *(argument for argument in given if argument != "--restart")]
    logging.basicConfig(format="%(message)s")
    logging.getLogger("embedrl_verl").setLevel(logging.INFO)
    try:
        options = from_arguments(JobOptions, arguments)
        card = run_conversion(from_arguments(converter, arguments), options, command)
    except EmbedRLError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    print_card(card, options.out)
    return DataError.exit_code if card["rejected"]["rows"] else 0


def add_options(parser: argparse.ArgumentParser, options: type[Options]) -> None:
    """The fields of the class as options of the command line."""
    for one in fields(options):
        text, choices, name = one.metadata["help"], one.metadata["choices"] or None, f"--{one.name.replace('_', '-')}"
        if one.default is MISSING:
            parser.add_argument(name, required=True, help=text)
        elif isinstance(one.default, bool):
            parser.add_argument(name, action="store_true", help=text)
        elif isinstance(one.default, tuple):
            parser.add_argument(name, nargs="+", action="extend", choices=choices, help=text)
        else:
            shown = f"{text} (%(default)s)" if one.default != "" else text
            parser.add_argument(name, type=type(one.default), default=one.default, choices=choices, help=shown)


def from_arguments(options: type[Some], arguments: argparse.Namespace) -> Some:
    """An object of the class from parsed options."""
    given = {one.name: getattr(arguments, one.name) for one in fields(options)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return options(**{name: value for name, value in given.items() if value is not None})
