# SPDX-License-Identifier: Apache-2.0
"""verl's client for rollouts that a weight update interrupts, with a new seed for every continuation.

verl aborts a running request, updates the weights and sends prompt + tokens so far as a new request, until the
response is whole. A request with a seed (`embedrl.rollout.request_seeds`) would then meet the random numbers again that
chose its first tokens: the continuation would depend on the beginning in a way the policy does not know. So the seed of
a continuation is made of the rollout's own seed and the number of tokens that are already there.
"""

from __future__ import annotations

import hashlib
from typing import Any

from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient


def continuation_seed(seed: int, generated: int) -> int:
    """Seed of a request whose response has `generated` tokens so far, 0 to 2^31 - 1; the rollout's own for none."""
    if generated == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{generated}".encode()).digest()[:4], "big") >> 1


class _SeedOfEachAttempt(LLMServerClient):
    """One request of a rollout. `max_tokens` is what is left of the response's budget, which verl's client pins."""

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **kwargs: Any
    ) -> Any:
        """As verl's."""
        if "seed" in sampling_params:
            budget = int(self.config.actor_rollout_ref.rollout.response_length)
            seed = continuation_seed(sampling_params["seed"], budget - sampling_params["max_tokens"])
            sampling_params = {**sampling_params, "seed": seed}
        return await super().generate(request_id, prompt_ids=prompt_ids, sampling_params=sampling_params, **kwargs)


class ResumingClient(FullyAsyncLLMServerClient, _SeedOfEachAttempt):
    """verl's `FullyAsyncLLMServerClient`; each request that it sends goes through `_SeedOfEachAttempt`."""
