# SPDX-License-Identifier: Apache-2.0
"""Position ids keep their rows, whatever the lengths in a shard."""

import pytest
import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from embedrl_verl.platforms.position_ids import rebuild_position_ids

LENGTHS = [[3, 5, 2], [4, 4], [4], [4, 4, 4, 4], [1, 4], [2, 2, 7]]


def batch(lengths: list[int]) -> tuple[TensorDict, list[torch.Tensor]]:
    """A shard as TransferQueue packs it, and its rows of position ids (4, L)."""
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randint(0, 1000, (4, length), generator=generator) for length in lengths]
    columns = {
        "input_ids": torch.nested.as_nested_tensor([row[0] for row in rows], layout=torch.jagged),
        "position_ids": torch.nested.as_nested_tensor(rows, layout=torch.jagged),
    }
    return TensorDict(columns, batch_size=[len(lengths)]), rows


@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_row_comes_back(lengths):
    data, rows = batch(lengths)
    rebuild_position_ids(data)
    for found, expected in zip(data["position_ids"].unbind(), rows, strict=True):
        assert torch.equal(found, expected)
    selected = tu.index_select_tensor_dict(data, list(range(len(rows)))[::-1])
    for found, expected in zip(selected["position_ids"].unbind(), rows[::-1], strict=True):
        assert torch.equal(found, expected)
    padded = torch.nested.to_padded_tensor(data["position_ids"], padding=0, output_size=(len(rows), 4, max(lengths)))
    for found, expected in zip(padded, rows, strict=True):
        assert torch.equal(found[:, : expected.size(1)], expected)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_rebuilding_twice_changes_nothing(lengths):
    data, _rows = batch(lengths)
    rebuild_position_ids(data)
    once = data["position_ids"].values()
    rebuild_position_ids(data)
    assert torch.equal(data["position_ids"].values(), once)


def test_upstream_still_needs_it():
    """The day verl reads equal lengths rightly (its issue 7899), this fails and the module can go."""
    data, _rows = batch([6, 6])
    tu.maybe_fix_3d_position_ids(data)
    with pytest.raises(RuntimeError):
        data["position_ids"].unbind()


def test_text_position_ids_and_other_batches_are_left_alone():
    values = torch.nested.as_nested_tensor([torch.arange(3), torch.arange(2)], layout=torch.jagged)
    data = TensorDict({"input_ids": values, "position_ids": values}, batch_size=[2])
    rebuild_position_ids(data)
    assert data["position_ids"].dim() == 2
    rebuild_position_ids(TensorDict({"x": torch.zeros(2)}, batch_size=[2]))


def test_columns_of_different_tokens_are_refused():
    data, _rows = batch([3, 5])
    other, _rows = batch([3, 4])
    data["position_ids"] = other["position_ids"]
    with pytest.raises(ValueError, match="must cover the tokens of input_ids"):
        rebuild_position_ids(data)
