# SPDX-License-Identifier: Apache-2.0
"""Rebuilds the nested M-RoPE `position_ids` of a batch whose ragged dimension was lost (verl issue 7899).

A row's ids have shape (4, L): text position and three M-RoPE rows. TransferQueue packs the rows of a shard with
`torch.nested.as_nested_tensor`, which takes the first dimension that differs as the ragged one. When all L of the
shard agree (always so with one row) that is the 4, and verl 0.9.1 then marks dimension 2 as ragged without looking at
the values: unbinding raises, and chunking can cut the ids to 4 columns without an error. `input_ids` is always packed
rightly, so its lengths tell what the values are.
"""

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu


def rebuild_position_ids(data: TensorDict) -> None:
    """Rebuilds `data["position_ids"]` in place with the lengths of `data["input_ids"]`; leaves (B, L) ids and dense
    tensors alone.

    input_ids: jagged int64 (B, L_i). position_ids: jagged int64 (B, 4, L_i), packed either way. Afterwards the values
    have shape (4, sum L_i) and dimension 2 is ragged, for mixed lengths, equal lengths and a single row alike. Raises
    ValueError when the two do not belong together.
    """
    keys = data.keys()
    if "position_ids" not in keys or "input_ids" not in keys:
        return
    position_ids, input_ids = data["position_ids"], data["input_ids"]
    if not (position_ids.is_nested and position_ids.dim() == 3 and input_ids.is_nested):
        return
    lengths: list[int] = input_ids.offsets().diff().tolist()
    values: torch.Tensor = position_ids.values()
    if values.dim() == 2 and values.size(-1) == sum(lengths):
        rows = list(values.split(lengths, dim=-1))
    elif len(set(lengths)) == 1 and values.numel() % sum(lengths) == 0:
        rows = list(values.reshape(len(lengths), -1, lengths[0]).unbind())
    else:
        raise ValueError(
            f"position_ids must cover the tokens of input_ids; got values of shape {tuple(values.shape)} "
            f"for lengths {lengths}. Write both columns of a row from the same tokens."
        )
    data["position_ids"] = tu.nested_tensor_from_tensor_list(rows, ragged_idx=2)
