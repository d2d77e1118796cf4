# SPDX-License-Identifier: Apache-2.0
"""How commands declare options, and the groups of options that commands share.

A group is a dataclass: `spread` makes an option of each field, under the dataclass's docstring in the help. Annotations
are read as objects, so this folder has no `from __future__ import annotations`; and nothing heavy is imported here, so
that `embedrl --help` answers at once.
"""

import functools
import inspect
import json
from collections import defaultdict
from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal, get_args

from typer import Argument, Option, Typer
from typer.core import TyperCommand

from embedrl_verl.families import BoxConvention, Family

TAKES_WORDS = ("--set", "--pair-id", "--kwargs")
"""Options that take all words up to the next option."""


def spread(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command one option for each field of the dataclasses that it takes."""
    groups: dict[str, Any] = {}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        group = parameter.annotation
        if not is_dataclass(group):
            parameters.append(parameter)
            continue
        groups[name] = group
        for one in fields(group):
            kind, option = get_args(one.type)
            option = copy(option)
            option.rich_help_panel = group.__doc__
            default = one.default if one.default_factory is MISSING else one.default_factory()
            parameters.append(parameter.replace(name=one.name, default=default, annotation=Annotated[kind, option]))

    @functools.wraps(command)
    def flat(**values: Any) -> int:
        for name, group in groups.items():
            values[name] = group(**{one.name: values.pop(one.name) for one in fields(group)})
        return command(**values)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return flat


class Command(TyperCommand):
    """A command whose help has a heading for each group, and whose options may take several words (`TAKES_WORDS`)."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spelt, taking = [], ""
        for word, after in zip(args, [*args[1:], "-"], strict=False):
            taking = word if word in TAKES_WORDS else "" if word.startswith("-") else taking
            if word != taking:
                spelt += [taking, word] if taking else [word]
            elif after.startswith("-"):
                spelt += [word, ""]  # no word at all
        return super().parse_args(ctx, spelt)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        headings = defaultdict(list)
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                headings[getattr(parameter, "rich_help_panel", None) or "options"].append(record)
        for heading, records in headings.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def command(app: Typer, name: str | None = None) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorator that adds a function to `app`, with groups and options of several words."""
    return lambda function: app.command(name, cls=Command)(spread(function))


def json_object(text: str) -> dict[str, Any]:
    """The object that a word of JSON is."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object; got {value!r}")
    return value


Embedder = Annotated[str, Option(metavar="DIR", help="The Embedder: folder or hub id.")]
Files = Annotated[list[str], Argument(metavar="FILE", help="Parquet file of pair records, or data set folder.")]
Out = Annotated[str, Option(metavar="DIR", help="Folder to write.")]
MediaRoot = Annotated[str | None, Option(metavar="DIR", help="Of all media paths; none: as the data cards say.")]
MaxBad = Annotated[float, Option(min=0, max=1, help="Stop above this fraction of rows that cannot be used.")]
MaxFailed = Annotated[float, Option(min=0, max=1, help="Stop above this fraction of questions without an answer.")]
Instruction = Annotated[str, Option(help="Said to inputs that bring none.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Also replace what is there.")]
Seed = Annotated[int, Option(help="Of what is drawn.")]
Style = Annotated[Literal["paper", "compact"], Option(help="Templates: paper, or compact for tiny models.")]
Temperature = Annotated[float, Option(min=0, max=2, help="0: greedy.")]
Tokenizer = Annotated[str | None, Option(metavar="DIR", help="The Reasoner's folder; counts the tokens of prompts.")]


@dataclass(frozen=True)
class Sizes:
    """media, in visual tokens (data.embedrl)"""

    image_min_tokens: Annotated[int | None, Option(help="(128)")] = None
    image_max_tokens: Annotated[int | None, Option(help="(768)")] = None
    frame_min_tokens: Annotated[int | None, Option(help="(128)")] = None
    frame_max_tokens: Annotated[int | None, Option(help="(300)")] = None
    max_frames: Annotated[int | None, Option(help="Frames of a clip (8).")] = None


@dataclass(frozen=True)
class Reading:
    """how records are read"""

    media_root: MediaRoot = None
    family: Annotated[str | None, Option(help="qwen2_vl, qwen2_5_vl, qwen3_vl, or auto: by the tokenizer.")] = None
    prompt_style: Annotated[str | None, Option(help="Prompt templates: paper or compact (paper).")] = None
    max_prompt_length: Annotated[int | None, Option(min=1, help="data.max_prompt_length, in tokens.")] = None


@dataclass(frozen=True)
class Recipe:
    """recipe that the data is held against"""

    set: Annotated[list[str], Option(metavar="KEY=VALUE...", help="Hydra overrides, as a recipe takes them.")] = field(
        default_factory=list
    )
    max_response_length: Annotated[int | None, Option(min=1, help="data.max_response_length (2048).")] = None


@dataclass(frozen=True)
class RunPage:
    """page"""

    data: Annotated[
        list[str] | None, Option(metavar="FILE", help="Pair files; none: those of the run; may be given again.")
    ] = None
    media_root: Annotated[str | None, Option(metavar="DIR", help="Of media paths; none: as in the run.")] = None
    max_mib: Annotated[float, Option(min=0.25, help="Limit of the page's size.")] = 20.0
    picture_side: Annotated[int, Option(min=32, help="Longest side of a picture, pixels.")] = 640


@dataclass(frozen=True)
class Page:
    """page"""

    limit: Annotated[int, Option(min=1, help="Records to show.")] = 50
    seed: Annotated[int | None, Option(help="Draw them at random; none: evenly spaced.")] = None
    pair_id: Annotated[list[str] | None, Option(metavar="ID...", help="Show these records.")] = None
    only: Annotated[Literal["problems"] | None, Option(help="Show those of --scan records that have a fault.")] = None
    scan: Annotated[int, Option(min=1, help="Records that --only looks through.")] = 2000
    tokenizer: Tokenizer = None
    boxes: Annotated[BoxConvention | None, Option(help="Units of boxes, if not the family's.")] = None
    verdicts: Annotated[str | None, Option(metavar="FILE", help="Of embedrl data filter; none: those near FILE.")] = (
        None
    )
    max_mib: Annotated[float, Option(min=0.25, help="Limit of the page's size.")] = 20.0
    picture_side: Annotated[int, Option(min=32, help="Longest side of a picture, pixels.")] = 640


@dataclass(frozen=True)
class Model:
    """model"""

    url: Annotated[list[str], Option(help="OpenAI-style server; repeat for several.")] = field(default_factory=list)
    model: Annotated[str | None, Option(help="Served name; asked of the server if it serves one.")] = None
    engine: Annotated[str | None, Option(metavar="PATH", help="Instead of --url: vLLM in this process.")] = None
    engine_args: Annotated[
        dict[str, Any] | None, Option(metavar="JSON", parser=json_object, help='Of vllm.LLM, {"dtype": ...}.')
    ] = None
    extra_body: Annotated[
        dict[str, Any] | None, Option(metavar="JSON", parser=json_object, help="More fields of every request.")
    ] = None


@dataclass(frozen=True)
class Computed:
    """models"""

    device: Annotated[str, Option(help="Of all models; auto: a GPU if there is one.")] = "auto"
    set: Annotated[list[str], Option(metavar="KEY=VALUE...", help="Settings of the run, spelt as for hydra.")] = field(
        default_factory=list
    )

    @property
    def overrides(self) -> tuple[str, ...]:
        """`set` without the empty word of a bare --set."""
        return tuple(word for word in self.set if word)


@dataclass(frozen=True)
class Reasoned(Computed):
    """pair"""

    reasoner: Annotated[
        str | None, Option(metavar="DIR|URL", help="What writes T-CoTs: folder, hub id, or OpenAI-style server.")
    ] = None
    engine: Annotated[
        Literal["transformers", "vllm"] | None, Option(help="What runs a Reasoner's folder (transformers).")
    ] = None
    prompts_like: Annotated[
        str | None, Option(metavar="DIR", help="Of a server: the folder of its model, which says how it is asked.")
    ] = None

    @property
    def named(self) -> dict[str, Any]:
        """`PairOptions` that were given, without the Embedder."""
        values = {**vars(self), "overrides": self.overrides}
        del values["set"]
        return {name: value for name, value in values.items() if value}

    def pair(self, embedder: str) -> Any:
        """`PairOptions` with this Embedder."""
        from embedrl_verl.model.options import PairOptions

        return PairOptions(embedder, **self.named)


@dataclass(frozen=True)
class Placed:
    """where"""

    workers: Annotated[
        int | None,
        Option(min=1, help="Processes with models of their own, and a GPU each; none: this one, with --ray one a GPU."),
    ] = None
    ray: Annotated[
        str | None, Option(metavar="HOST:PORT|auto", help="Ray cluster that has the workers; none: this machine.")
    ] = None

    @property
    def cluster(self) -> Any:
        """Of these workers; None: this process alone."""
        from embedrl_verl.platforms.cluster import Cluster

        return None if self.workers is self.ray is None else Cluster(self.ray, self.workers)


@dataclass(frozen=True)
class Media:
    """how media are sent"""

    family: Annotated[Family, Option(help="Of the model: units of its boxes, size of its visual tokens.")] = "qwen3_vl"
    videos: Annotated[
        Literal["auto", "video_url", "images"], Option(help="vLLM's list of frames, images, or by the server.")
    ] = "auto"
    media_root: MediaRoot = None
    threads: Annotated[int | None, Option(min=1, help="For media; none: one a core, 16 at most.")] = None
    media_mb: Annotated[int, Option(min=1, help="Encoded media in memory, MB.")] = 2048


@dataclass(frozen=True)
class Questions:
    """questions and replies"""

    side: Annotated[Literal["both", "query", "target"], Option(help="Sides to ask about.")] = "both"
    overwrite: Overwrite = False
    style: Style = "paper"
    no_few_shot: Annotated[bool, Option("--no-few-shot", help="Leave the worked examples out.")] = False
    gold_share: Annotated[float, Option(min=0, max=1, help="Fraction of the queries told their text target.")] = 0.0
    tries: Annotated[int, Option(min=1, help="Times one side is asked about, at most.")] = 3
    reask: Annotated[
        Literal["explain", "resample"] | None, Option(help="After a bad reply (explain; --style compact: resample).")
    ] = None
    temperature: Temperature = 0.0
    top_p: Annotated[float, Option(min=0.001, max=1, help="Of sampling.")] = 1.0
    retry_temperature: Annotated[float, Option(min=0, max=2, help="Of resampled replies, at least.")] = 0.7
    max_tokens: Annotated[int, Option(min=1, help="Of a reply.")] = 1024
    evidence: Annotated[
        Literal["off", "usable", "strict"], Option(help="Boxes, frames, keywords that must hold: none, one, all.")
    ] = "usable"
    seed: Seed = 0


@dataclass(frozen=True)
class Judge:
    """judge"""

    style: Style = "paper"
    tries: Annotated[int, Option(min=1, help="Times one pair is asked about, at most.")] = 2
    temperature: Temperature = 0.0
    retry_temperature: Annotated[float, Option(min=0, max=2, help="Of later tries, at least.")] = 0.7
    max_tokens: Annotated[int, Option(min=1, help="Of a reply; raise it for judges that reason.")] = 16
    free: Annotated[bool, Option("--free", help="Do not constrain vLLM to the two words.")] = False
    seed: Seed = 0


@dataclass(frozen=True)
class Asking:
    """run (nothing here changes an answer)"""

    limit: Annotated[int, Option(help="Requests in flight.")] = 256
    timeout: Annotated[float, Option(help="Seconds for one request.")] = 600.0
    patience: Annotated[float, Option(help="Seconds without a server before the job stops.")] = 300.0
    shard_rows: Annotated[int, Option(min=1, help="Rows of a part, about.")] = 2048
    retry_failed: Annotated[
        bool, Option("--retry-failed", help="Ask again what earlier runs of an unfinished job had no result for.")
    ] = False
    price_prompt: Annotated[float | None, Option(min=0, help="Money for a million prompt tokens.")] = None
    price_completion: Annotated[float | None, Option(min=0, help="Money for a million reply tokens.")] = None


@dataclass(frozen=True)
class Rules:
    """protocol (stamped into every score file)"""

    frames: Annotated[int, Option(min=1, help="Of a clip.")] = 8
    short_clips: Annotated[
        Literal["as_they_are", "last_repeated"], Option(help="Clips of fewer frames (upstream repeats since 2026).")
    ] = "as_they_are"
    white_space: Annotated[
        Literal["raw", "collapsed"], Option(help="Of texts; collapsed: no space before a line's end, as VLM2Vec.")
    ] = "raw"
    candidate_instruction: Annotated[Literal["task", "none"], Option(help="What is said to candidates.")] = "task"
    pool: Annotated[
        Literal["table", "global"], Option(help="Candidates: local or global by task, or global for all.")
    ] = "table"
    revision: Annotated[str | None, Option(help="Of repositories on the hub.")] = None
    limit: Annotated[int | None, Option(min=1, help="Queries of a task, the first (no score of all).")] = None


@dataclass(frozen=True)
class Job:
    """job"""

    media_root: MediaRoot = None
    workers: Annotated[int | None, Option(help="Processes; none: the CPUs.")] = None
    rows_per_part: Annotated[int, Option(help="Of the written files.")] = 50_000
    max_bad_share: MaxBad = 0.01


@dataclass(frozen=True)
class Split:
    """split"""

    rl_from: Annotated[
        Literal["mismatch", "match", "all"], Option(help="RL draws pairs dropped (paper 3.2), kept (its C.3), or all.")
    ] = "mismatch"
    rl_preset: Annotated[str, Option(help="RL pairs of each source by a table: rl_13.")] = ""
    rl_rows: Annotated[
        list[str], Option(metavar="[SOURCE=]N", help="RL gets N of a source, or at most N of each other; repeat.")
    ] = field(default_factory=list)
    allow_short: Annotated[bool, Option("--allow-short", help="A named source may have fewer pairs, or none.")] = False
    rl_sampling: Annotated[
        Literal["even", "random"], Option(help="At floor(i n / k) of a source's n candidates, or by --split-seed.")
    ] = "even"
    split_seed: Annotated[int, Option(help="Of --rl-sampling random and --holdout.")] = 0
    unknown: Annotated[Literal["left_out", "match"], Option(help="Pairs without a verdict.")] = "left_out"
    keep_rl_matches: Annotated[
        bool, Option("--keep-rl-matches", help="RL pairs that match are in the contrastive set as well.")
    ] = False
    contrastive_without: Annotated[
        list[str],
        Option(
            metavar="SOURCE", help="Not contrastive (paper: mmeb_hatefulmemes, mmeb_n24news, mmeb_voc2007); repeat."
        ),
    ] = field(default_factory=list)
    disjoint_targets: Annotated[
        Literal["off", "media", "all"], Option(help="Leave out contrastive pairs whose target content RL has.")
    ] = "off"
    holdout: Annotated[
        float | None, Option(metavar="N|SHARE", help="Hold out so many matches, whose contents no other set has.")
    ] = None
