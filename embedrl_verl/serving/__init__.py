# SPDX-License-Identifier: Apache-2.0
"""Clients of HTTP servers that hold a model: neither verl nor Ray is imported.

`ServerPool` balances requests over several OpenAI-style servers, retries and watches their health.
"""

from embedrl_verl.serving.errors import ServerError
from embedrl_verl.serving.pool import PoolSettings, ServerPool
from embedrl_verl.serving.stats import PoolStats, ServerStats
from embedrl_verl.serving.urls import server_url

__all__ = ["PoolSettings", "PoolStats", "ServerError", "ServerPool", "ServerStats", "server_url"]
