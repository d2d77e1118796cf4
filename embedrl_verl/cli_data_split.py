# SPDX-License-Identifier: Apache-2.0
"""`embedrl data split FILE... --verdicts FILE --out DIR`: the contrastive and the RL set of judged pairs.

Exit code 0, or 3 if rows cannot be used (they are in rejected.jsonl). Killed and started again, the same command goes
on where it was. `embedrl data filter` takes the same options and calls the judge first.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embedrl_verl.curate.split_settings import SplitSettings


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `split` to `embedrl data`; `run` carries it out."""
    parser = commands.add_parser("split", help="contrastive and RL sets from relevance verdicts; resumable")
    parser.add_argument("files", nargs="+", metavar="FILE", help="parquet file of pair records, or data set folder")
    parser.add_argument("--verdicts", metavar="FILE", help="verdicts.parquet of embedrl data filter; none: all match")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write: contrastive/, rl/, split.json")
    add_split_options(parser)
    add_job_options(parser)


def add_split_options(parser: argparse.ArgumentParser) -> None:
    """Options of the split; `settings_of` reads them."""
    group = parser.add_argument_group("split")
    group.add_argument(
        "--rl-from",
        choices=("mismatch", "match", "all"),
        default="mismatch",
        help="pairs that RL draws: the dropped ones (paper 3.2), the kept ones (its appendix C.3), or all (mismatch)",
    )
    group.add_argument("--rl-preset", metavar="NAME", default="", help="RL pairs of each source by a table: rl_13")
    group.add_argument(
        "--rl-rows",
        action="append",
        default=[],
        metavar="[SOURCE=]N",
        help="RL pairs: exactly N of a source, or at most N of each source that is not named; repeat",
    )
    group.add_argument("--allow-short", action="store_true", help="a named source may be missing or have fewer pairs")
    group.add_argument(
        "--rl-sampling",
        choices=("even", "random"),
        default="even",
        help="even: at floor(i n / k) of a source's n candidates, in order; random: by --split-seed (even)",
    )
    group.add_argument("--split-seed", type=int, default=0, metavar="N", help="of --rl-sampling random (0)")
    group.add_argument(
        "--unknown", choices=("left_out", "match"), default="left_out", help="pairs without a verdict (left_out)"
    )
    group.add_argument(
        "--keep-rl-matches", action="store_true", help="RL pairs that match are in the contrastive set as well"
    )
    group.add_argument(
        "--contrastive-without",
        action="append",
        default=[],
        metavar="SOURCE",
        help="leave a source out of the contrastive set (the paper: mmeb_hatefulmemes, mmeb_n24news, mmeb_voc2007)",
    )
    group.add_argument(
        "--disjoint-targets",
        choices=("off", "media", "all"),
        default="off",
        help="leave out contrastive pairs whose target content RL has: of targets with media, or all (off: only count)",
    )


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that rewrites pairs."""
    group = parser.add_argument_group("job")
    group.add_argument("--media-root", metavar="DIR", help="media root of all files; none: as their data cards say")
    group.add_argument("--workers", type=int, metavar="N", help="processes (the CPUs)")
    group.add_argument("--rows-per-part", type=int, default=50_000, metavar="N", help="of the written files (50000)")
    group.add_argument(
        "--max-bad-share", type=float, default=0.01, metavar="SHARE", help="stop above this share of bad rows (0.01)"
    )


def settings_of(args: argparse.Namespace) -> SplitSettings:
    """The split that the options describe.

    Raises:
        ConfigError: options that cannot work.
    """
    from embedrl_verl.curate.split_settings import SplitSettings
    from embedrl_verl.errors import ConfigError

    named: dict[str, int] = {}
    each: int | None = None
    for text in args.rl_rows:
        source, _, number = text.rpartition("=")
        if not number.isdecimal():
            raise ConfigError(f"--rl-rows takes N or SOURCE=N; got {text!r}")
        if source:
            named[source] = int(number)
        else:
            each = int(number)
    return SplitSettings(
        rl_from=args.rl_from,
        rl_rows=named,
        rl_rows_each=each,
        rl_preset=args.rl_preset,
        allow_short=args.allow_short,
        sampling=args.rl_sampling,
        seed=args.split_seed,
        unknown=args.unknown,
        keep_rl_matches=args.keep_rl_matches,
        contrastive_without=tuple(args.contrastive_without),
        disjoint_targets=args.disjoint_targets,
    )


def run(args: argparse.Namespace) -> int:
    """Split, and print the report. Returns 0, or 3 if rows cannot be used.

    Raises:
        ConfigError, DataError, ResourceError: as `embedrl_verl.curate.split_job.split_pairs`.
    """
    from embedrl_verl.curate.split_job import split_pairs

    report = split_pairs(
        args.files,
        args.verdicts,
        args.out,
        settings_of(args),
        media_root=args.media_root,
        workers=args.workers,
        rows_per_part=args.rows_per_part,
        max_bad_share=args.max_bad_share,
        command=command_line(),
    )
    for line in report.lines():
        print(line)
    print(f"wrote {shlex.quote(args.out)}/contrastive and {shlex.quote(args.out)}/rl")
    return report.exit_code


def command_line() -> list[str]:
    """What the user called, to be noted in a folder."""
    return ["embedrl", *sys.argv[1:]]
