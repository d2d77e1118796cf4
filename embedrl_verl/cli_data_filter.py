# SPDX-License-Identifier: Apache-2.0
"""`embedrl data filter FILE... --out DIR --url URL`: a judge says which pairs belong together, and they are split.

    OUT/verdicts/verdicts.parquet   pair_id, verdict (match, mismatch, unknown); beside it the counts by source
    OUT/contrastive/, OUT/rl/       as `embedrl data split` writes them

Killed and started again with the same command it goes on where it was. To split the same verdicts in another way, call
`embedrl data split --verdicts`. Exit code 0, or 3 if rows cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from embedrl_verl.cli_data_annotate import add_model_options, add_run_options, backend_of, runner_settings, stopped
from embedrl_verl.cli_data_split import add_job_options, add_split_options, settings_of

if TYPE_CHECKING:
    from embedrl_verl.curate.verdicts import VerdictJob


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `filter` to `embedrl data`; `run` carries it out."""
    parser = commands.add_parser("filter", help="have a judge say which pairs belong together, and split; resumable")
    parser.add_argument("files", nargs="+", metavar="FILE", help="parquet file of annotated pairs, or data set folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write: verdicts/, contrastive/, rl/")
    parser.add_argument("--verdicts-only", action="store_true", help="do not split")
    add_model_options(parser, media=False)
    group = parser.add_argument_group("judge")
    group.add_argument("--style", default="paper", help="template: paper, or compact for tiny models (paper)")
    group.add_argument("--tries", type=int, default=2, help="times one pair is asked about, at most (2)")
    group.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (0)")
    group.add_argument("--retry-temperature", type=float, default=0.7, help="of later tries, at least (0.7)")
    group.add_argument("--max-tokens", type=int, default=16, help="of a reply; raise it for judges that reason (16)")
    group.add_argument("--free", action="store_true", help="do not constrain vLLM to the two words")
    group.add_argument("--seed", type=int, default=0)
    add_run_options(parser, max_failed_share=0.5)
    add_split_options(parser)
    add_job_options(parser)


def run(args: argparse.Namespace) -> int:
    """Judge and split, or go on with it.

    Raises:
        EmbedRLError: see `VerdictJob.run` and `embedrl_verl.curate.split_job.split_pairs`.
    """
    from embedrl_verl.curate.split_job import split_pairs

    settings = settings_of(args)  # a wrong option is told before the judge is asked
    job = job_of(args)
    try:
        code = job.run()
    except KeyboardInterrupt:
        return stopped()
    if args.verdicts_only:
        return code
    report = split_pairs(
        args.files,
        job.verdicts,
        args.out,
        settings,
        media_root=args.media_root,
        workers=args.workers,
        rows_per_part=args.rows_per_part,
        max_bad_share=args.max_bad_share,
        command=job.command,
    )
    for line in report.lines():
        print(line)
    print(f"wrote {args.out}/contrastive and {args.out}/rl")
    return max(code, report.exit_code)


def job_of(args: argparse.Namespace) -> VerdictJob:
    """The judge's job that the options describe.

    Raises:
        ConfigError: options that cannot work.
    """
    from pathlib import Path

    from embedrl_verl.annotate.report import Prices
    from embedrl_verl.curate.relevance import RelevanceAsker, RelevanceSettings
    from embedrl_verl.curate.verdict_file import VERDICTS_FOLDER
    from embedrl_verl.curate.verdicts import VerdictJob
    from embedrl_verl.data.files import pair_files

    settings = RelevanceSettings(
        style=args.style,
        tries=args.tries,
        temperature=args.temperature,
        retry_temperature=args.retry_temperature,
        max_tokens=args.max_tokens,
        constrained=not args.free,
        seed=args.seed,
    )
    return VerdictJob(
        files=pair_files(args.files),
        out=Path(args.out) / VERDICTS_FOLDER,
        asker=RelevanceAsker(settings),
        backend=backend_of(args),
        runner=runner_settings(args),
        chunk_rows=args.shard_rows,
        prices=Prices(args.price_prompt, args.price_completion),
        command=["embedrl", *sys.argv[1:]],
    )
