# SPDX-License-Identifier: Apache-2.0
"""An actor with the settings of the GPU recipes computes what transformers' own model computes row by row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from embedrl_verl.embedder.processor import EmbedProcessor, Encoded
from embedrl_verl.platforms.ports import free_port
from recipes.tiny_digits.environment import CPU_ENV
from recipes.tiny_digits.models import build_tiny_model
from tests import processes
from tests.embedder.inputs import LIMITS, mixed_inputs
from tests.platforms.actor_ranks import weights_of

MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl tied")
SCRIPT = Path(__file__).with_name("actor_ranks.py")
Rows = dict[str, list[Encoded]]
Run = dict[tuple[str, str], dict[str, Any]]


def run_ranks(checkpoint: Path, rows: Rows, ranks: int) -> Run:
    """What `actor_ranks.py` computed."""
    given, out = checkpoint.parent / "rows.pt", checkpoint.parent / f"{ranks}.pt"
    torch.save(rows, given)
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        processes.start(
            [str(SCRIPT), str(checkpoint), str(given), str(out)],
            out.with_suffix(f".{rank}.txt"),
            {**CPU_ENV, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)},
        )
        for rank in range(ranks)
    ]
    codes = [process.wait(600) for process in started]
    assert not any(codes), "\n".join(out.with_suffix(f".{rank}.txt").read_text()[-4000:] for rank in range(ranks))
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, *tied = request.param.split()
    return build_tiny_model(tmp_path_factory.mktemp("actor") / family, family=family, tied=bool(tied))


@pytest.fixture(scope="module")
def rows(checkpoint: Path) -> Rows:
    """Text only, one and three images, videos, and rows of every kind."""
    processor = EmbedProcessor.from_pretrained(checkpoint, limits=LIMITS[checkpoint.name])
    all_rows = [processor.encode(one) for one in mixed_inputs(8)]
    media = {"text": all_rows[0::4], "images": all_rows[1:3], "video": all_rows[3::4]}
    return {**media, "mixed": all_rows[:6] + all_rows[7:]}


@pytest.fixture(scope="module")
def one_rank(checkpoint: Path, rows: Rows) -> Run:
    return run_ranks(checkpoint, rows, 1)


@pytest.fixture(scope="module")
def by_row(checkpoint: Path) -> Callable[[list[Encoded]], dict[str, Any]]:
    """Log-probs, loss and gradients by transformers' own forward pass, a row at a time."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa")

    def compute(rows: list[Encoded]) -> dict[str, Any]:
        model.zero_grad()
        log_probs, loss = [], torch.zeros(())
        for row in rows:
            ids = row.input_ids[None]
            kinds = {"mm_token_type_ids": torch.zeros_like(ids)}
            logits = model(
                input_ids=ids, position_ids=row.position_ids[1:, None], **kinds, **row.multi_modal_inputs
            ).logits[0]
            values = logits.log_softmax(-1)[:-1].gather(1, row.input_ids[1:, None])[:, 0]
            log_probs.append(values.detach())
            loss = loss + (values * weights_of(row.input_ids[1:])).sum()
        loss.backward()
        gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
        return {"log_probs": log_probs, "loss": loss.item(), "gradients": gradients}

    return compute


def assert_log_probs(found: dict[str, Any], right: dict[str, Any], case: str) -> None:
    for mine, own in zip(found["log_probs"], right["log_probs"], strict=True):
        assert (mine[:-1] - own).abs().max() < 1e-5, case


def assert_gradients(found: dict[str, Any], right: dict[str, Any], case: str) -> None:
    largest = max(value.abs().max() for value in right["gradients"].values())
    for name, value in found["gradients"].items():
        own = right["gradients"].get(name, torch.zeros(()))  # transformers runs no vision model without media
        assert (value - own).abs().max() < 1e-4 * largest, (case, name)


@pytest.mark.parametrize("setting", ["gpu", "varlen, whole logits", "padded"])
def test_log_probs_and_gradients_are_those_of_each_row_by_itself(setting, one_rank, by_row, rows):
    for case in rows:
        found, right = one_rank[setting, case], by_row(rows[case])
        assert_log_probs(found, right, case)
        assert found["loss"] == pytest.approx(right["loss"], rel=1e-4, abs=1e-4)
        assert_gradients(found, right, case)


def test_every_case_has_gradients_for_the_same_parameters(one_rank, by_row, rows):
    """Ranks reduce parameter by parameter: one that is left out on a rank would make the others wait."""
    names = {key: frozenset(value["gradients"]) for key, value in one_rank.items()}
    assert len(set(names.values())) == 1
    assert set(by_row(rows["mixed"])["gradients"]) <= names["gpu", "text"]


def test_ranks_with_unlike_media_end_and_give_the_gradients_of_the_whole_batch(checkpoint, by_row, rows):
    """Images on one rank, videos on the other."""
    both = run_ranks(checkpoint, rows, 2)["gpu", "unlike"]
    assert_log_probs(both, by_row(rows["images"]), "images")
    assert_gradients(both, by_row(rows["images"] + rows["video"]), "unlike")
