# SPDX-License-Identifier: Apache-2.0
"""An exponential moving average (EMA) of the trained weights, kept on the CPU.

Works on whatever a rank holds of the parameters: plain tensors, FSDP2's shards or FSDP's flat ones. Weights that are
not trained have no average.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from embedrl_verl.errors import EmbedderError


class ShadowWeights:
    """The average of a module's trained parameters, which begins as they are now.

    `decay`: fraction of the old average that an update keeps, in (0, 1).
    """

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self._module = module
        self.decay = decay
        self._shadow = [value.detach().float().cpu().clone() for value in self._values()]

    def _values(self) -> list[torch.Tensor]:
        """This rank's part of each trained parameter; writing into it changes the parameter."""
        if torch.cuda.is_available():  # verl moves weights off a GPU without waiting for them to arrive
            torch.cuda.synchronize()
        values = [one.data for one in self._module.parameters() if one.requires_grad]
        return [one.to_local() if isinstance(one, DTensor) else one for one in values]

    @torch.no_grad()
    def update(self) -> None:
        """average = decay * average + (1 - decay) * weights."""
        for shadow, value in zip(self._shadow, self._values(), strict=True):
            shadow.lerp_(value.float().cpu(), 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The module has the averaged weights inside the context, and its own again after it."""
        own = [value.detach().cpu().clone() for value in self._values()]
        self._write(self._shadow)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, source: list[torch.Tensor]) -> None:
        for value, new in zip(self._values(), source, strict=True):
            value.copy_(new)

    def state_dict(self) -> dict[str, Any]:
        """Decay and averages, for `torch.save`."""
        return {"decay": self.decay, "shadow": self._shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved average of the same parameters; the decay stays this run's."""
        shapes, wanted = ([tuple(one.shape) for one in some] for some in (state["shadow"], self._shadow))
        if shapes != wanted:
            raise EmbedderError(
                f"the saved average has {len(shapes)} tensors and the model {len(wanted)} trained ones, or shapes "
                "differ; resume with the same model, adapter and number of devices"
            )
        self._shadow = [one.clone() for one in state["shadow"]]
