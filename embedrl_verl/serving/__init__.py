# SPDX-License-Identifier: Apache-2.0
"""Clients of HTTP servers that hold a model: neither verl nor Ray is imported.

`ServerPool` balances requests over several OpenAI-style servers; `vllm` has what vLLM's take beyond OpenAI's API.
"""

from embedrl_verl.serving.pool import PoolSettings, ServerPool
from embedrl_verl.serving.server import ServerError, server_url

__all__ = ["PoolSettings", "ServerError", "ServerPool", "server_url"]
