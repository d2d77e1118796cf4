# SPDX-License-Identifier: Apache-2.0
"""`embedrl data content-ids FILE... --out DIR`: equal queries get the same query_id, equal targets the same target_id.

Exit code 0, or 3 if rows cannot be used (they are in rejected.jsonl). Killed and started again, the same command goes
on where it was.
"""

from __future__ import annotations

import argparse

from embedrl_verl.cli_data_split import add_job_options, command_line


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `content-ids` to `embedrl data`; `run` carries it out."""
    parser = commands.add_parser("content-ids", help="fill query_id and target_id: same content, same id; resumable")
    parser.add_argument("files", nargs="+", metavar="FILE", help="parquet file of pair records, or data set folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="data set folder to write")
    parser.add_argument("--overwrite", action="store_true", help="also replace ids that are there")
    group = parser.add_argument_group("near duplicates")
    group.add_argument(
        "--near-duplicates",
        action="store_true",
        help="images that are copies of each other at another quality or size count as one; decodes every target image",
    )
    group.add_argument("--max-bits", type=int, default=12, metavar="N", help="hashes may differ in N of 256 bits (12)")
    group.add_argument(
        "--max-difference",
        type=float,
        default=9.0,
        metavar="GREY",
        help="small pictures may differ by so many of 255 grey values, at any place (9)",
    )
    add_job_options(parser)


def run(args: argparse.Namespace) -> int:
    """Fill the ids, and print the report. Returns 0, or 3 if rows cannot be used.

    Raises:
        ConfigError, DataError, ResourceError: as `embedrl_verl.curate.id_job.fill_content_ids`.
    """
    from embedrl_verl.curate.id_job import IdSettings, fill_content_ids
    from embedrl_verl.curate.near_duplicates import Likeness

    near = Likeness(args.max_bits, args.max_difference) if args.near_duplicates else None
    report = fill_content_ids(
        args.files,
        args.out,
        IdSettings(media_root=args.media_root, overwrite=args.overwrite, near=near),
        workers=args.workers,
        rows_per_part=args.rows_per_part,
        max_bad_share=args.max_bad_share,
        command=command_line(),
    )
    for line in report.lines():
        print(line)
    return report.exit_code
