# SPDX-License-Identifier: Apache-2.0
"""The command line that the scripts of `data_preprocess/` share: from a source's files to a data set folder.

Exit codes: 0 done; 2 usage or options; 3 rows or files could not be used (the good ones are in the folder,
`rejected.jsonl` names the others), or too many of them and the job has stopped; 4 full disk, killed worker, silent hub.
After a stop, after 4, and after any crash, the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from embedrl_verl.convert.card import BY_ROW, outside_preset_text, without_instruction_text
from embedrl_verl.convert.converter import Converter
from embedrl_verl.convert.inputs import open_root
from embedrl_verl.convert.job import JobOptions, run_conversion
from embedrl_verl.convert.media_store import PLACES, VERIFY
from embedrl_verl.convert.sampling import METHODS, presets, sampling_from_options
from embedrl_verl.data.files import REJECTED_FILE, media_root_of
from embedrl_verl.errors import DataError, EmbedRLError

DEFAULTS = JobOptions(out="")


def convert_main(
    make_converter: Callable[[argparse.Namespace], Converter],
    description: str,
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Run a script of `data_preprocess/`.

    Args:
        make_converter: from the parsed options; `media_root` and `input` are among them.
        description: first lines of --help.
        add_options: adds the source's own options.
        argv: arguments instead of the process's.

    Returns:
        The exit code, see the module. Errors of this package become one message on standard error.
    """
    parser = argparse.ArgumentParser(description=description)
    add_common_options(parser)
    if add_options is not None:
        add_options(parser)
    arguments = parser.parse_args(argv)
    given = sys.argv if argv is None else [sys.argv[0], *argv]
    command = [sys.executable, *(argument for argument in given if argument != "--restart")]
    try:
        return run(arguments, make_converter(arguments), command)
    except EmbedRLError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """The options of every converter."""
    parser.add_argument("--input", required=True, metavar="PATH", help="folder, file, or hub id owner/name[@revision]")
    parser.add_argument("--out", required=True, metavar="DIR", help="data set folder to write, or to go on with")
    parser.add_argument("--media-root", metavar="DIR", help="folder that paths of media are relative to (the input's)")
    parser.add_argument(
        "--media",
        choices=PLACES,
        default=DEFAULTS.place,
        help="keep: as they come; embed: bytes in the parquet files; files: all into DIR/media by hash (%(default)s)",
    )
    parser.add_argument(
        "--verify",
        choices=VERIFY,
        default=DEFAULTS.verify,
        help="check of media: none, exists (files and headers), decode (every image and video) (%(default)s)",
    )
    parser.add_argument(
        "--cap",
        action="append",
        default=[],
        metavar="[SOURCE=]ROWS",
        help="rows used of each source, or of one; may be given again",
    )
    parser.add_argument("--preset", choices=list(presets()), help="caps of a published recipe")
    parser.add_argument(
        "--sample", choices=METHODS, default="even", help="how rows under a cap are drawn (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --sample random (%(default)s)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (%(default)s)")
    parser.add_argument(
        "--shard-rows", type=int, default=DEFAULTS.shard_rows, help="input rows of one part (%(default)s)"
    )
    parser.add_argument(
        "--max-bad-share",
        type=float,
        default=DEFAULTS.max_bad_share,
        metavar="SHARE",
        help="stop when a larger share of the rows cannot be used, or of the files is damaged (%(default)s)",
    )
    parser.add_argument(
        "--restart", action="store_true", help="remove what an earlier run wrote to DIR, and begin anew"
    )
    parser.add_argument("--licence", default="", help="licence for the data card, instead of the source's own words")


def run(arguments: argparse.Namespace, converter: Converter, command: Sequence[str]) -> int:
    """Convert with parsed options and print what came out. Returns the exit code."""
    options = JobOptions(
        out=arguments.out,
        media_root=arguments.media_root,
        place=arguments.media,
        verify=arguments.verify,
        workers=arguments.workers,
        shard_rows=arguments.shard_rows,
        max_bad_share=arguments.max_bad_share,
        sampling=sampling_from_options(arguments.cap, arguments.preset, method=arguments.sample, seed=arguments.seed),
        command=command,
        licence=arguments.licence,
        restart=arguments.restart,
    )
    card = run_conversion(open_root(arguments.input, without=arguments.out), converter, options)
    print_card(card, arguments.out)
    rejected = card["rejected"]
    return DataError.exit_code if rejected["rows"] or rejected["files"] else 0


def print_card(card: Mapping[str, Any], out: str) -> None:
    """The table by source, the causes of rejected rows, and the commands that come next."""
    width = max([len("data source"), *map(len, card["by_source"])])
    columns = {"rows": "rows", "sampled": "sampled", "records": "pairs", "unused": "not used", "rejected": "rejected"}
    print(f"{'data source':{width}}  {'  '.join(f'{title:>9}' for title in columns.values())}  kinds")
    for source, counts in card["by_source"].items():
        numbers = "  ".join(f"{counts[key]:>9}" for key in columns)
        kinds = ", ".join(f"{kind} ({count})" for kind, count in counts["kinds"].items())
        print(f"{source or BY_ROW:{width}}  {numbers}  {kinds}")
    for remark in (outside_preset_text(card), without_instruction_text(card)):
        if remark:
            print(remark)
    for cause in card["rejected"]["causes"]:
        print(f"REJECTED {cause['rows']} x {cause['cause']} (first: {cause['example']})")
    media = card["media"]
    if media["animated"]:
        print(f"{media['animated']} images are animated or have several pages; training sees the first frame")
    if card["rejected"]["rows"] or card["rejected"]["files"]:
        print(f"all rejected rows and files: {os.path.join(out, REJECTED_FILE)}")
    root = media_root_of(out)
    print(f"{card['records']} pairs in {len(card['parts'])} file(s): {out}" + (f" (media root {root})" if root else ""))
