# SPDX-License-Identifier: Apache-2.0
"""What the agent loop adds to verl's own."""

import asyncio

from embedrl_verl.trainer.agent_loop import _FixedPrompt


class _FakeClient:
    async def generate(self, *, prompt_ids, **kwargs):
        return prompt_ids, kwargs


def test_a_fixed_prompt_replaces_the_ids_and_nothing_else():
    client = _FixedPrompt(_FakeClient(), [1, 2])
    answer = asyncio.run(client.generate(prompt_ids=[1, 9, 9, 2], request_id="r", video_data=["clip"]))
    assert answer == ([1, 2], {"request_id": "r", "video_data": ["clip"]})
