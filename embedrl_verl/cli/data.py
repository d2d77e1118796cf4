# SPDX-License-Identifier: Apache-2.0
"""`embedrl data COMMAND`: the data build."""

import os
import shlex
import sys
from typing import Annotated, Any

from typer import Option, Typer

from embedrl_verl.cli import options as opt
from embedrl_verl.cli.options import command
from embedrl_verl.errors import ConfigError
from embedrl_verl.families import DEFAULT_FAMILY, Family

data = Typer(help="Pair records: annotate, filter, split, check, look.")


@command(data)
def annotate(
    *,
    files: opt.Files,
    out: opt.Out,
    model: opt.Model,
    media: opt.Media,
    sizes: opt.Sizes,
    questions: opt.Questions,
    asking: opt.Asking,
    max_failed_share: opt.MaxFailed = 0.1,
    max_bad_share: opt.MaxBad = 0.01,
    keep_failed: Annotated[
        bool, Option("--keep-failed", help="Write failed records too, without their T-CoT.")
    ] = False,
) -> int:
    """A model writes the T-CoTs of both sides; resumable.

    Killed and started again with the same command it goes on where it was. Exit code 3 if rows of the input cannot be
    used (they are in rejected.jsonl); sides without a usable T-CoT are in failed.jsonl.
    """
    from pathlib import Path

    from embedrl_verl.annotate.prompts import TcotPrompts
    from embedrl_verl.annotate.tcots import AnnotateJob, TcotSettings
    from embedrl_verl.config.schema import MediaConfig
    from embedrl_verl.data.files import common_media_root, pair_files
    from embedrl_verl.data.media import MediaLimits
    from embedrl_verl.data.schema import SIDES
    from embedrl_verl.families import token_side

    asked, tokens = dict(vars(questions)), MediaConfig(**_named(sizes))
    side, reask, style, no_few_shot = (asked.pop(name) for name in ("side", "reask", "style", "no_few_shot"))
    settings = TcotSettings(
        sides=SIDES if side == "both" else (side,),
        reask=reask or ("resample" if style == "compact" else "explain"),
        **asked,
    )
    prompts = TcotPrompts(
        family=media.family,
        style=style,
        few_shot=not no_few_shot,
        limits=MediaLimits.of(tokens, token_side(media.family), tokens.max_frames),
        media_root=common_media_root(files) if media.media_root is None else media.media_root,
    )
    job = AnnotateJob(
        files=pair_files(files),
        out=Path(out),
        settings=settings,
        prompts=prompts,
        backend=_backend(model, asking, media.family, media.videos),
        keep_failed=keep_failed,
        **_run_settings(asking, media.threads, media.media_mb, max_failed_share, max_bad_share),
    )
    return _until_stopped(job)


@command(data, "filter")
def filter_pairs(
    *,
    files: opt.Files,
    out: opt.Out,
    verdicts_only: Annotated[bool, Option("--verdicts-only", help="Do not split.")] = False,
    model: opt.Model,
    judge: opt.Judge,
    asking: opt.Asking,
    max_failed_share: opt.MaxFailed = 0.5,
    split: opt.Split,
    job: opt.Job,
) -> int:
    """A judge says which pairs match; splits them; resumable.

    OUT/verdicts/verdicts.parquet has pair_id and verdict (match, mismatch, unknown), its card the counts by source;
    OUT/contrastive and OUT/rl are as `embedrl data split` writes them, which also splits the same verdicts in another
    way (--verdicts). Exit code 3 if rows cannot be used.
    """
    from pathlib import Path

    from embedrl_verl.annotate.relevance import RelevanceSettings, VerdictJob
    from embedrl_verl.annotate.verdict_file import VERDICTS_FOLDER
    from embedrl_verl.curate.split_job import split_pairs
    from embedrl_verl.data.files import pair_files

    split_settings = _split_settings(split)  # a wrong option is refused before the judge is asked
    asked = dict(vars(judge))
    settings = RelevanceSettings(constrained=not asked.pop("free"), **asked)
    judging = VerdictJob(
        files=pair_files(files),
        out=Path(out) / VERDICTS_FOLDER,
        settings=settings,
        backend=_backend(model, asking, "qwen3_vl", "auto"),  # the judge sees no media
        **_run_settings(asking, None, 64, max_failed_share, job.max_bad_share),
    )
    code = _until_stopped(judging)
    if verdicts_only:
        return code
    report = split_pairs(files, judging.verdicts, out, split_settings, **vars(job), command=_command_line())
    return max(code, _printed(report, *_written(out, split_settings)))


@command(data, "split")
def split_by_verdicts(
    *,
    files: opt.Files,
    verdicts: Annotated[
        str | None,
        Option(metavar="FILE", help="Of embedrl data filter; without it give --rl-from all or --holdout."),
    ] = None,
    out: opt.Out,
    split: opt.Split,
    job: opt.Job,
) -> int:
    """Contrastive and RL sets from relevance verdicts; resumable.

    Exit code 3 if rows cannot be used (they are in rejected.jsonl). `embedrl data filter` takes the same options and
    calls the judge first.
    """
    from embedrl_verl.curate.split_job import split_pairs

    settings = _split_settings(split)
    report = split_pairs(files, verdicts, out, settings, **vars(job), command=_command_line())
    return _printed(report, *_written(out, settings))


@command(data)
def content_ids(
    *,
    files: opt.Files,
    out: opt.Out,
    overwrite: opt.Overwrite = False,
    near_duplicates: Annotated[
        bool,
        Option("--near-duplicates", help="Copies of an image at another quality or size are one; decodes all targets."),
    ] = False,
    max_bits: Annotated[int, Option(help="Hashes may differ in so many of 256 bits.")] = 12,
    max_difference: Annotated[float, Option(help="Small pictures may differ by so many of 255 grey values.")] = 9.0,
    job: opt.Job,
) -> int:
    """Same content, same query_id and target_id; resumable. Exit code 3 if rows cannot be used."""
    from embedrl_verl.curate.content_ids import IdSettings, fill_content_ids
    from embedrl_verl.curate.near_duplicates import Likeness

    values = dict(vars(job))
    near = Likeness(max_bits, max_difference) if near_duplicates else None
    settings = IdSettings(media_root=values.pop("media_root"), overwrite=overwrite, near=near)
    return _printed(fill_content_ids(files, out, settings, **values, command=_command_line()))


@command(data)
def check(*, files: opt.Files, tokenizer: opt.Tokenizer = None, reading: opt.Reading, sizes: opt.Sizes) -> int:
    """Check records, media and prompt lengths.

    Prints a table by data source and a line for each row that cannot be used; the exit code is 3 if there is any. Notes
    ids that contradict the contents.
    """
    from embedrl_verl.config.schema import MediaConfig
    from embedrl_verl.data.check import check_pairs

    values = _named(reading)
    media_root, max_length = values.pop("media_root", None), values.pop("max_prompt_length", None)
    settings = MediaConfig(**values, **_named(sizes))
    return check_pairs(files, settings, media_root, tokenizer, max_length, default_family=DEFAULT_FAMILY)


@command(data)
def show(
    *,
    files: opt.Files,
    out: Annotated[str | None, Option(metavar="HTML", help="Page to write; none: FILE with .html, here.")] = None,
    page: opt.Page,
    recipe: opt.Recipe,
    reading: opt.Reading,
    sizes: opt.Sizes,
) -> int:
    """An HTML page of records, with what is wrong in them.

    It has media, boxes, key frames, evidence and T-CoTs, and is written even if every record is broken; `embedrl data
    check` is the gate.
    """
    from embedrl_verl.report.lengths import recipe_limits
    from embedrl_verl.report.show import show_records

    if page.pair_id and page.seed is not None:
        raise ConfigError("--pair-id names the records and --seed draws them; give one of the two")
    limits = recipe_limits(recipe.set, _named(recipe, reading, sizes))
    show_records(files, out, limits, default_family=DEFAULT_FAMILY, **vars(page))
    return 0


@command(data)
def stats(
    *,
    files: opt.Files,
    tokenizer: Annotated[str, Option(metavar="DIR", help="The Reasoner's folder or hub id.")],
    limit: Annotated[
        int | None, Option(min=1, help="Records to count, evenly spaced in each source; none: all.")
    ] = None,
    seed: Annotated[int | None, Option(help="With --limit: draw them at random.")] = None,
    json: Annotated[bool, Option("--json", help="Print one JSON object instead of a table.")] = False,
    recipe: opt.Recipe,
    reading: opt.Reading,
    sizes: opt.Sizes,
) -> int:
    """Lengths in tokens against the limits of a recipe.

    Prompts are counted as the rollout reads them, media included. A row that cannot be read is named and left out; the
    exit code is then 3.
    """
    from embedrl_verl.report.lengths import print_lengths, recipe_limits

    limits = recipe_limits(recipe.set, _named(recipe, reading, sizes))
    return print_lengths(files, tokenizer, limits, limit, seed, as_json=json)


def _named(*groups: Any) -> dict[str, Any]:
    """The options that were given, of groups whose fields are None where they were not."""
    values = {name: value for group in groups for name, value in vars(group).items() if value is not None}
    values.pop("set", None)
    return values


def _command_line() -> list[str]:
    """What the user called, noted in a folder that is being written."""
    return ["embedrl", *sys.argv[1:]]


def _printed(report: Any, *more: str) -> int:
    for line in (*report.lines, *more):
        print(line)
    code: int = report.exit_code
    return code


def _written(out: str, settings: Any) -> list[str]:
    return [f"wrote {shlex.quote(out)}/{name}" for name in settings.sets]


def _until_stopped(job: Any) -> int:
    """Exit code of a job of questions."""
    try:
        code: int = job.run()
    except KeyboardInterrupt:
        print("stopped; what was answered is kept, and the same command goes on", file=sys.stderr)
        raise
    return code


def _run_settings(
    asking: opt.Asking, threads: int | None, media_mb: int, max_failed_share: float, max_bad_share: float
) -> dict[str, Any]:
    """What a job of questions is told of its run."""
    from embedrl_verl.annotate.job import RunSettings
    from embedrl_verl.data.threads import default_threads

    return {
        "how": RunSettings(
            limit=asking.limit,
            threads=threads or default_threads(),
            media_bytes=media_mb << 20,
            max_failed_share=max_failed_share,
            max_rejected_share=max_bad_share,
            retry_failed=asking.retry_failed,
            price_prompt=asking.price_prompt,
            price_completion=asking.price_completion,
        ),
        "rows_per_part": asking.shard_rows,
        "command": _command_line(),
    }


def _backend(model: opt.Model, asking: opt.Asking, family: Family, videos: str) -> Any:
    """Servers of --url, or the engine of --engine."""
    if bool(model.url) == bool(model.engine):
        raise ConfigError("name who answers: --url of a running server (repeat for several), or --engine PATH")
    if model.engine:
        if model.model or model.extra_body:
            raise ConfigError("--model and --extra-body go with --url alone; leave them out")
        from embedrl_verl.annotate.engine import EngineBackend

        return EngineBackend(model.engine, family, model.engine_args or {})
    if model.engine_args:
        raise ConfigError("--engine-args goes with --engine alone; leave it out")
    from embedrl_verl.annotate.backends import ServerBackend
    from embedrl_verl.serving import PoolSettings, ServerPool

    pool = ServerPool(
        model.url,
        PoolSettings(limit=asking.limit, timeout_s=asking.timeout, retries=5, probe_interval_s=5.0),
        api_key=os.environ.get("EMBEDRL_API_KEY"),
        name="model server",
    )
    return ServerBackend(pool, family, model.model, videos, model.extra_body or {}, asking.patience)


def _split_settings(split: opt.Split) -> Any:
    from embedrl_verl.curate.split import SplitSettings

    rows: dict[str, int] = {}
    for text in split.rl_rows:
        source, _, number = text.rpartition("=")
        if not number.isdecimal():
            raise ConfigError(f"--rl-rows takes N or SOURCE=N; got {text!r}")
        rows[source] = int(number)
    each = rows.pop("", None)
    values = dict(vars(split))
    sampling, seed = values.pop("rl_sampling"), values.pop("split_seed")
    values |= {"rl_rows": rows, "contrastive_without": tuple(split.contrastive_without)}
    return SplitSettings(**values, rl_rows_each=each, sampling=sampling, seed=seed)
