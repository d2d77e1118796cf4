# SPDX-License-Identifier: Apache-2.0
"""`embedrl data annotate FILE... --out DIR --url URL`: a model writes the T-CoTs of both sides of every pair.

Killed and started again with the same command it goes on where it was. Exit code 0, or 3 if rows of the input cannot be
used (they are in rejected.jsonl); sides without a usable T-CoT are in failed.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from embedrl_verl.families import FAMILIES

if TYPE_CHECKING:
    from embedrl_verl.annotate.backends import Backend
    from embedrl_verl.annotate.job import AnnotateJob
    from embedrl_verl.annotate.progress import RunnerSettings
    from embedrl_verl.data.media import MediaLimits
    from embedrl_verl.families import Family

KEY_VARIABLE = "EMBEDRL_API_KEY"
_LIMITS = {
    "image_min_tokens": 128,
    "image_max_tokens": 768,
    "frame_min_tokens": 128,
    "frame_max_tokens": 300,
    "max_frames": 8,
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `annotate` to `embedrl data`; `run` carries it out."""
    parser = commands.add_parser("annotate", help="have a model write the T-CoTs; resumable")
    parser.add_argument("files", nargs="+", metavar="FILE", help="parquet file of pair records, or data set folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="data set folder to write")
    add_model_options(parser)
    group = parser.add_argument_group("questions and replies")
    group.add_argument("--side", choices=("both", "query", "target"), default="both")
    group.add_argument("--overwrite", action="store_true", help="also sides that have a T-CoT")
    group.add_argument("--style", default="paper", help="templates: paper, or compact for tiny models (paper)")
    group.add_argument("--no-few-shot", action="store_true", help="leave the worked examples out")
    group.add_argument(
        "--gold-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the queries with a text target that are asked with the answer told (0)",
    )
    group.add_argument("--tries", type=int, default=3, help="times one side is asked about, at most (3)")
    group.add_argument(
        "--reask",
        choices=("explain", "resample"),
        help="after a bad reply: say what is wrong, or draw again (explain; with --style compact resample)",
    )
    group.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (0)")
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--retry-temperature", type=float, default=0.7, help="of resampled replies, at least (0.7)")
    group.add_argument("--max-tokens", type=int, default=1024, help="of a reply (1024)")
    group.add_argument(
        "--evidence",
        choices=("off", "usable", "strict"),
        default="usable",
        help="what must hold of boxes, key frames and keywords: nothing, one piece, every piece (usable)",
    )
    group.add_argument("--seed", type=int, default=0)
    add_run_options(parser, max_failed_share=0.1)
    parser.add_argument(
        "--max-bad-share", type=float, default=0.01, metavar="SHARE", help="of unusable rows; above it: stop (0.01)"
    )
    parser.add_argument("--keep-failed", action="store_true", help="write failed records too, without their T-CoT")


def add_model_options(parser: argparse.ArgumentParser, *, media: bool = True) -> None:
    """Who answers; `media`: and how media are sent."""
    group = parser.add_argument_group("model")
    group.add_argument("--url", action="append", default=[], help="OpenAI-style server; repeat for several")
    group.add_argument("--model", help="served name; asked of the server if it serves one")
    group.add_argument("--engine", metavar="PATH", help="instead of --url: a model that vLLM loads in this process")
    group.add_argument(
        "--engine-args", type=_json_object, default={}, metavar="JSON", help='arguments of vllm.LLM, {"dtype": ...}'
    )
    group.add_argument(
        "--extra-body", type=_json_object, default={}, metavar="JSON", help="more fields of every request"
    )
    if not media:
        return
    group.add_argument(
        "--family",
        choices=FAMILIES,
        default="qwen3_vl",
        help="of the model: units of its boxes, size of its visual tokens (qwen3_vl)",
    )
    group.add_argument(
        "--videos",
        choices=("auto", "video_url", "images"),
        default="auto",
        help="how clips are sent: as vLLM's list of frames, or as images; auto: by the server (auto)",
    )
    group = parser.add_argument_group("media")
    group.add_argument("--media-root", metavar="DIR", help="folder of media paths; default: what the data card says")
    for name, default in _LIMITS.items():
        group.add_argument("--" + name.replace("_", "-"), type=int, default=default, metavar="N", help=f"({default})")
    group.add_argument("--threads", type=int, help="for media (one a core, 16 at most)")
    group.add_argument("--media-mb", type=int, default=2048, help="encoded media in memory, MB (2048)")


def add_run_options(parser: argparse.ArgumentParser, *, max_failed_share: float) -> None:
    """How the run goes; nothing here changes an answer."""
    group = parser.add_argument_group("run")
    group.add_argument("--limit", type=int, default=256, help="requests in flight (256)")
    group.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds for one try (600)")
    group.add_argument(
        "--patience", type=float, default=300.0, metavar="S", help="seconds without a server before the job stops (300)"
    )
    group.add_argument("--shard-rows", type=int, default=2048, metavar="N", help="rows of a journal or part (2048)")
    group.add_argument(
        "--max-failed-share",
        type=float,
        default=max_failed_share,
        metavar="SHARE",
        help=f"of what is asked; above it the job stops ({max_failed_share:g})",
    )
    group.add_argument("--price-prompt", type=float, metavar="P", help="money for a million prompt tokens")
    group.add_argument("--price-completion", type=float, metavar="P", help="money for a million reply tokens")


def run(args: argparse.Namespace) -> int:
    """Annotate, or go on with it.

    Raises:
        EmbedRLError: see `AnnotateJob.run`.
    """
    job = job_of(args)
    try:
        return job.run()
    except KeyboardInterrupt:
        return stopped()


def stopped() -> int:
    """What Ctrl-C ends with."""
    print("stopped; what was answered is kept, and the same command goes on", file=sys.stderr)
    return 130


def job_of(args: argparse.Namespace) -> AnnotateJob:
    """The job that the options describe.

    Raises:
        ConfigError: options that cannot work.
    """
    from pathlib import Path

    from embedrl_verl.annotate.job import AnnotateJob
    from embedrl_verl.annotate.prompts import TcotPrompts
    from embedrl_verl.annotate.report import Prices
    from embedrl_verl.annotate.tcots import TcotAsker, TcotSettings
    from embedrl_verl.data.files import pair_files
    from embedrl_verl.data.schema import SIDES

    prompts = TcotPrompts(
        family=args.family,
        style=args.style,
        few_shot=not args.no_few_shot,
        limits=limits_of(args),
        media_root=media_root(args),
    )
    settings = TcotSettings(
        sides=SIDES if args.side == "both" else (args.side,),
        overwrite=args.overwrite,
        tries=args.tries,
        reask=args.reask or ("resample" if args.style == "compact" else "explain"),
        temperature=args.temperature,
        top_p=args.top_p,
        retry_temperature=args.retry_temperature,
        max_tokens=args.max_tokens,
        evidence=args.evidence,
        gold_share=args.gold_share,
        seed=args.seed,
    )
    return AnnotateJob(
        files=pair_files(args.files),
        out=Path(args.out),
        asker=TcotAsker(settings, prompts),
        backend=backend_of(args, args.family, args.videos),
        runner=runner_settings(args),
        keep_failed=args.keep_failed,
        chunk_rows=args.shard_rows,
        prices=Prices(args.price_prompt, args.price_completion),
        command=["embedrl", *sys.argv[1:]],
    )


def limits_of(args: argparse.Namespace) -> MediaLimits:
    """Sizes of media by the options and the family."""
    from embedrl_verl.data.media import MediaLimits
    from embedrl_verl.families import token_side

    return MediaLimits(token_side=token_side(args.family), **{name: getattr(args, name) for name in _LIMITS})


def backend_of(args: argparse.Namespace, family: Family = "qwen3_vl", videos: str = "auto") -> Backend:
    """Servers of --url, or the engine of --engine. Family and videos matter to questions with media alone.

    Raises:
        ConfigError: both or neither, or an option of the other.
    """
    import os

    from embedrl_verl.errors import ConfigError

    if bool(args.url) == bool(args.engine):
        raise ConfigError("name who answers: --url of a running server (repeat for several), or --engine PATH")
    for option, owner in (("--model", "url"), ("--extra-body", "url"), ("--engine-args", "engine")):
        if vars(args)[option.strip("-").replace("-", "_")] and not vars(args)[owner]:
            raise ConfigError(f"{option} goes with --{owner} alone; leave it out")
    if args.engine:
        from embedrl_verl.annotate.engine import EngineBackend

        return EngineBackend(args.engine, family, args.engine_args)
    from embedrl_verl.annotate.backends import ServerBackend
    from embedrl_verl.serving import PoolSettings, ServerPool

    pool = ServerPool(
        args.url,
        PoolSettings(limit=args.limit, timeout_s=args.timeout, retries=5, probe_interval_s=5.0),
        api_key=os.environ.get(KEY_VARIABLE),
        name="model server",
    )
    return ServerBackend(pool, family, args.model, videos, args.extra_body, args.patience)


def runner_settings(args: argparse.Namespace) -> RunnerSettings:
    """How the run goes.

    Raises:
        ConfigError: a value that cannot work.
    """
    import os

    from embedrl_verl.annotate.progress import RunnerSettings
    from embedrl_verl.errors import ConfigError

    threads = vars(args).get("threads") or min(16, os.cpu_count() or 1)
    media_mb = vars(args).get("media_mb", 64)
    for name, value in (("shard-rows", args.shard_rows), ("media-mb", media_mb), ("threads", threads)):
        if value < 1:
            raise ConfigError(f"--{name} must be 1 or more; got {value}")
    for name, share in (("max-failed-share", args.max_failed_share), ("max-bad-share", args.max_bad_share)):
        if not 0 <= share <= 1:
            raise ConfigError(f"--{name} must be between 0 and 1; got {share}")
    return RunnerSettings(args.limit, threads, media_mb << 20, args.max_failed_share, args.max_bad_share)


def media_root(args: argparse.Namespace) -> str | None:
    """--media-root, else the one that the data cards of the inputs agree on.

    Raises:
        ConfigError: they name different ones.
    """
    from embedrl_verl.data.files import media_root_of
    from embedrl_verl.errors import ConfigError

    if args.media_root is not None:
        return str(args.media_root)
    roots = {root for path in args.files if (root := media_root_of(path)) is not None}
    if len(roots) > 1:
        raise ConfigError(f"the inputs have different media roots ({', '.join(sorted(roots))}); do one at a time")
    return roots.pop() if roots else None


def _json_object(text: str) -> dict[str, object]:
    import json

    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object; got {value!r}")
    return value
