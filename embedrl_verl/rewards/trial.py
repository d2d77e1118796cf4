# SPDX-License-Identifier: Apache-2.0
"""`embedrl reward try`: what would another reward function have paid in this run?

The rewards of dumped rollouts are computed again, without GPU, models, verl or Ray, and compared with the run's own:
means, correlation, and what GRPO would have made of them. Values in twos are (old, new): the dump's and the tried
function's; NaN is an unknown row, or a number that does not exist (nothing known, or nothing varies).
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedrl_verl.data.schema import SIDES
from embedrl_verl.errors import ConfigError
from embedrl_verl.rewards.dump import RewardDump, find_dumps, read_reward_dump
from embedrl_verl.rewards.functions import NEEDS
from embedrl_verl.rewards.load import SHIPPED, load_reward_function, same_function
from embedrl_verl.rewards.score import call_reward_function, refuse_all_unknown

_EPSILON = 1e-6
"""verl's guard against a division by zero."""
_HEAD = (
    "  step rows query old    new target old    new unknown old new  corr. adv. corr. sign flips no signal old   new"
)
_WIDTHS = (6, 5, 10, 7, 11, 7, 12, 4, 7, 11, 11, 14, 6)


@torch.no_grad()
def grpo_advantages(score: Tensor, group: Tensor) -> Tensor:
    """(score - mean of its group) / standard deviation of its group, as verl's `grpo` with `norm_adv_by_std_in_grpo`.

    Args:
        score: (N,) float, NaN = unknown: in training such a row is in no group and has no gradient.
        group: (N,) int, rows of one prompt share an id.

    Returns:
        (N,) float64, NaN where the score is unknown or the only known one of its group, which has nothing to be
        compared with: training leaves such a row out too (verl alone would give it its score as advantage).
    """
    score, known = score.double(), ~score.isnan()
    ids: Tensor = torch.unique(group, return_inverse=True)[1]

    def per_group(values: Tensor) -> Tensor:
        return torch.bincount(ids[known], values[known], minlength=len(score))

    size = per_group(torch.ones_like(score))
    advantage = score - (per_group(score) / size)[ids]
    # A row that is alone divides by 0 / 0, which is NaN.
    return advantage / ((per_group(advantage**2) / (size - 1)).sqrt()[ids] + _EPSILON)


def variances(values: Tensor, group: Tensor) -> Tensor:
    """Variance (of a sample, as GRPO's deviation) within each of G groups: (G,) float64, NaN where fewer than two rows
    of the group are known.

    Args:
        values: (N,) float, NaN = unknown. group: (N,) int.
    """
    found = []
    for one in sorted(set(group.tolist())):
        known = values[(group == one) & ~values.isnan()].double()
        # 0 is exact: the mean of equal numbers may differ from them by rounding.
        varies = len(known) > 1 and bool((known != known[0]).any())
        found.append(known.var() if varies else torch.tensor(0.0 if len(known) > 1 else torch.nan).double())
    return torch.stack(found)


@dataclass(frozen=True)
class ScoredStep:
    """A trial on one dump of N rows.

    score: (2, N) float32; advantage: (2, N) float64, GRPO's. side: (N,), see `RewardBatch`.
    groups: how many; silent: of how many, old and new, every advantage is 0 or unknown.
    parts: what the tried function returned; variance: of each, as `variances` gives it.
    changes: rows whose advantage changes most, as JSON values, largest first.
    """

    step: str
    side: Tensor
    score: Tensor
    advantage: Tensor
    groups: int
    silent: list[int]
    parts: dict[str, Tensor]
    variance: dict[str, Tensor]
    changes: list[dict[str, Any]]


def score_dump(
    function: Callable[..., Any], where: str, dump: RewardDump, *, step: str = "", limit: int = 5
) -> ScoredStep:
    """Call a reward function (named `where`) on a dump, errors as `call_reward_function`; name up to `limit` rows."""
    batch = dump.batch
    parts = call_reward_function(function, batch, where)
    group, score = batch.groups(), torch.stack((dump.parts["score"], parts["score"]))
    advantage = torch.stack([grpo_advantages(one, group) for one in score])
    groups = len(set(group.tolist()))
    silent = [groups - len(set(group[one.nan_to_num() != 0].tolist())) for one in advantage]
    changed = (advantage[1] - advantage[0]).abs().nan_to_num()
    order = changed.argsort(descending=True, stable=True)[: min(limit, int((changed > 0).sum()))]
    changes = [
        {
            "step": step,
            "pair_id": str(dump.rows[row]["pair_id"]),
            "data_source": str(dump.rows[row]["data_source"]),
            "side": SIDES[int(batch.side[row])],
            "rollout": int(batch.rollout[row]),
            "score": score[:, row].tolist(),
            "advantage": advantage[:, row].tolist(),
            "text": dump.rows[row]["text"],
        }
        for row in order.tolist()
    ]
    variance = {name: variances(values, group) for name, values in parts.items()}
    return ScoredStep(step, batch.side, score, advantage, groups, silent, parts, variance, changes)


def summarise(scored: Sequence[ScoredStep], step: str) -> dict[str, Any]:
    """Compare old and new over all rows of `scored`, which is not empty; `step` names them.

    mean: of the scores by side ("query", "target", "mean"). unknown: rows without score. identical: every score is the
    same, bit for bit. correlation, advantage_correlation: Pearson's, over rows that have both. sign_flips: fraction of
    those whose advantage has the opposite sign. no_signal: fraction of the groups whose rows all have advantage 0 or
    unknown. parts: mean of every part of the tried function; variance_within_groups: the mean over groups for each, and
    for the score.
    """
    side = torch.cat([one.side for one in scored])
    score, advantage = (torch.cat([getattr(one, name) for one in scored], dim=1) for name in ("score", "advantage"))
    rows = {"query": side == 0, "target": side == 1, "mean": side >= 0}
    both = advantage[:, ~advantage.isnan().any(dim=0)]  # not those that are alone in their group
    groups = sum(one.groups for one in scored)
    bits = score.masked_fill(score.isnan(), torch.nan).view(torch.int32)  # unknown is unknown, whatever NaN it is
    names = [name for name in scored[0].parts if all(name in one.parts for one in scored)]
    return {
        "step": step,
        "rows": len(side),
        "groups": groups,
        "mean": {name: [_mean(one[chosen]) for one in score] for name, chosen in rows.items()},
        "unknown": score.isnan().sum(dim=1).tolist(),
        "identical": bits[0].equal(bits[1]),
        "correlation": _correlation(score[:, ~score.isnan().any(dim=0)]),
        "advantage_correlation": _correlation(both),
        "sign_flips": _mean((both[0] * both[1] < 0).double()),
        "no_signal": [sum(one.silent[which] for one in scored) / groups for which in (0, 1)],
        "parts": {name: _mean(torch.cat([one.parts[name] for one in scored])) for name in names if name != "score"},
        "variance_within_groups": {name: _mean(torch.cat([one.variance[name] for one in scored])) for name in names},
    }


def largest_changes(scored: Sequence[ScoredStep], limit: int) -> list[dict[str, Any]]:
    """The `limit` rows of all steps whose advantage changes most; rows that are unknown in either are left out."""
    changes = [change for one in scored for change in one.changes]
    return sorted(changes, key=lambda change: -abs(change["advantage"][1] - change["advantage"][0]))[:limit]


def _mean(values: Tensor) -> float:
    return float(values.double().nanmean())


def _correlation(both: Tensor) -> float:
    """Pearson's; NaN for fewer than two rows or where one does not vary, also if its mean in float64 is not exact."""
    if both.shape[1] < 2 or bool((both == both[:, :1]).all(dim=1).any()):
        return float("nan")
    return float(torch.corrcoef(both.double())[0, 1])


def try_on_run(
    spec: str, run: str, kwargs: Sequence[str] | None = None, steps: str | None = None, limit: int = 5
) -> dict[str, Any]:
    """Score the dumps of a run with another function, and compare.

    Args:
        spec: see `load_reward_function`; or the name of a ready-made function. run: see `find_dumps`.
        kwargs: "key=value" words; None: those of the dump where it is the dump's own function, else none.
        steps: "1,5-10" or None for all. limit: changed rows to name.

    Returns:
        What `--json` prints: function, kwargs_of_run, run, dump, steps, all (see `summarise`), changes.

    Raises:
        ConfigError: the function gives no row a score, or as `call_reward_function`.
    """
    wanted = [] if steps is None else parse_steps(steps)
    given = parse_kwargs([word for word in kwargs or () if word])
    shipped = spec in NEEDS and not Path(spec).is_file()
    function, where = load_reward_function(f"pkg://{SHIPPED}.{spec}" if shipped else spec)
    dumps = [(step, path) for step, path in find_dumps(run) if steps is None or is_in(step, wanted)]
    if not dumps:
        raise ConfigError(f"--steps {steps} names no dumped step of {run}")
    scored, tried, ran, of_run = [], set(), set(), False
    for step, path in dumps:
        dump = read_reward_dump(path)
        used, named = given, where
        if dump.kwargs and kwargs is None and same_function(where, dump.function):
            used, of_run = dump.kwargs, True
            named = f"{where} with the run's reward_kwargs {used} (--kwargs sets others)"
        tried.add(_called(where, used))
        ran.add(_called(dump.function, dump.kwargs))
        scored.append(score_dump(partial(function, **used), named, dump, step=step, limit=limit))
    refuse_all_unknown(torch.cat([one.score[1] for one in scored]), where, "the rows of the run")
    return {
        "function": "; ".join(sorted(tried)),
        "kwargs_of_run": of_run,
        "run": sorted(ran),
        "dump": run,
        "steps": [summarise([one], one.step) for one in scored],
        "all": summarise(scored, "all"),
        "changes": largest_changes(scored, limit),
    }


def parse_steps(text: str) -> list[range]:
    """ "1,5-10" as [range(1, 2), range(5, 11)]."""
    found = [re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part) for part in text.split(",")]
    if None in found:
        raise ConfigError(f"--steps must be a list like 1,5-10; got {text!r}")
    return [range(int(one[1]), int(one[2] or one[1]) + 1) for one in found if one]


def is_in(step: str, wanted: Sequence[range]) -> bool:
    number = step.split(".")[0]  # "9.1" is a part of step 9
    return number.isdecimal() and any(int(number) in some for some in wanted)


def parse_kwargs(assignments: Sequence[str]) -> dict[str, Any]:
    """ "key=value" words as keyword arguments; values are read as hydra reads those of `reward_kwargs`."""
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


def print_functions() -> None:
    """Print the ready-made functions and what they need."""
    for name, needs in NEEDS.items():
        summary = (import_module(f"embedrl_verl.rewards.functions.{name}").__doc__ or "").strip().splitlines()[0]
        print(f"{name:14} {summary}{f' Needs {needs}.' if needs else ''}")
    print(f"\nUse one: reward.custom_reward_function.path=pkg://{SHIPPED}.NAME, or reward/NAME.py")


def print_json(report: dict[str, Any]) -> None:
    """Print a report of `try_on_run`; NaN becomes null."""
    without_nan = json.loads(json.dumps(report), parse_constant=lambda _: None)
    print(json.dumps(without_nan, indent=1, allow_nan=False))


def print_tables(report: dict[str, Any]) -> None:
    """Print a report of `try_on_run`."""
    ran = "; ".join(one for one in report["run"] if one)
    print(f"tried:   {report['function']}\nrun had: {ran or '(its dump does not say)'}")
    print(
        "kwargs:  the run's, since this is its own function; --kwargs sets others\n" if report["kwargs_of_run"] else ""
    )
    steps, total = report["steps"], report["all"]
    print(_HEAD)
    for summary in [*steps, total] if len(steps) > 1 else steps:
        print("".join(f"{cell:>{width}}" for cell, width in zip(_cells(summary), _WIDTHS, strict=True)))
    if total["identical"]:
        print("\nidentical: every score is the run's own, bit for bit")
    else:
        same = sum(one["identical"] for one in steps)
        print(f"\nscores are the run's own, bit for bit, in {same} of {len(steps)} steps")
    if total["parts"]:
        print("parts (mean): " + ", ".join(f"{name} {_number(mean, '.4f')}" for name, mean in total["parts"].items()))
    variance = {name: value for name, value in total["variance_within_groups"].items() if value == value}
    print("variance within groups (mean): " + (", ".join(f"{name} {value:.2g}" for name, value in variance.items())))
    if constant := [name for name, value in variance.items() if value == 0]:
        print(f"the same for all rollouts of every prompt, so GRPO learns nothing from it: {', '.join(constant)}")
    print(
        "corr.: of old and new scores. adv.: GRPO's advantages, divided by the group's deviation.\n"
        "sign flips: rows whose advantage turns round. no signal: groups in which every advantage is 0."
    )
    if report["changes"]:
        print("\nlargest changes of the advantage:")
    for change in report["changes"]:
        (old, new), (before, after) = change["score"], change["advantage"]
        row = "step {step}, {data_source}, pair {pair_id}, {side}, rollout {rollout}".format_map(change)
        print(f"\n{row}: score {old:.4f} -> {new:.4f}, advantage {before:+.2f} -> {after:+.2f}")
        flat = " ".join(change["text"].split()) or "(empty)"
        print(textwrap.indent("\n".join(textwrap.wrap(flat, 110, max_lines=3)), "    "))


def _cells(summary: dict[str, Any]) -> list[str]:
    return [
        summary["step"],
        str(summary["rows"]),
        *(_number(mean, ".4f") for side in SIDES for mean in summary["mean"][side]),
        *map(str, summary["unknown"]),
        _number(summary["correlation"], ".3f"),
        _number(summary["advantage_correlation"], ".3f"),
        _number(summary["sign_flips"], ".1%"),
        *(f"{fraction:.1%}" for fraction in summary["no_signal"]),
    ]


def _number(value: float, form: str) -> str:
    return "-" if value != value else f"{value:{form}}"
