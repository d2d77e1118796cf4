# SPDX-License-Identifier: Apache-2.0
"""The two-pass step: loss and gradients of the plain full-batch step, whatever the media, micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2VLConfig

from embedrl_verl.embedder import Embedder
from embedrl_verl.embedder.batching import pack_rows
from embedrl_verl.embedder.info_nce import HARD_NEGATIVE, ContrastiveLayout, contrastive_loss
from embedrl_verl.embedder.model import embed_packed
from embedrl_verl.embedder.two_pass import NoNegativesError, after_update, contrastive_gradients, refuse_dropout
from embedrl_verl.errors import ConfigError, EmbedderError
from embedrl_verl.platforms.ports import free_port
from recipes.tiny_digits.environment import CPU_ENV
from tests import processes
from tests.embedder.inputs import LOSS, Pair, contrastive_cases

SCRIPT = Path(__file__).with_name("two_pass_ranks.py")
CASES = contrastive_cases()


def start(checkpoint: Path, out: Path, ranks: int, dtype: str = "float32") -> dict[str, Any]:
    """What `two_pass_ranks.py` computed on so many ranks."""
    port = free_port()
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    started = [
        processes.start(
            [str(SCRIPT), str(checkpoint), str(out), dtype],
            out.with_suffix(f".{rank}.txt"),
            {**CPU_ENV, **shared, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    codes = [process.wait(600) for process in started]
    printed = [out.with_suffix(f".{rank}.txt").read_text() for rank in range(ranks)]
    assert not any(codes), "\n".join(text[-4000:] for text in printed)
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def steps(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict]:
    """`steps(ranks)`: the results of all cases, run once."""
    folder = tmp_path_factory.mktemp("two_pass")
    known: dict[int, dict[str, Any]] = {}

    def run(ranks: int) -> dict[str, Any]:
        if ranks not in known:
            known[ranks] = start(checkpoint(), folder / f"{ranks}.pt", ranks)
        return known[ranks]

    return run


def plain(embedder: Embedder, pairs: list[Pair]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one forward and one backward pass over the whole batch."""
    negatives = [(one, c) for _, _, some, contents in pairs for one, c in zip(some, contents[1:], strict=True)]
    inputs = [p[0] for p in pairs] + [p[1] for p in pairs] + [one for one, _ in negatives]
    number, content = torch.arange(len(pairs)), torch.tensor([p[3][0] for p in pairs])
    layout = ContrastiveLayout(
        number,
        torch.cat([number, torch.full((len(negatives),), HARD_NEGATIVE)]),
        content,
        torch.cat([content, torch.tensor([c for _, c in negatives], dtype=torch.int64).reshape(-1, 2)]),
    )
    embedder.model.zero_grad()
    rows = pack_rows([embedder.processor.encode(one) for one in inputs])
    vectors = embed_packed(embedder.model.model, rows)
    loss = contrastive_loss(vectors[: len(pairs)], vectors[len(pairs) :], layout, **LOSS).loss
    loss.backward()
    found = {name: value.grad.clone() for name, value in embedder.model.named_parameters() if value.grad is not None}
    embedder.model.zero_grad()
    return loss.item(), found


def norm(gradients: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([value.norm() for value in gradients.values()]).norm())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", list(CASES))
def test_loss_and_gradients_are_those_of_the_plain_step(case, ranks, steps, embedder):
    loss, gradients = plain(embedder(), CASES[case])
    found = steps(ranks)[case]
    assert found["loss"] == pytest.approx(loss, rel=1e-4)
    assert found["grad_norm"] == pytest.approx(norm(gradients), rel=1e-4)
    assert norm(gradients) > 0.05
    whole = norm(gradients)
    missing = set(gradients) - set(found["gradients"])
    assert not missing
    for name, expected in gradients.items():
        # Relative to the whole gradient: single numbers near zero are sums of rounding errors.
        assert (found["gradients"][name] - expected).norm() <= 1e-4 * max(float(expected.norm()), 1e-2 * whole), name


def test_bfloat16_computes_the_same_step_roughly_also_where_parts_are_not_used(checkpoint, embedder, tmp_path):
    """Two ranks, several micro-batches, an output matrix that no pass uses, and micro-batches without media."""
    found = start(checkpoint(), tmp_path / "bf16.pt", 2, "bfloat16")
    for case in CASES:
        loss, gradients = plain(embedder(), CASES[case])
        assert found[case]["loss"] == pytest.approx(loss, rel=0.03)
        one = torch.cat([gradients[name].flatten() for name in sorted(gradients)])
        two = torch.cat([found[case]["gradients"][name].float().flatten() for name in sorted(gradients)])
        assert torch.nn.functional.cosine_similarity(one, two, dim=0) > 0.98, case


# ---------------------------------------------------------------------- gradients in the vectors


def vectors(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


def layout(pairs: int, contents: list[int] | None = None) -> ContrastiveLayout:
    number = torch.arange(pairs)
    content = torch.tensor(contents) if contents else torch.stack((number, number), dim=1)
    return ContrastiveLayout(number, number, content, content)


def test_a_row_without_a_vector_has_no_part_and_no_gradient():
    query, target = vectors(5, 1), vectors(5, 2)
    broken = query.clone()
    broken[2] = float("nan")
    found = contrastive_gradients(broken, target, layout(5))
    assert found.query[2].abs().max() == 0 and found.query.isfinite().all()
    # Its target stays a negative of the others; the pair's own rows are no longer scored.
    kept = [0, 1, 3, 4]
    some = layout(5).select(torch.isin(torch.arange(5), torch.tensor(kept)), torch.ones(5, dtype=torch.bool))
    assert found.loss == pytest.approx(float(contrastive_loss(query[kept], target, some).loss), rel=1e-6)
    assert found.metrics["failed_rows"] == 1


@pytest.mark.parametrize("options", [{"matryoshka_dims": (2, 4)}, {"symmetric": False}, {"temperature": 0.5}])
def test_every_option_of_the_loss_is_in_its_gradients(options):
    leaves = [vectors(5, seed).requires_grad_() for seed in (1, 2)]
    loss = contrastive_loss(*leaves, layout(5), **{"temperature": 0.02, **options}).loss
    found = contrastive_gradients(vectors(5, 1), vectors(5, 2), layout(5), **options)
    torch.testing.assert_close((found.query, found.target), torch.autograd.grad(loss, leaves))
    assert found.loss == loss.item() != contrastive_gradients(vectors(5, 1), vectors(5, 2), layout(5)).loss


def test_rows_without_a_vector_are_counted_on_both_sides():
    query, target = vectors(5, 1), vectors(5, 2)
    query[2] = target[3] = target[4] = float("nan")
    found = contrastive_gradients(query, target, layout(5))
    assert found.metrics["failed_rows"] == 3 and not found.target[3:].any()


@pytest.mark.parametrize("contents", [[[0, 0]], [[1, 7], [2, 7]], [[7, 1], [7, 2], [7, 3]]])
def test_a_batch_without_negatives_is_named(contents):
    pairs = len(contents)
    with pytest.raises(NoNegativesError, match=rf"different queries and different targets; got {pairs} pair.s. with"):
        contrastive_gradients(vectors(pairs, 1), vectors(pairs, 2), layout(pairs, contents))


def test_a_batch_without_vectors_is_named():
    nothing = torch.full((3, 8), float("nan"))
    with pytest.raises(EmbedderError, match="no pair has vectors on both sides: 3 of 3 queries"):
        contrastive_gradients(nothing, vectors(3), layout(3))


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_an_update_whose_gradient_is_not_finite_is_an_error(norm):
    assert after_update({"grad_norm": 2.0, "lr": 0.1, "loss": [1.0]}) == {"grad_norm": 2.0, "lr": 0.1}
    with pytest.raises(EmbedderError, match=f"must be finite; got {norm}, and verl has left the weights alone"):
        after_update({"grad_norm": norm, "lr": 0.1})


def test_a_model_with_dropout_is_refused_by_name():
    config = Qwen2VLConfig()
    refuse_dropout(config, "model")
    config.text_config.attention_dropout = 0.1
    with pytest.raises(ConfigError, match=r"model: .*dropout must be 0; got text_config.attention_dropout=0.1"):
        refuse_dropout(config, "model")
