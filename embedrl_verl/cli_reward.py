# SPDX-License-Identifier: Apache-2.0
"""`embedrl reward try FILE --dump RUN`: what would another reward function have paid in this run?

Computes the rewards of dumped rollouts again, without GPU, models, verl or Ray, and compares them with the run's own:
means, correlation, and what GRPO would have made of them. `embedrl reward list` names the ready-made functions.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from embedrl_verl.errors import ConfigError

if TYPE_CHECKING:  # the other commands of `embedrl` need not wait for torch
    from embedrl_verl.rewards.trial import Change, Summary

_COLUMNS = (
    ("step", 6),
    ("rows", 5),
    ("query old", 10),
    ("new", 7),
    ("target old", 11),
    ("new", 7),
    ("unknown old", 12),
    ("new", 4),
    ("corr.", 7),
    ("adv. corr.", 11),
    ("sign flips", 11),
    ("no signal old", 14),
    ("new", 6),
)
_TEXT_WIDTH = 110
_TEXT_LINES = 3


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `reward` to `embedrl`; `run` carries it out."""
    reward = subparsers.add_parser("reward", help="reward functions: list them, try one on the rollouts of a run")
    commands = reward.add_subparsers(dest="reward_command", required=True)
    commands.add_parser("list", help="the ready-made functions and what they need")
    trial = commands.add_parser("try", help="score a run's dumped rollouts with another function; needs no GPU")
    trial.add_argument("file", metavar="FILE[:FUNCTION]", help="file or pkg://module (default function: compute_score)")
    trial.add_argument(
        "--dump", required=True, metavar="RUN", help="folder of a run, of its rollouts, or one dump file"
    )
    trial.add_argument(
        "--kwargs",
        nargs="*",
        metavar="KEY=VALUE",
        help="reward_kwargs, spelt as for hydra (default: those of the run for its own function, else none)",
    )
    trial.add_argument("--steps", metavar="1,5-10", help="these steps only")
    trial.add_argument("--limit", type=int, default=5, metavar="N", help="rows to show, largest change first (5)")
    trial.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """List or try; returns 0.

    Raises:
        ConfigError: the function cannot be loaded, refuses its arguments or the dump, or returns something else.
        DataError: no dumps, or damaged ones.
    """
    return _list() if args.reward_command == "list" else _try(args)


def _list() -> int:
    from importlib import import_module

    from embedrl_verl.rewards.functions import NEEDS

    for name, needs in NEEDS.items():
        told = (import_module(f"embedrl_verl.rewards.functions.{name}").__doc__ or "").strip().splitlines()[0]
        print(f"{name:14} {told}{f' Needs {needs}.' if needs else ''}")
    print("\nUse one: reward.custom_reward_function.path=pkg://embedrl_verl.rewards.functions.NAME, or reward/NAME.py")
    return 0


def _try(args: argparse.Namespace) -> int:
    from embedrl_verl.rewards.dump import find_dumps, read_reward_dump
    from embedrl_verl.rewards.load import load_reward_function, same_function
    from embedrl_verl.rewards.trial import largest_changes, score_dump, summarise

    if args.limit < 0:
        raise ConfigError(f"--limit must be 0 or more; got {args.limit}")
    wanted = None if args.steps is None else parse_steps(args.steps)
    given = parse_kwargs(args.kwargs or [])
    function, where = load_reward_function(args.file)
    dumps = [(step, path) for step, path in find_dumps(args.dump) if wanted is None or _is_in(step, wanted)]
    if not dumps:
        raise ConfigError(f"--steps {args.steps} names no dumped step of {args.dump}")
    scored, tried, ran, of_run = [], set(), set(), False
    for step, path in dumps:
        dump = read_reward_dump(path)
        kwargs, named = given, where
        if dump.kwargs and args.kwargs is None and same_function(where, dump.function):
            kwargs, of_run = dump.kwargs, True
            named = f"{where} with the run's reward_kwargs {kwargs} (--kwargs sets others)"
        tried.add(_called(where, kwargs))
        ran.add(_called(dump.function, dump.kwargs))
        scored.append(score_dump(partial(function, **kwargs), named, dump, step=step, limit=args.limit))
    steps = [summarise([one], one.step) for one in scored]
    total, changes = summarise(scored, "all"), largest_changes(scored, args.limit)
    told = "; ".join(sorted(tried))
    if args.json:
        report = {"function": told, "kwargs_of_run": of_run, "run": sorted(ran), "dump": str(args.dump)}
        values = {"steps": steps, "all": total, "changes": changes}
        print(json.dumps(_plain({**report, **values}), indent=1, allow_nan=False))
    else:
        print(f"tried:   {told}\nrun had: {'; '.join(sorted(ran - {''})) or '(its dump does not say)'}")
        print("kwargs:  the run's, since this is its own function; --kwargs sets others\n" if of_run else "")
        _print_table(steps, total)
        _print_changes(changes)
    return 0


def parse_steps(text: str) -> list[tuple[int, int]]:
    """ "1,5-10" as [(1, 1), (5, 10)].

    Raises:
        ConfigError: it is no such list.
    """
    ranges = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)):
            raise ConfigError(f"--steps must be a list like 1,5-10; got {text!r}")
        ranges.append((int(first), int(last or first)))
    return ranges


def parse_kwargs(assignments: Sequence[str]) -> dict[str, Any]:
    """ "key=value" words as keyword arguments; values are read as hydra reads those of `reward_kwargs`.

    Raises:
        ConfigError: a word is no assignment, or its value cannot be read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, kwargs = OverridesParser.create(), {}
    for word in assignments:
        key, equals, _ = word.partition("=")
        if not (equals and key.isidentifier()):
            raise ConfigError(f"--kwargs must be KEY=VALUE words; got {word!r}")
        try:
            kwargs[key] = parser.parse_override(word).value()
        except HydraException as error:
            raise ConfigError(f"--kwargs {word}: the value cannot be read ({str(error).splitlines()[0]})") from error
    return kwargs


def _called(function: str, kwargs: Mapping[str, Any] | None) -> str:
    return f"{function} {dict(kwargs)}" if kwargs else function


def _is_in(step: str, ranges: list[tuple[int, int]]) -> bool:
    number = step.split(".")[0]
    return number.isdecimal() and any(first <= int(number) <= last for first, last in ranges)


def _print_table(steps: Sequence[Summary], total: Summary) -> None:
    print("".join(f"{head:>{width}}" for head, width in _COLUMNS))
    for summary in [*steps, total] if len(steps) > 1 else steps:
        print("".join(f"{cell:>{width}}" for cell, (_, width) in zip(_cells(summary), _COLUMNS, strict=True)))
    same = sum(summary.identical for summary in steps)
    if total.identical:
        print("\nidentical: every score is the run's own, bit for bit")
    else:
        print(f"\nscores are the run's own, bit for bit, in {same} of {len(steps)} steps")
    if total.parts:
        print("parts (mean): " + ", ".join(f"{name} {_number(value, '.4f')}" for name, value in total.parts.items()))
    print(
        "corr.: of old and new scores. adv.: GRPO's advantages, divided by the group's deviation.\n"
        "sign flips: rows whose advantage turns round. no signal: groups in which every advantage is 0."
    )


def _cells(summary: Summary) -> list[str]:
    means = [_number(value, ".4f") for side in ("query", "target") for value in summary.mean[side]]
    return [
        summary.step,
        str(summary.rows),
        *means,
        *map(str, summary.unknown),
        _number(summary.correlation, ".3f"),
        _number(summary.advantage_correlation, ".3f"),
        _number(summary.sign_flips, ".1%"),
        *(f"{share:.1%}" for share in summary.no_signal),
    ]


def _print_changes(changes: Sequence[Change]) -> None:
    if changes:
        print("\nlargest changes of the advantage:")
    for change in changes:
        (old, new), (before, after) = change.score, change.advantage
        row = (
            f"step {change.step}, {change.data_source}, pair {change.pair_id}, {change.side}, rollout {change.rollout}"
        )
        print(f"\n{row}: score {old:.4f} -> {new:.4f}, advantage {before:+.2f} -> {after:+.2f}")
        flat = " ".join(change.text.split()) or "(empty)"
        print(textwrap.indent("\n".join(textwrap.wrap(flat, _TEXT_WIDTH, max_lines=_TEXT_LINES)), "    "))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _plain(value: Any) -> Any:
    """JSON values of dataclasses, mappings and sequences; NaN becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
