# SPDX-License-Identifier: Apache-2.0
"""The command line: light to start, options that reach the jobs, and one line with an exit code for every error."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

from embedrl_verl import __version__, cli
from embedrl_verl.curate.split import SplitSettings
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.errors import ConfigError, DataError, EmbedderError, EmbedRLError

HEAVY = {"torch", "verl", "ray", "vllm", "pyarrow", "numpy", "transformers", "hydra"}
Run = Callable[..., Any]
SIZES = " image-min-tokens image-max-tokens frame-min-tokens frame-max-tokens max-frames"
READING = " media-root family prompt-style max-prompt-length tokenizer"
MODEL = (
    " url model engine engine-args extra-body limit timeout patience shard-rows retry-failed"
    " price-prompt price-completion max-failed-share max-bad-share style tries temperature retry-temperature"
    " max-tokens seed"
)
JOB = " media-root workers rows-per-part max-bad-share out"
SPLIT = (
    " rl-from rl-preset rl-rows allow-short rl-sampling split-seed unknown keep-rl-matches contrastive-without"
    " disjoint-targets holdout"
)
REASONED = " reasoner engine prompts-like device set"
OPTIONS = {
    "embed": "embedder out think with-plain side instruction media-root max-failed-share retry-failed batch-size"
    " rows-per-part workers ray" + REASONED,
    "search": "embedder query image instruction top think gate index" + REASONED,
    "gate fit": "embedder out media-root limit" + REASONED,
    "gate score": "embedder gate media-root limit" + REASONED,
    "serve": "embedder think instruction name host port batch-size max-inputs max-body-mib max-waiting"
    " api-key page vectors gate" + REASONED,
    "doctor": "",
    "plan": "config-name",
    "add-emb": "out",
    "export": "base-model force keep-adapter kind out profile",
    "serve-embedder": "device dtype gpu-memory-utilization gpus host image-tokens frame-tokens max-frames port"
    " max-model-len print profile template vllm-arg",
    "report": "cases data max-mib media-root out picture-side",
    "data annotate": "evidence family gold-share keep-failed media-mb media-root no-few-shot out overwrite reask side"
    " threads top-p videos" + SIZES + MODEL,
    "data filter": "free verdicts-only" + MODEL + JOB + SPLIT,
    "data split": "verdicts" + JOB + SPLIT,
    "data content-ids": "max-bits max-difference near-duplicates overwrite" + JOB,
    "data check": SIZES + READING,
    "data show": "boxes limit max-mib only out pair-id picture-side scan seed verdicts set max-response-length"
    + SIZES
    + READING,
    "data stats": "json limit seed set max-response-length" + SIZES + READING,
    "compare": "cell base",
    "benchmark": "embedder data-root out tables tasks tcots limit frames short-clips white-space candidate-instruction"
    " pool retry-failed revision workers ray" + REASONED,
    "reward list": "",
    "reward try": "dump json kwargs limit steps",
}


@pytest.mark.parametrize(
    "words", [["--help"], ["data", "annotate", "--help"], ["reward", "try", "--help"], ["serve", "--help"]]
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = f"import sys; from embedrl_verl.cli import main; main({words}); print('\\n', {HEAVY} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.splitlines()[-1].strip() == "set()" and "Usage: embedrl" in result.stdout


@pytest.mark.parametrize(("error", "code"), [(ConfigError, 2), (DataError, 3), (EmbedderError, 4)])
def test_an_error_is_one_line_on_standard_error_and_its_exit_code(
    error: type[EmbedRLError], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise error("rule, value, fix")

    monkeypatch.setattr("embedrl_verl.config.compose.compose", refuse)
    assert cli.main(["plan"]) == code
    captured = capsys.readouterr()
    assert captured.err == f"{error.__name__}: rule, value, fix\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "Missing command"),
        ("no-such-command", "No such command 'no-such-command'"),
        ("data", "Missing command"),
        ("data check", "Missing argument"),
        ("data split f", "Missing option '--out'"),
        ("data split f --out o --rl-from both", "'both' is not one of 'mismatch', 'match', 'all'"),
        ("data annotate f --out o --engine-args [1]", "'--engine-args': Value error, must be a JSON object; got [1]"),
        ("data annotate f --out o --engine-args {", "'--engine-args': Value error, Expecting"),
        (
            "data annotate f --out o --retry-failed --shard-rows 0",
            "'--shard-rows': Input should be greater than or equal to 1",
        ),
        ("data annotate f --out o --gold-share 2", "'--gold-share': Input should be less than or equal to 1"),
        ("data annotate f --out o --tries 0", "'--tries': Input should be greater than or equal to 1"),
        ("data annotate f --out o --price-prompt -1", "'--price-prompt': Input should be greater than or equal to 0"),
        ("data annotate f --out o --max-bad-share 2", "'--max-bad-share': Input should be less than or equal to 1"),
        ("reward try f --dump d --limit -1", "'--limit': Input should be greater than or equal to 0"),
    ],
)
def test_wrong_usage_exits_with_2(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("Usage: embedrl") and message in error


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"embedrl-verl {__version__}\n"


def test_help_names_the_options_of_each_group_under_its_heading(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "content-ids", "--help"]) == 0
    own, job = capsys.readouterr().out.split("\njob:\n")
    assert "--near-duplicates" in own and "--workers" in job and "--media-root DIR" in job and "--out" not in job


@pytest.mark.parametrize("command", OPTIONS)
def test_commands_have_these_options(command: str) -> None:
    found: Any = typer.main.get_command(cli.app)
    for name in command.split():
        found = found.commands[name]
    names = {name for parameter in found.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {name for name in names if name.startswith("--")} == {f"--{name}" for name in OPTIONS[command].split()}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """`called("module.function", "data", ...)`: what a command calls the function with; its work is left out."""

    def run(target: str, *words: object) -> Any:
        found: list[tuple[Any, ...]] = []
        report = type("Report", (), {"lines": [], "exit_code": 0})()
        with monkeypatch.context() as patch:
            patch.setattr(f"embedrl_verl.{target}", lambda *args, **kwargs: found.append((*args, kwargs)) or report)
            cli.main([str(word) for word in words])
        return found[0]

    return run


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--kwargs", "a=1", "b=2", "--limit", "3"], ["a=1", "b=2"]),
        (["--kwargs", "a=1", "--limit", "3", "--kwargs", "b=2"], ["a=1", "b=2"]),
        (["--kwargs=a=1"], ["a=1"]),
        (["--kwargs", "--limit", "3"], [""]),
        (["--kwargs"], [""]),
        ([], None),
    ],
)
def test_an_option_takes_all_words_up_to_the_next_one(
    called: Run, words: list[str], wanted: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedrl_verl.rewards.trial.print_tables", lambda report: None)
    seen = called("rewards.trial.try_on_run", "reward", "try", "mine.py", "--dump", "run", "--steps", "1", *words)
    assert seen[:4] == ("mine.py", "run", wanted, "1") and seen[4] == (3 if "--limit" in words else 5)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_pairs([PairRecord("p", "s", "", Item("q"), Item("t"), "", ())], tmp_path / "in.parquet")
    return tmp_path / "in.parquet"


def test_the_options_of_annotate_reach_the_job(called: Run, file: Path) -> None:
    words = [file, "--out", file.parent / "o", "--url", "a:1", "--url", "b:2", "--family", "qwen2_5_vl"]
    words += ["--side", "target", "--gold-share", "0.5", "--limit", "999", "--extra-body", '{"top_k": 1}']
    words += ["--max-frames", "3", "--threads", "2", "--media-mb", "7", "--max-failed-share", "0.3", "--top-p", "0.9"]
    (job, _) = called("annotate.tcots.AnnotateJob.run", "data", "annotate", *words)
    assert job.backend.pool.urls == ("http://a:1", "http://b:2") and job.backend.extra == {"top_k": 1}
    settings, prompts = job.settings, job.prompts
    assert (settings.sides, settings.gold_share, settings.top_p) == (("target",), 0.5, 0.9)
    assert job.how.limit == 999 == job.backend.pool.settings.limit
    assert (job.how.threads, job.how.media_bytes) == (2, 7 << 20)
    assert (job.how.max_failed_share, job.how.max_rejected_share, job.rows_per_part) == (0.3, 0.01, 2048)
    limits = prompts.limits
    assert (prompts.family, prompts.few_shot, limits.token_side) == ("qwen2_5_vl", True, 28)
    assert (limits.image_min_tokens, limits.image_max_tokens, limits.max_frames) == (128, 768, 3)


@pytest.mark.parametrize(("style", "reask"), [("paper", "explain"), ("compact", "resample")])
def test_tiny_models_are_asked_again_by_drawing_and_others_by_explaining(
    called: Run, file: Path, style: str, reask: str
) -> None:
    words = [file, "--out", file.parent / "o", "--url", "a:1", "--style", style]
    (job, _) = called("annotate.tcots.AnnotateJob.run", "data", "annotate", *words)
    assert job.settings.reask == reask and job.settings.sides == ("query", "target")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--url of a running server"),
        ("--url a:1 --engine m", "--url of a running server"),
        ('--engine m --extra-body {"top_k":1}', "--extra-body go with --url alone"),
        ("--engine m --model n", "--model and --extra-body go with --url alone"),
        ('--url a:1 --engine-args {"dtype":"auto"}', "--engine-args goes with --engine alone"),
        ("--url a:1 --limit 0", "limit of a server pool must be 1 or more"),
        (
            "--url a:1 --image-min-tokens 900",
            "data.embedrl.image_max_tokens must be at least image_min_tokens (900); got 768",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(
    words: str, message: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "annotate", str(file), "--out", str(file.parent / "o"), *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ConfigError: ") and error.count("\n") == 1 and message in error


def test_a_stopped_job_says_that_nothing_is_lost(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("embedrl_verl.annotate.tcots.AnnotateJob.run", stop)
    assert cli.main(["data", "annotate", str(file), "--out", str(file.parent / "o"), "--url", "a:1"]) == 130
    assert "what was answered is kept, and the same command goes on" in capsys.readouterr().err


def test_the_options_of_filter_reach_the_judge_and_the_split(
    called: Run, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Any] = []
    monkeypatch.setattr("embedrl_verl.annotate.relevance.VerdictJob.run", lambda job: jobs.append(job) or 0)
    words = [file, "--out", file.parent / "o", "--url", "a:1", "--free", "--tries", "4", "--max-bad-share", "0.2"]
    words += ["--seed", "9", "--rl-rows", "5", "--split-seed", "4", "--workers", "3"]
    files, verdicts, out, settings, more = called("curate.split_job.split_pairs", "data", "filter", *words)
    (job,) = jobs
    assert (job.settings.constrained, job.settings.tries, job.settings.seed) == (
        False,
        4,
        9,
    )
    assert (job.how.max_failed_share, job.how.max_rejected_share) == (0.5, 0.2)
    assert (files, verdicts, out) == ([str(file)], job.verdicts, str(file.parent / "o"))
    assert settings == SplitSettings(rl_rows_each=5, seed=4)
    more.pop("command")
    assert more == {"media_root": None, "workers": 3, "rows_per_part": 50_000, "max_bad_share": 0.2}


def test_the_options_of_split_reach_the_split(called: Run, capsys: pytest.CaptureFixture[str]) -> None:
    def settings(*words: str) -> SplitSettings:
        found: SplitSettings = called("curate.split_job.split_pairs", "data", "split", "f", "--out", "o", *words)[3]
        return found

    words = ["--rl-rows", "5", "--rl-rows", "a=7", "--contrastive-without", "b", "--rl-from", "all", "--split-seed"]
    assert settings(*words, "4", "--holdout", "0.5") == SplitSettings(
        rl_from="all", rl_rows={"a": 7}, rl_rows_each=5, contrastive_without=("b",), seed=4, holdout=0.5
    )
    assert settings() == SplitSettings()
    assert cli.main(["data", "split", "f", "--out", "o", "--rl-rows", "a=x"]) == 2
    assert "--rl-rows takes N or SOURCE=N; got 'a=x'" in capsys.readouterr().err


def test_the_options_of_content_ids_reach_the_job(called: Run) -> None:
    words = ["f", "--out", "o", "--media-root", "m", "--near-duplicates", "--max-bits", "3", "--max-difference", "2"]
    files, out, settings, more = called("curate.content_ids.fill_content_ids", "data", "content-ids", *words)
    assert (files, out, settings.media_root, settings.overwrite) == (["f"], "o", "m", False)
    assert (settings.near.max_bits, settings.near.max_difference) == (3, 2.0) and "media_root" not in more
