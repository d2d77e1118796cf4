# SPDX-License-Identifier: Apache-2.0
"""`embedrl`: the command line. It parses options and calls; what a command does is in the room that knows the subject,
which is imported when the command is called, so `embedrl --help` answers at once.

Exit codes: 0 done, 2 usage or configuration, 3 data, 4 anything else that this package refuses.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from embedrl_verl import __version__
from embedrl_verl.cli.data import data
from embedrl_verl.cli.options import (
    Computed,
    Embedder,
    Files,
    MediaRoot,
    Out,
    Overwrite,
    Placed,
    Reasoned,
    Rules,
    RunPage,
    command,
)
from embedrl_verl.cli.pair import gate, pair
from embedrl_verl.errors import ConfigError, EmbedRLError

app = typer.Typer(
    help="Embedder-guided RL for multimodal embeddings, on stock verl.",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)
rollouts = typer.Typer(help="What a run's Reasoner wrote.")
reward = typer.Typer(help="Reward functions: list them, try one on a run.")
app.add_typer(data, name="data")
app.add_typer(pair)
app.add_typer(gate, name="gate")
app.add_typer(reward, name="reward")
app.add_typer(rollouts, name="rollouts")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its errors become one line on standard error and their exit code."""
    try:
        return app(argv, prog_name="embedrl", standalone_mode=False) or 0
    except EmbedRLError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except typer.TyperException as error:  # wrong usage
        error.show()  # type: ignore[attr-defined]
        return error.exit_code


def _print_version(asked: bool) -> None:
    if asked:
        print(f"embedrl-verl {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print it and end.")
    ] = False,
) -> None:
    pass


@app.command()
def doctor() -> int:
    """Versions, plugin, devices; what a recipe would use here."""
    from embedrl_verl.doctor import main as report

    return report()


@app.command()
def plan(
    overrides: Annotated[
        list[str] | None, Argument(metavar="KEY=VALUE...", help="Hydra overrides, as for python -m embedrl_verl.train.")
    ] = None,
    config_name: Annotated[str, Option(help="File in embedrl_verl/config.")] = "egrl_trainer",
) -> int:
    """Check a run's configuration and print its plan. Starts nothing."""
    from embedrl_verl.config.compose import compose
    from embedrl_verl.plan import print_plan

    print_plan(compose(overrides or [], config_name))
    return 0


@app.command()
def add_emb(checkpoint: Annotated[str, Argument(help="Folder or hub id.")], out: Out) -> int:
    """Give a Qwen-VL checkpoint the token <emb>. It can then be trained as Embedder."""
    from embedrl_verl.embedder.profiles import add_emb_token

    number = add_emb_token(checkpoint, out)
    print(f"wrote {out}; <emb> is token {number}")
    return 0


@app.command()
def export(
    checkpoint: Annotated[str, Argument(help="Folder that verl wrote: global_step_N, or one in it.")],
    out: Annotated[str, Option(metavar="DIR", help="Folder to write; must not exist or be empty.")],
    kind: Annotated[
        Literal["auto", "embedder", "reasoner"], Option(help="What the model is; auto: if it shows.")
    ] = "auto",
    base_model: Annotated[
        str | None,
        Option(help="Model that training began with: for the card, and the weights under an adapter saved alone."),
    ] = None,
    profile: Annotated[str, Option(help="Prompt of an Embedder; auto: embed_rl if it has <emb>.")] = "auto",
    keep_adapter: Annotated[bool, Option("--keep-adapter", help="Also write the LoRA adapter, as peft does.")] = False,
    force: Annotated[bool, Option("--force", help="Replace DIR if it holds a model.")] = False,
) -> int:
    """Turn a checkpoint into a Hugging Face folder. It is complete or not there at all."""
    from embedrl_verl.export.folder import export_checkpoint

    written = export_checkpoint(
        checkpoint,
        out,
        kind=None if kind == "auto" else kind,
        base_model=base_model,
        profile=profile,
        force=force,
        keep_adapter=keep_adapter,
    )
    print(
        f"wrote the {written.kind} to {written.folder}: {written.weights} weights, {written.parameters:,} parameters, "
        f"{written.dtype}"
    )
    return 0


@app.command()
def serve_embedder(
    path: Annotated[str, Argument(help="The Embedder: folder or hub id.")],
    profile: Annotated[str, Option(help="Its prompt, as embedrl.embedder.profile.")] = "auto",
    dtype: Annotated[Literal["bfloat16", "float32"] | None, Option(help="None: bfloat16, float32 on a CPU.")] = None,
    device: Annotated[Literal["auto", "gpu", "cpu"], Option(help="auto: a GPU if there is one.")] = "auto",
    gpus: Annotated[int, Option(help="GPUs of the server.")] = 1,
    gpu_memory_utilization: Annotated[float, Option(help="Fraction of a GPU's memory.")] = 0.9,
    max_model_len: Annotated[int, Option(help="Longest prompt, in tokens.")] = 32768,
    image_tokens: Annotated[tuple[int, int], Option(metavar="MIN MAX", help="Of an image.")] = (128, 768),
    frame_tokens: Annotated[tuple[int, int], Option(metavar="MIN MAX", help="Of a frame.")] = (128, 300),
    max_frames: Annotated[int, Option(help="Of a video.")] = 8,
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(help="Port to listen on.")] = 8000,
    template: Annotated[Path, Option(metavar="FILE", help="Chat template, which is written.")] = Path(
        "embedding_template.jinja"
    ),
    only_print: Annotated[bool, Option("--print", help="Print the command and end.")] = False,
    vllm_arg: Annotated[
        list[str] | None, Option(help="One more argument of vllm serve, as --vllm-arg=--max-num-seqs=64; repeat.")
    ] = None,
) -> int:
    """Serve an Embedder with stock vLLM.

    Runs with embedrl.embedder.backend=server name it in embedrl.embedder.server.urls, and refuse one whose prompts or
    image limits are others than theirs. Bare texts get the prompt of the Embedder too.
    """
    import torch

    from embedrl_verl.config.schema import EmbedderConfig, EmbedderServerConfig
    from embedrl_verl.embedder.processor import processor_for
    from embedrl_verl.embedder.served.command import prompt_template, server_arguments, server_command, shell_line

    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    config = EmbedderConfig(
        path=path,
        profile=profile,
        backend="server",
        dtype=dtype or ("float32" if on_cpu else "bfloat16"),
        image_min_tokens=image_tokens[0],
        image_max_tokens=image_tokens[1],
        frame_min_tokens=frame_tokens[0],
        frame_max_tokens=frame_tokens[1],
        server=EmbedderServerConfig(
            n_gpus_per_server=gpus,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            extra_args=tuple(vllm_arg or ()),
        ),
    )
    processor = processor_for(config, max_frames=max_frames)
    template.write_text(prompt_template(processor), encoding="utf-8")
    arguments = server_arguments(config, processor, on_cpu=on_cpu, plain_input=True)
    command = server_command(arguments, template.resolve(), host=host, port=port)
    if only_print:
        print(shell_line(command))
        return 0
    sys.stdout.flush()
    os.execv(command[0], command)


@command(app, "eval")
def evaluate(
    file: Files,
    embedder: Embedder,
    out: Out,
    models: Computed,
    reasoner: Annotated[
        list[str] | None,
        Option(metavar="[NAME=]DIR", help="A Reasoner whose T-CoTs are tried; repeat, as before=A and after=B."),
    ] = None,
    media_root: MediaRoot = None,
    limit: Annotated[int | None, Option(min=1, help="Pairs of each data source, the first.")] = None,
    overwrite: Overwrite = False,
) -> int:
    """Retrieval on pair files: plain, and with the T-CoTs of Reasoners.

    Hit@1 by data source with intervals; evaluation.json and every T-CoT (tcots.jsonl) in DIR.
    """
    from embedrl_verl.evaluation.command import run_eval

    run_eval(
        file,
        embedder,
        reasoner or [],
        out,
        media_root=media_root,
        limit=limit,
        device=models.device,
        overrides=models.overrides,
        overwrite=overwrite,
    )
    return 0


@command(app)
def report(
    *,
    run: Annotated[str, Argument(help="Folder of a run, or of embedrl eval.")],
    out: Annotated[str | None, Option(metavar="HTML", help="Page to write; none: RUN/report.html.")] = None,
    cases: Annotated[int, Option(min=0, help="Cases to show that RL fixed, and that it broke.")] = 6,
    page: RunPage,
) -> int:
    """One HTML file about a run or an evaluation.

    Curves, what the reward's terms teach, Hit@1 by data source, and cases.
    """
    from embedrl_verl.report.run_report import report_run

    report_run(run, out, cases=cases, **vars(page))
    return 0


@command(app)
def benchmark(
    *,
    name: Annotated[
        Literal["mmeb_v2", "uvrb", "mmeb_v3", "own"],
        Argument(help="MMEB-V2 (78 tasks), UVRB (16), or tasks of --tables: MMEB-V3's, or your own."),
    ],
    embedder: Embedder,
    data_root: Annotated[str, Option(metavar="DIR", help="Holds the hub's repositories as folders, media among them.")],
    out: Out,
    reasoned: Reasoned,
    rules: Rules,
    placed: Placed,
    tables: Annotated[
        list[str] | None,
        Option(metavar="YAML|DIR", help="Tasks, in the schema of VLM2Vec's tables; repeat."),
    ] = None,
    tasks: Annotated[str | None, Option(metavar="A,B", help="None: all.")] = None,
    tcots: Annotated[str | None, Option(metavar="DIR", help="Has T-CoTs: TASK.query.jsonl, .candidate.jsonl.")] = None,
    retry_failed: Annotated[
        bool, Option("--retry-failed", help="Compute tasks again of which items had no vector or no T-CoT.")
    ] = False,
) -> int:
    """Score public benchmarks, or your own data in their layout, plain and with T-CoTs.

    The same command goes on where it was killed: tasks with a score file in --out are not computed again. With
    --workers or --ray each task is computed by one of them.
    """
    from embedrl_verl.evaluation.benchmarks import task
    from embedrl_verl.evaluation.benchmarks.command import run_benchmark

    given = dict(vars(rules))
    revision = given.pop("revision")
    run_benchmark(
        name,
        reasoned.pair(embedder),
        out,
        data_root,
        tasks=tasks.split(",") if tasks else (),
        tcots=tcots,
        tables=tables or (),
        revision=revision,
        rules=task.Rules(**given),
        retry_failed=retry_failed,
        cluster=placed.cluster,
    )
    return 0


@command(app)
def compare(
    one: Annotated[str, Argument(metavar="DIR", help="A folder of embedrl benchmark, or of embedrl eval.")],
    other: Annotated[str, Argument(metavar="DIR", help="Another (or the same, for two of its cells).")],
    cell: Annotated[str | None, Option(help="Of the first (tcot-tcot, after); none: all that both have.")] = None,
    base: Annotated[str | None, Option(help="Of the second, compared with --cell; none: the same.")] = None,
) -> int:
    """What one result gains over another, query by query, with paired 95% intervals.

    Results of other data, candidates, frames, prompts or pixels are refused, and the first difference is named.
    """
    from embedrl_verl.evaluation.paired import compare as lines

    print("\n".join(lines(one, other, cell=cell, base=base)))
    return 0


@command(rollouts, "show")
def show_rollouts(
    *,
    run: Annotated[str, Argument(help="Folder of a run, or of embedrl eval.")],
    steps: Annotated[
        str | None, Option(metavar="1,40", help="Rollouts of these steps; none: the evaluation's.")
    ] = None,
    out: Annotated[str | None, Option(metavar="HTML", help="Page to write; none: RUN/rollouts.html.")] = None,
    limit: Annotated[int, Option(min=1, help="Pairs, of each step.")] = 40,
    page: RunPage,
) -> int:
    """An HTML page of T-CoTs with boxes, key frames, ranks and reward parts.

    Before and after RL side by side, or the best and the worst rollouts of training steps.
    """
    from embedrl_verl.report.rollouts import show_rollouts as show

    show(
        run,
        out,
        steps=steps,
        limit=limit,
        **vars(page),
    )
    return 0


@reward.command("list")
def list_functions() -> int:
    """The ready-made functions and what they need."""
    from embedrl_verl.rewards.trial import print_functions

    print_functions()
    return 0


@command(reward, "try")
def try_function(
    file: Annotated[
        str,
        Argument(
            metavar="FILE[:FUNCTION]",
            help="File, pkg://module, or a name of `embedrl reward list`; default function: compute_score.",
        ),
    ],
    run: Annotated[
        str | None, Argument(metavar="RUN", help="Folder of a run, of its rollouts, or one dump file.")
    ] = None,
    dump: Annotated[str | None, Option(metavar="RUN", help="The same, as an option.")] = None,
    kwargs: Annotated[
        list[str] | None,
        Option(
            metavar="KEY=VALUE...",
            help="reward_kwargs, spelt as for hydra; none: those of the run for its own function.",
        ),
    ] = None,
    steps: Annotated[str | None, Option(metavar="1,5-10", help="These steps only.")] = None,
    limit: Annotated[int, Option(min=0, help="Rows to show, largest change first.")] = 5,
    json: Annotated[bool, Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> int:
    """Score a run's rollouts with another function. Needs no GPU."""
    from embedrl_verl.rewards.trial import print_json, print_tables, try_on_run

    if (run is None) == (dump is None):
        raise ConfigError(f"name one RUN, after FILE or with --dump; got {f'{run} and {dump}' if run else 'none'}")
    with redirect_stdout(sys.stderr) if json else nullcontext():  # what a reward function prints is no JSON
        report = try_on_run(file, str(run or dump), kwargs, steps, limit)
    print_json(report) if json else print_tables(report)
    return 0
